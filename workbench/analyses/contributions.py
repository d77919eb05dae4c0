"""What each part of a model adds to a linear function of its logits, at one position: the sums behind logit attribution.

A direction that reads the stream before the final norm is carried back to where each part writes: through the frozen norms
after it, residual multipliers and output matrices. What the part gave, times that, is its contribution.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.activations import Activations
from workbench.capturing import capture
from workbench.frozen_norm import allowed_error, frozen_norm
from workbench.model import Batch, LanguageModel
from workbench.projection import accumulation_dtype
from workbench.tracer import is_edited
from workbench.vocabulary import Vocabulary

By = Literal["component", "head", "neuron", "source"]


class Goal(NamedTuple):
    """The linear function of the logits: one, less another or their mean."""

    token: int
    versus: int | None = None
    centred: bool = False

    def of(self, logits: Float[Tensor, " d_vocab"]) -> Tensor:
        """Its value for some logits, or for anything else that has a number a token."""
        found = logits[self.token]
        if self.versus is not None:
            found = found - logits[self.versus]
        return found - logits.mean() if self.centred else found

    def direction(self, vocabulary: Vocabulary) -> Float[Tensor, " d_model"]:
        """What the final norm's output is multiplied by."""
        dtype = accumulation_dtype(vocabulary.W_U)
        found = vocabulary.direction(self.token).to(dtype)
        if self.versus is not None:
            found = found - vocabulary.direction(self.versus).to(dtype)
        return vocabulary.logit_scale * (found - vocabulary.mean_direction() if self.centred else found)


class Contributions(NamedTuple):
    """Those of one kind and layer."""

    part: str
    values: Float[Tensor, " rows"]
    name: str
    layer: int | None = None
    index: Int[Tensor, " rows"] | None = None
    """Of the heads or neurons, where there are several."""
    source: Int[Tensor, " rows"] | None = None
    """Positions that the heads read."""


class Parts:
    """What the parts of a model gave at the last position of a prompt.

    Kept is that position alone, and the values of all positions where heads are split by source: L · pos · d of them.
    """

    def __init__(self, model: LanguageModel, batch: Batch, by: By):
        self.model, self.batch, self.by = model, batch, by
        self.vocabulary, self.n_layers = model.vocabulary, model.n_layers
        self.blocks = [model.block_row(layer) for layer in range(model.n_layers)]
        self.edited = is_edited(model)
        self.acts = self._captured()
        split = [f"v.{layer}" for layer in range(self.n_layers) if self._splits_attention(layer)] if by == "source" else []
        self.sources = capture(model, batch, split) if split else None
        assert self.acts.logits is not None
        self.logits: Float[Tensor, " d_vocab"] = self.acts.logits[0, -1].to(accumulation_dtype(self.acts.logits))

    def contributions(self, goal: Goal) -> Iterator[Contributions]:
        """All, in the order of the forward pass; they sum to what the goal is of the model's logits.

        Inside `wb.intervene`, what the edits put into the stream that no part gave has rows of its own.
        """
        total = torch.zeros((), dtype=torch.float64)
        for one in self._unedited(goal):
            total += one.values.sum().double().cpu()
            yield one
        if self.edited:
            rest = goal.of(self.logits).double().cpu() - total
            yield Contributions("edit", rest[None], "edits of ln_final")

    def _unedited(self, goal: Goal) -> Iterator[Contributions]:
        model, direction = self.model, goal.direction(self.vocabulary)
        last = self.acts[f"resid_post.{self.n_layers - 1}"][0, -1]
        ln_final = frozen_norm(model, model.row.path("ln_final"), last)
        stream = ln_final.pulled_back(direction)
        yield from self._embedding(stream)
        for layer in range(self.n_layers):
            parts = [*self._attention(layer, stream), *self._mlp(layer, stream)]
            yield from parts
            if self.edited:
                yield self._edit(layer, stream, parts)
        if ln_final.bias.any():
            yield _one("constant", ln_final.bias, direction, "bias of ln_final")
        if (b_U := self.vocabulary.b_U) is not None:
            yield Contributions("constant", goal.of(b_U.to(direction))[None], "b_U")
        if (cap := self.vocabulary.softcap) is not None:
            logits = replace(self.vocabulary, softcap=None).logits(last[None])[0]
            yield Contributions("constant", (goal.of(cap * (logits / cap).tanh()) - goal.of(logits))[None], "soft cap")

    def _edit(self, layer: int, stream: Tensor, parts: list[Contributions]) -> Contributions:
        """What came into the stream at a layer beside its parts."""
        after = f"resid_pre.{layer + 1}" if layer + 1 < self.n_layers else f"resid_post.{layer}"
        before = self._at(f"resid_pre.{layer}")
        change = (self._at(after).to(before) - before) @ stream.to(before)
        rest = change - sum(part.values.sum().to(change) for part in parts)
        return Contributions("edit", rest[None], f"edits of layer {layer}", layer)

    def _embedding(self, stream: Tensor) -> Iterator[Contributions]:
        """Of the token and of the position apart, if the model adds the two; else in one, as where it norms or scales them."""
        embed, entering = self._at("embed"), self._at("resid_pre.0")
        beside = entering - embed
        if not beside.any():
            yield _one("embed", embed, stream, "token embedding")
        elif self._is_of_the_position(beside):
            yield _one("embed", embed, stream, "token embedding")
            yield _one("embed", beside, stream, "position embedding")
        else:
            yield _one("embed", entering, stream, "embedding")

    def _is_of_the_position(self, beside: Tensor) -> bool:
        """Whether the same is there for another token at this position."""
        others = Batch((self.batch.tokens + 1) % self.model.d_vocab, self.batch.mask)
        acts = capture(self.model, others, ["embed", "resid_pre.0"], positions="last")
        other = (acts["resid_pre.0"] - acts["embed"])[0, -1].to(beside)
        return bool((other - beside).norm() <= allowed_error(acts["embed"].dtype) * beside.norm())

    def _attention(self, layer: int, stream: Tensor) -> Iterator[Contributions]:
        block = self.blocks[layer]
        if block.attn is None:
            before = self._at(f"resid_pre.{layer}")
            yield _one("mixer", self._at(f"resid_mid.{layer}").to(before) - before, stream, f"mixer {layer}", layer)
        elif not self._splits_attention(layer):
            yield _one("attn", self._at(f"attn_out.{layer}"), stream, f"attn {layer}", layer)
        else:
            before, constant = self._before_post_norm(layer, block.ln1_post, block.attn, stream)
            z, W_O = self._at(f"z.{layer}"), self.model.weight("W_O", layer).detach()
            reading = W_O.to(z) @ before.to(z)
            heads = torch.arange(len(z))
            of_heads = Contributions("head", (z * reading).sum(-1), f"head {layer}", layer, heads)
            yield from [of_heads] if self.by == "head" else self._by_source(of_heads, layer, reading)
            yield from self._bias("b_O", layer, before, constant)

    def _by_source(
        self, of_heads: Contributions, layer: int, reading: Float[Tensor, "heads d_value"]
    ) -> Iterator[Contributions]:
        assert self.sources is not None
        pattern = self.acts[f"pattern.{layer}"][0, :, -1].to(reading)
        v = self.sources[f"v.{layer}"][0].to(reading)
        v = v.repeat_interleave(len(reading) // v.shape[1], 1)
        split = pattern * torch.einsum("shd,hd->hs", v, reading)
        head, source = (index.flatten() for index in torch.meshgrid(*map(torch.arange, split.shape), indexing="ij"))
        yield Contributions("source", split.flatten(), of_heads.name, layer, head, source)
        if "v" in self.blocks[layer].mutated:  # clipped after the site: pattern · v is not all of z
            yield of_heads._replace(part="rest", values=of_heads.values - split.sum(1))

    def _mlp(self, layer: int, stream: Tensor) -> Iterator[Contributions]:
        block = self.blocks[layer]
        if not self._splits_mlp(layer):
            yield _one("mlp", self._at(f"mlp_out.{layer}"), stream, f"mlp {layer}", layer)
            return
        before, constant = self._before_post_norm(layer, block.ln2_post, block.mlp, stream)
        neurons, W_out = self._at(f"mlp_post.{layer}"), self.model.weight("W_out", layer).detach()
        values = neurons * (W_out.to(neurons) @ before.to(neurons))
        yield Contributions("neuron", values, f"neuron {layer}", layer, torch.arange(len(values)))
        yield from self._bias("b_out", layer, before, constant)

    def _before_post_norm(self, layer: int, post_norm: str | None, module: str, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The direction that reads what a module gives as `stream` reads what is then added, and what a post-norm adds."""
        stream = stream * self.blocks[layer].residual_multiplier
        if post_norm is None:
            return stream, stream.new_zeros(())
        row = self.model.row
        norm = frozen_norm(self.model, row.path(post_norm, layer), self.acts[row.path(module, layer)][0, -1])
        return norm.pulled_back(stream), norm.bias @ stream.to(norm.bias)

    def _bias(self, name: str, layer: int, before: Tensor, constant: Tensor) -> Iterator[Contributions]:
        bias = self.model.optional_weight(name, layer)
        if bias is not None:
            constant = constant + bias.detach().to(before) @ before
        if constant != 0:
            yield Contributions("constant", constant[None], f"{name} {layer}", layer)

    def _captured(self) -> Activations:
        sites, modules = ["embed", "resid_pre.0", f"resid_post.{self.n_layers - 1}"], []
        if self.edited:
            sites.append("resid_pre")
        for layer, block in enumerate(self.blocks):
            if block.attn is None:
                sites += [f"resid_pre.{layer}", f"resid_mid.{layer}"]
            elif self._splits_attention(layer):
                sites += [f"z.{layer}"] + [f"pattern.{layer}"] * (self.by == "source")
                modules += [self.model.row.path(block.attn, layer)] if block.ln1_post else []
            else:
                sites.append(f"attn_out.{layer}")
            if self._splits_mlp(layer):
                sites.append(f"mlp_post.{layer}")
                modules += [self.model.row.path(block.mlp, layer)] if block.ln2_post else []
            else:
                sites.append(f"mlp_out.{layer}")
        return capture(self.model, self.batch, sites, modules=modules, positions="last", logits=True)

    def _splits_attention(self, layer: int) -> bool:
        return self.by in ("head", "source") and self.blocks[layer].attn is not None

    def _splits_mlp(self, layer: int) -> bool:
        return self.by == "neuron" and self.blocks[layer].down is not None

    def _at(self, name: str) -> Tensor:
        """What was captured there, where it is computed: a model may be spread over several devices."""
        value = self.acts[name][0, -1]
        return value.detach().to(accumulation_dtype(value))


def _one(part: str, vector: Tensor, direction: Tensor, name: str, layer: int | None = None) -> Contributions:
    return Contributions(part, (vector @ direction.to(vector))[None], name, layer)
