"""What a neuron does to the logits by itself: what it writes, through the norms after it and the unembedding.

Later layers read what it writes too, and what they make of it is not here; nor is it the effect of a clamp. In the last
layer nothing comes after, and `direct_change` is all there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.capturing import capture
from workbench.frozen_norm import FrozenNorm, frozen_norm
from workbench.model import Batch, LanguageModel
from workbench.projection import accumulation_dtype

if TYPE_CHECKING:
    import pandas as pd


class DirectEffect:
    """The linear part, averaged over tokens that pass by: what one unit of the neuron adds to each logit while the norms after
    it keep the scale that they have at the token."""

    def __init__(self, model: LanguageModel, layer: int, neuron: int) -> None:
        self.model, self.layer, self.block = model, layer, model.block_row(layer)
        self.row = model.weight("W_out", layer)[neuron].detach()
        self.state = f"resid_post.{model.n_layers - 1}"
        self.sites = [self.state] + [f"mlp_post.{layer}"] * (self.block.ln2_post is not None)
        self._final = model.row.path("ln_final")
        self._post = None if self.block.ln2_post is None else model.row.path(self.block.ln2_post, layer)
        self._norms: dict[str, FrozenNorm] = {}
        self._scales, self._tokens = 0.0, 0

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], at: Int[Tensor, " token"]) -> None:
        """
        Args:
            values: What the model has at `sites`.
            at: Which of the tokens count.
        """
        if not len(at):
            return
        scales = self._scales_of(self._final, values[self.state][at])
        if self._post is not None:
            scales = scales * self._scales_of(self._post, self._before_post_norm(values[f"mlp_post.{self.layer}"][at]))
        self._scales += float(scales.double().sum())
        self._tokens += len(at)

    @torch.no_grad()
    def direction(self) -> Float[Tensor, " d_model"]:
        """What the neuron's unit is after the final norm, on the average of the tokens."""
        written = self.row * self.block.residual_multiplier
        for norm in [self._norms[path] for path in (self._post, self._final) if path is not None]:
            written = replace(norm, scale=1.0, bias=torch.zeros_like(norm.bias))(written)
        return self._scales / self._tokens * written

    def table(self, k: int) -> pd.DataFrame:
        """The tokens that it raises and lowers most. Columns end, rank, token_id, token, logit (a unit of the neuron, above
        what it adds to the mean of all tokens, which no probability depends on; before a soft cap)."""
        import pandas as pd

        vocabulary, strings = self.model.vocabulary, self.model.token_strings
        direction = vocabulary.logit_scale * self.direction().to(vocabulary.W_U.device)
        mean = float(vocabulary.mean_direction() @ direction.to(accumulation_dtype(vocabulary.W_U)))
        found = vocabulary.project(direction[None], k=k, k_bottom=k)
        frames = []
        for end, ids, logits in (
            ("top", found.top_ids, found.top_logits), ("bottom", found.bottom_ids, found.bottom_logits),
        ):  # fmt: skip
            tokens = ids[0].tolist()
            columns = {"token_id": tokens, "token": [strings[i] for i in tokens], "logit": (logits[0] - mean).tolist()}
            frames.append(pd.DataFrame({"end": end, "rank": range(len(tokens))} | columns))
        return pd.concat(frames, ignore_index=True)

    def _before_post_norm(self, neurons: Tensor) -> Tensor:
        bias = self.model.optional_weight("b_out", self.layer)
        given = neurons @ self.model.weight("W_out", self.layer).detach()
        return given if bias is None else given + bias.detach()

    def _scales_of(self, path: str, states: Tensor) -> Tensor:
        if path not in self._norms:
            self._norms[path] = frozen_norm(self.model, path, states[0])
        return self._norms[path].scales(self.model.module(path).forward, states)


@torch.no_grad()
def direct_change(
    model: LanguageModel, prompt: str | Batch, layer: int, neuron: int, value: float
) -> Float[Tensor, " d_vocab"]:
    """By how much the log-probability of each next token would change if the neuron had another value at the last token, and
    every later layer still gave what it gave (nats). Exact: norms, soft cap and all."""
    block, last = model.block_row(layer), f"resid_post.{model.n_layers - 1}"
    module = [model.row.path(block.mlp, layer)] if block.ln2_post else []
    acts = capture(model, prompt, [f"mlp_post.{layer}", last], modules=module, positions="last")
    state = acts[last][0, -1].to(accumulation_dtype(acts[last]))
    row = model.weight("W_out", layer)[neuron].detach().to(state)
    written = (value - acts[f"mlp_post.{layer}"][0, -1, neuron].to(state)) * row
    if block.ln2_post:
        norm, given = model.module(model.row.path(block.ln2_post, layer)).forward, acts[module[0]][0, -1]
        written = norm((given.to(state) + written).to(given)).to(state) - norm(given).to(state)
    before, after = model.vocabulary.logits(torch.stack([state, state + block.residual_multiplier * written])).log_softmax(-1)
    return after - before
