"""What a neuron does to its words when it is clamped, next to the same clamp on random neurons of its layer.

Source: Davies 2025 (arXiv 2501.02688), which clamps the up projection of the "dog" neuron of Llama-3.1-8B-Instruct and finds
that the model always talks of dogs. It leaves open how large the clamp is and what other neurons would have done: a large
enough value at any neuron changes what a model says, so every figure here stands beside those of random neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, SupportsIndex, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analyses.neuron_map import Side, neuron_rows, neuron_site
from workbench.capturing import capture
from workbench.errors import NotFinite, UnknownOption, require_one_of
from workbench.generation import continuations, end_ids, generate_tokens
from workbench.model import Batch, LanguageModel
from workbench.results import Result, versions
from workbench.sites import Site
from workbench.tokens import joined, shortened, shown
from workbench.tracer import edited

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
        for row, usual in zip(self.summary().to_dict("records"), own["usual"], strict=True):
            before, after = self.texts(row["prompt"])
            mine = self.table[(self.table["prompt"] == row["prompt"]) & ~self.table["random"]]
            words = "  ".join(f"{shown(one.token)} {one.before:.1e} -> {one.after:.1e}" for one in mine.itertuples())
            lines += [
                f"  {shortened(row['prompt'])} (its own value at the last token: {usual:+.2f})",
                f"    {words}",
                f"    {row['change']:+.2f} nats a word; random neurons {row['null_low']:+.2f} to {row['null_high']:+.2f} "
                f"(p {row['p']:.3f})",
                f"    before ({row['words_before']} of its words): {before!r}",
                f"    after  ({row['words_after']}; random neurons {row['words_null']:.1f}): {after!r}",
            ]
        return "\n".join([*lines, "  .table .generations .summary() .plot()"])


def neuron_effect(
    model: LanguageModel,
    layer: SupportsIndex,
    neuron: SupportsIndex,
    prompts: str | Sequence[str],
    *,
    value: float = 8.0,
    side: Side = "up",
    words: Sequence[str | int] | str | None = None,
    k: int = 5,
    n_random: int = 20,
    max_new_tokens: int = 20,
    chat: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> NeuronEffect:
    """Clamp a neuron at every token of prompt and continuation, and see what becomes of the words that it speaks for.

    Args:
        layer: Negative ones count from the end.
        value: What the neuron's number becomes: the up projection's output before the gate multiplies it (side `up`), the
            gate's output before the nonlinearity (`gate`), or the neuron itself (`down`). The sign of the effect of `up` is
            the gate's.
        words: Tokens to watch, strings or ids; if not given, those that the neuron speaks for: the top tokens of its row
            through the LM head (decoder `none`).
        k: How many of those.
        n_random: Other neurons of the layer that are clamped in its place, for the null.
        max_new_tokens: Length of the continuations (greedy).
        chat: Prompts are a user's messages, put into the chat template.
        seed: Which random neurons.
    Raises:
        LayerOutOfRange: if the model has no such layer.
        UnknownOption: if the layer has no such neuron, or not enough others; if there is no prompt; if the model's dtype does
            not hold the value.
        UnknownToken: if a word is no token.
        TextTooLong, UnreadableWeight: if a prompt does not fit; if the layer's weights are quantised.
        NotFinite: if a clamp makes the last state overflow, or its square, which norms take.
        UnknownSite, MissingWeight: if the layer has no such side, or is a mixture of experts.
    """
    import pandas as pd

    require_one_of("side", side, get_args(Side))
    layer, neuron, rows = neuron_of(model, layer, neuron, side)
    clamped = [neuron, *other_neurons(len(rows), neuron, n_random, seed)]
    if not abs(value) <= torch.finfo(model.dtype).max:
        raise UnknownOption(f"value={value} is no number to clamp to. Give a finite one that {model.dtype} holds.")
    prompts = list(dict.fromkeys([prompts] if isinstance(prompts, str) else prompts))
    ids = _words(model, rows[neuron], words, k)
    if not prompts or not len(ids):
        raise UnknownOption("No prompt or no word was given. Give at least one of each.")
    site = neuron_site(model, side, layer)
    tables, texts, usual = [], [], []
    for prompt in tqdm(prompts, desc="clamp", disable=not progress):
        one = model.tokenize(prompt, chat=chat)
        usual.append(float(capture(model, one, str(site), positions="last")[str(site)][0, 0, neuron]))
        batch, new, chances = _clamped_runs(model, one, site, clamped, value, max_new_tokens)
        tables.append(_changes(model, prompt, clamped, ids, chances[:, ids]))
        texts.append(
            pd.DataFrame(
                {
                    "prompt": prompt,
                    "neuron": pd.array([None, *clamped], dtype="Int64"),
                    "random": [False, False, *[True] * n_random],
                    "text": continuations(model, batch, new),
                    "words": _count(model, new.cpu(), ids),
                }
            )
        )
    settings = model.provenance | {
        "layer": layer, "neuron": neuron, "side": side, "site": str(site), "value": value, "usual": usual,
        "words": [model.token_strings[i] for i in ids.tolist()], "word_ids": ids.tolist(), "n_random": n_random,
        "max_new_tokens": max_new_tokens, "chat": chat, "seed": seed, "versions": versions(),
    }  # fmt: skip
    return NeuronEffect(pd.concat(tables, ignore_index=True), settings, pd.concat(texts, ignore_index=True))


def neuron_of(
    model: LanguageModel, layer: SupportsIndex, neuron: SupportsIndex, side: Side
) -> tuple[int, int, Float[Tensor, "d_mlp d_model"]]:
    """Which neuron is asked for: its layer, counted from 0, its number, and the rows of all neurons of its layer on a side.

    Raises:
        LayerOutOfRange: if the model has no such layer.
        UnknownOption: if the layer has no such neuron.
        MissingWeight: if the layer has no such side, or is a mixture of experts.
    """
    layer, neuron = index(layer), index(neuron)
    rows = neuron_rows(model, side, layer)
    layer = layer % model.n_layers
    if not 0 <= neuron < len(rows):
        raise UnknownOption(f"Neuron {neuron} does not exist in layer {layer}, which has {len(rows)}, counted from 0.")
    return layer, neuron, rows


def other_neurons(n: int, neuron: int, n_random: int, seed: int) -> list[int]:
    """Some of the n neurons of a layer, drawn at random, this one not among them.

    Raises:
        UnknownOption: if there are not as many.
    """
    if not 1 <= n_random < n:
        raise UnknownOption(f"n_random={n_random} is out of range: from 1 to {n - 1}, the layer's other neurons.")
    others = torch.randperm(n - 1, generator=torch.Generator().manual_seed(seed))[:n_random]
    return (others + (others >= neuron)).tolist()


def _words(model: LanguageModel, row: Tensor, words: Sequence[str | int] | str | None, k: int) -> Tensor:
    if words is None:
        if k < 1:
            raise UnknownOption(f"k={k} words were asked for. Ask for one or more.")
        return model.vocabulary.project(row[None].to(model.vocabulary.W_U.device), k=k).top_ids[0].cpu()
    return torch.tensor(list(dict.fromkeys(model.token_id(word) for word in ([words] if isinstance(words, str) else words))))


def _clamped_runs(
    model: LanguageModel, prompt: Batch, site: Site, clamped: list[int], value: float, max_new_tokens: int
) -> tuple[Batch, Tensor, Tensor]:
    """The prompt as it is in row 0, and with one neuron clamped in each row after it: the batch, the tokens that follow it,
    and log-probabilities of the next token, `[1 + clamped, d_vocab]`.

    Raises:
        NotFinite: if a clamp makes the last state overflow, or its square.
    """
    batch = Batch(*(part.expand(len(clamped) + 1, -1).contiguous() for part in prompt))

    def put(seen: Tensor) -> Tensor:
        seen = seen.clone()
        seen[torch.arange(1, len(seen)), :, clamped] = value
        return seen

    with edited(model, {site: put}):
        states = capture(model, batch, "resid_post.-1", positions="last")["resid_post.-1"][:, 0]
        # From 1e19 on squares overflow in float32: an RMS norm then gives zero, so that every word seems equally likely.
        if not torch.isfinite(states.float().square().sum(-1)).all():
            raise NotFinite(f"Clamped to {value:g} at '{site}', the last state has no finite norm. Choose a smaller value.")
        new = generate_tokens(model, batch, max_new_tokens=max_new_tokens)
    return batch, new, model.vocabulary.logits(states).log_softmax(-1).cpu()


def _changes(model: LanguageModel, prompt: str, clamped: list[int], ids: Tensor, chances: Tensor) -> pd.DataFrame:
    """Of the log-probabilities `[1 + clamped, words]`, the first row's and the others'."""
    import pandas as pd

    before, after = chances[0], chances[1:]
    n = len(ids)
    return pd.DataFrame(
        {
            "prompt": prompt,
            "neuron": [one for one in clamped for _ in range(n)],
            "random": [i > 0 for i in range(len(clamped)) for _ in range(n)],
            "token_id": ids.tolist() * len(clamped),
            "token": [model.token_strings[i] for i in ids.tolist()] * len(clamped),
            "before": before.exp().tolist() * len(clamped),
            "after": after.exp().flatten().tolist(),
            "change": (after - before).flatten().tolist(),
        }
    )


def _count(model: LanguageModel, new: Tensor, ids: Tensor) -> list[int]:
    """How many tokens of each continuation, up to its end, are among the words."""
    ends = torch.isin(new, torch.tensor(end_ids(model))).long()
    running = ends.cumsum(1) - ends == 0  # what follows the end is padding
    return (torch.isin(new, ids) & running).sum(1).tolist()
