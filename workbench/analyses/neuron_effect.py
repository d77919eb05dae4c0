"""What a neuron does to its words when it is clamped, next to the same clamp on random neurons of its layer.

Source: Davies 2025 (arXiv 2501.02688), which clamps the up projection of the "dog" neuron of Llama-3.1-8B-Instruct and finds
that the model always talks of dogs. It leaves open how large the clamp is and what other neurons would have done: a large
enough value at any neuron changes what a model says, so every figure here stands beside those of random neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analyses.neuron_map import Side, neuron_rows
from workbench.capturing import capture
from workbench.edits.make import clamp
from workbench.errors import UnknownOption, require_one_of
from workbench.generation import continuations, generate_tokens
from workbench.intervention import intervene
from workbench.model import Batch, LanguageModel
from workbench.results import Result, versions
from workbench.sites import Site
from workbench.tokens import joined

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class NeuronEffect(Result):
    """One row a prompt, clamped neuron and word.

    Columns: prompt, neuron, random (whether it is one of the null), token_id, token, before and after (the word's probability
    as the next token), change (of its log-probability, in nats).
    """

    generations: pd.DataFrame
    """One row a prompt and neuron, and one for the model as it is. Columns: prompt, neuron (none: nothing is clamped), random,
    text (what follows the prompt), words (how many of its tokens are among the neuron's words)."""

    def summary(self) -> pd.DataFrame:
        """One row a prompt: columns prompt, before, after (probability that one of the words comes next), change (mean of the
        words', in nats), null_median and null_low, null_high (of the random neurons' changes: the median, and the span of
        the middle 90 %), p (share of neurons, this one among them, whose change is at least as large in size), words (of its
        generation, and before and of the random neurons' mean)."""
        import pandas as pd

        rows = []
        for prompt, own in self.table.groupby("prompt", sort=False):
            changes = own.groupby(["random", "neuron"], sort=False)["change"].mean()
            this, null = float(changes[False].iloc[0]), changes[True]
            mine = own[~own["random"]]
            texts = self.generations[self.generations["prompt"] == prompt]
            clamped = texts[texts["neuron"].notna()]
            rows.append(
                {
                    "prompt": prompt, "before": mine["before"].sum(), "after": mine["after"].sum(), "change": this,
                    "null_median": null.median(), "null_low": null.quantile(0.05), "null_high": null.quantile(0.95),
                    "p": (1 + (null.abs() >= abs(this)).sum()) / (1 + len(null)),
                    "words_before": int(texts.loc[texts["neuron"].isna(), "words"].iloc[0]),
                    "words_after": int(clamped.loc[~clamped["random"], "words"].iloc[0]),
                    "words_null": clamped.loc[clamped["random"], "words"].mean(),
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def texts(self, prompt: str) -> tuple[str, str]:
        """What follows a prompt before and after."""
        own = self.generations[(self.generations["prompt"] == prompt) & ~self.generations["random"]]
        before, after = own.sort_values("neuron", na_position="first")["text"]
        return before, after

    def plot(self) -> go.Figure:
        """The change of the words' log-probability, this neuron's among the random ones', for each prompt."""
        from workbench.plots.neuron_effect import plot_neuron_effect

        return plot_neuron_effect(self)

    def __str__(self) -> str:
        own = self.settings
        lines = [
            f"Neuron {own['layer']}.{own['neuron']} ({own['side']}) of {own['model']}, and the words {joined(own['words'])}",
            f"clamped to {own['value']:g} at every token, and {own['n_random']} random neurons of its layer so",
        ]
        for row in self.summary().itertuples():
            before, after = self.texts(str(row.prompt))
            lines += [
                f"  {row.prompt!r}: its words {row.before:.2e} -> {row.after:.2e}, {row.change:+.2f} nats a word; random "
                f"neurons {row.null_low:+.2f} to {row.null_high:+.2f} (p {row.p:.3f})",
                f"    before: {before!r}",
                f"    after:  {after!r}",
            ]
        return "\n".join([*lines, "  .table .generations .summary() .plot()"])


def neuron_effect(
    model: LanguageModel,
    layer: int,
    neuron: int,
    prompts: str | Sequence[str],
    *,
    value: float = 8.0,
    side: Side = "up",
    words: Sequence[str | int] | None = None,
    k: int = 5,
    n_random: int = 20,
    max_new_tokens: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> NeuronEffect:
    """Clamp a neuron at every token of prompt and continuation, and see what becomes of the words that it speaks for.

    Args:
        value: What the neuron's number becomes: the up projection's output before the gate multiplies it (side `up`), the
            gate's output before the nonlinearity (`gate`), or the neuron itself (`down`). The sign of the effect of `up` is
            the gate's.
        words: Tokens to watch, strings or ids; if not given, those that the neuron speaks for: the top tokens of its row
            through the LM head (decoder `none`).
        k: How many of those.
        n_random: Other neurons of the layer that are clamped in its place, for the null.
        max_new_tokens: Length of the continuations (greedy).
        seed: Which random neurons.
    Raises:
        UnknownOption: if the layer has no such neuron, or not enough others.
        UnknownToken: if a word is no token.
        UnknownSite, MissingWeight: if the layer has no such side, or is a mixture of experts.
    """
    import pandas as pd

    require_one_of("side", side, get_args(Side))
    rows = neuron_rows(model, side, layer)
    layer = layer % model.n_layers
    if not 0 <= neuron < len(rows):
        raise UnknownOption(f"Neuron {neuron} does not exist in layer {layer}, which has {len(rows)}, counted from 0.")
    if not 1 <= n_random < len(rows):
        raise UnknownOption(f"n_random={n_random} is out of range: from 1 to {len(rows) - 1}, the layer's other neurons.")
    site = clamped_site(model, side, layer)
    if words is None:
        ids = model.vocabulary.project(rows[neuron : neuron + 1], k=k).top_ids[0].cpu()
    else:
        ids = torch.tensor([model.token_id(word) for word in words])
    strings = [model.token_strings[i] for i in ids.tolist()]
    others = torch.randperm(len(rows) - 1, generator=torch.Generator().manual_seed(seed))[:n_random]
    clamped = [neuron, *(others + (others >= neuron)).tolist()]
    edits = [clamp(str(site), one, value, rows=i + 1) for i, one in enumerate(clamped)]
    tables, texts, usual = [], [], []
    for prompt in tqdm([prompts] if isinstance(prompts, str) else list(prompts), desc="clamp", disable=not progress):
        one = model.tokenize(prompt)
        usual.append(float(capture(model, one, str(site), positions="last")[str(site)][0, 0, neuron]))
        # Row 0 stays as it is, row 1 has the neuron clamped, the others a random one each.
        batch = Batch(*(part.expand(len(edits) + 1, -1).contiguous() for part in one))
        with intervene(model, *edits):
            new = generate_tokens(model, batch, max_new_tokens=max_new_tokens)
            logits = _next_logits(model, batch)
        chances = logits.log_softmax(-1)[:, ids]
        before, after = chances[0], chances[1:]
        tables.append(
            pd.DataFrame(
                {
                    "prompt": prompt,
                    "neuron": [one for one in clamped for _ in strings],
                    "random": [i > 0 for i in range(len(clamped)) for _ in strings],
                    "token_id": ids.tolist() * len(clamped),
                    "token": strings * len(clamped),
                    "before": before.exp().tolist() * len(clamped),
                    "after": after.exp().flatten().tolist(),
                    "change": (after - before).flatten().tolist(),
                }
            )
        )
        texts.append(
            pd.DataFrame(
                {
                    "prompt": prompt,
                    "neuron": pd.array([None, *clamped], dtype="Int64"),
                    "random": [False, False, *[True] * n_random],
                    "text": continuations(model, batch, new),
                    "words": torch.isin(new.cpu(), ids).sum(1).tolist(),
                }
            )
        )
    settings = model.provenance | {
        "layer": layer, "neuron": neuron, "side": side, "site": str(site), "value": value, "usual": usual, "words": strings,
        "n_random": n_random, "max_new_tokens": max_new_tokens, "seed": seed, "versions": versions(),
    }  # fmt: skip
    return NeuronEffect(pd.concat(tables, ignore_index=True), settings, pd.concat(texts, ignore_index=True))


def clamped_site(model: LanguageModel, side: Side, layer: int) -> Site:
    """Where a side of a neuron is a number: its projection's output, or for `down` the neuron itself."""
    if side == "down":
        return Site("mlp_post", layer)
    return Site("mlp_up" if side == "up" and model.block_row(layer).is_gated else "mlp_pre", layer)


@torch.no_grad()
def _next_logits(model: LanguageModel, batch: Batch) -> Tensor:
    """Logits of the token after each row's last, `[batch, d_vocab]`."""
    return model.forward(batch)[:, -1].float().cpu()
