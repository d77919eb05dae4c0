"""What kind of head each attention head is, told from where it looks: previous-token, induction, duplicate-token, sink.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", and Olsson et al. 2022, "In-context Learning and
Induction Heads" (arXiv 2209.11895): an induction head looks at the token after the earlier occurrence of the present one.
Sinks: Xiao et al. 2023 (arXiv 2309.17453). We differ in giving each score beside its null, without which a head that looks
everywhere, or always at one distance, would pass for one of a kind. A score says where a head looks, not what it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.architectures.taps import why_not
from workbench.capturing import keeping
from workbench.errors import UnknownOption, require_one_of
from workbench.model import Batch, LanguageModel
from workbench.projection import accumulation_dtype
from workbench.results import Result, versions
from workbench.sites import Site
from workbench.tokens import ordinary_ids
from workbench.tracer import edited

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Score = Literal["previous_token", "induction", "duplicate_token", "first_token", "entropy_nats"]
SCORES: tuple[Score, ...] = get_args(Score)

FROM = 2
"""The first query that counts: the first token sees itself alone, and for the second the previous token is the first."""

ROWS = 16
"""Random sequences a pass."""

TEXTS = (
    "The river rises in the hills above the old town, runs past the mill and the stone bridge, and reaches the sea a day's "
    "walk to the south. In spring it floods the meadows, and the children cross to school by boat.",
    "When the committee met again on Tuesday, Anna Berg asked why the report had not been sent to its members. Berg said that "
    "without the report no vote could be held, and the chairman agreed to wait another week.",
    "To make the bread, mix two cups of flour with a spoon of salt and a cup of warm water. Knead the dough for ten minutes, "
    "let it rest under a cloth until it has doubled, and bake it in a hot oven until the crust is brown.",
    "A computer stores numbers as rows of bits. Adding two numbers takes one step, but sorting a list of numbers takes more "
    "steps the longer the list is, which is why programmers care about the order in which a program does its work.",
)
"""English of four kinds, for the scores that are of ordinary text."""

Measure = Callable[[Float[Tensor, "batch heads pos pos"]], dict[str, Float[Tensor, "batch heads queries"]]]


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """Where each head looks. `table` has one row a head.

    Columns: layer, head, and five scores, each with its null in a column of the same name and `_null`:

    - previous_token: attention to the token before, on texts; null: uniform attention.
    - induction: on random tokens said twice, attention to the token after the earlier occurrence of the present one;
      null: to the same distance on random tokens that do not repeat.
    - duplicate_token: to the earlier occurrence itself; null: as for induction.
    - first_token: to the first token, on texts (a sink, if it is large); null: uniform attention.
    - entropy_nats: of the attention over tokens, on texts; null: uniform attention, the highest there is.

    All are means over queries: on texts from the third token on, on random ones from the second that is said again.
    """

    def top(self, score: Score = "induction", n: int = 10) -> pd.DataFrame:
        """The heads with the highest score: columns layer, head, the score and its null."""
        require_one_of("score", score, SCORES)
        return self.table.nlargest(n, score)[["layer", "head", score, f"{score}_null"]].reset_index(drop=True)

    def plot(self) -> go.Figure:
        """A picture of layers by heads for each score."""
        from workbench.plots.head_scores import plot_head_scores

        return plot_head_scores(self)

    def __str__(self) -> str:
        out = f" (layers without a pattern: {found})" if (found := self.settings["left_out"]) else ""
        lines = [f"HeadScores of {self.settings['model']}: {len(self.table)} heads{out}; layer.head score (null)"]
        for score in SCORES:
            best = [f"{row[0]:.0f}.{row[1]:.0f} {row[2]:.2f} ({row[3]:.2f})" for row in self.top(score, 5).to_numpy()]
            lines.append(f"  {score:<16}{'  '.join(best)}")
        return "\n".join([*lines, "  .table .top('induction', 10) .plot()"])


def head_scores(
    model: LanguageModel,
    texts: str | Sequence[str] | None = None,
    *,
    n_random: int = 16,
    length: int = 25,
    seed: int = 0,
) -> HeadScores:
    """Score every attention head by where it looks.

    Patterns are reduced as they are made: at a time there is one layer's, of one text or of 16 random sequences.

    Args:
        texts: For previous_token, first_token and entropy_nats; four short English ones, if None.
        n_random: Sequences of random tokens, said twice, and as many that do not repeat, for induction and duplicate_token.
            Tokens are ordinary ones, no two of a sequence alike, after the token of beginnings if the tokenizer sets one.
        length: Tokens that are said twice. A head that looks back less far than this (a sliding window) finds nothing.
        seed: Of the random tokens.
    Raises:
        UnknownSite: if no layer's pattern can be seen (Falcon with position biases). Single layers without one, as those
            that mix positions by a convolution, are left out and named in `settings["left_out"]`.
        UnknownOption: if a text has fewer than three tokens, or more random tokens are asked for than there are.
        TextTooLong: if a text, or the random tokens said twice, do not fit into the model's context.
    """
    started = time.perf_counter()
    layers = [layer for layer in range(model.n_layers) if why_not(model.block_row(layer), "pattern") is None]
    if not layers:
        model.tap(Site("pattern", 0))  # which says why
    texts = [texts] if isinstance(texts, str) else list(TEXTS if texts is None else texts)
    if not texts:
        raise UnknownOption("An empty list of texts was given. Give at least one, or none of the argument for four of ours.")
    read = [model.tokenize(text) for text in texts]
    for i, batch in enumerate(read):
        if batch.tokens.shape[1] <= FROM:
            raise UnknownOption(
                f"Text {i} has {batch.tokens.shape[1]} tokens; heads are scored from the third on. Give longer."
            )
    said_twice, unrepeated = _random_batches(model, n_random, length, seed)

    def of_random(pattern: Tensor, null: str = "") -> dict[str, Tensor]:
        looks = {"induction": length - 1, "duplicate_token": length}
        # From the second token said again on: the earlier occurrence of the first may be the first of all, a sink.
        return {name + null: at_distance(pattern, distance)[..., 1 - length :] for name, distance in looks.items()}

    scores = _means(model, layers, read, on_text)
    scores |= _means(model, layers, said_twice, of_random)
    scores |= _means(model, layers, unrepeated, lambda pattern: of_random(pattern, "_null"))
    uniform = _Totals(on_text)
    for batch in read:
        uniform(uniform_pattern(batch.tokens.shape[1]))
    scores |= {f"{name}_null": value for name, value in uniform.means().items()}
    return HeadScores(
        table=_table(layers, scores, model.n_heads),
        settings=model.provenance
        | {
            "texts": texts, "n_random": n_random, "length": length, "seed": seed,
            "left_out": [layer for layer in range(model.n_layers) if layer not in layers],
            "versions": versions(), "seconds": round(time.perf_counter() - started, 2),
        },
    )  # fmt: skip


def at_distance(pattern: Float[Tensor, "batch heads pos pos"], distance: int) -> Float[Tensor, "batch heads queries"]:
    """Attention of each query to the token so many places before it, from the first query that has one."""
    return pattern.diagonal(-distance, -2, -1)


def on_text(pattern: Float[Tensor, "batch heads pos pos"]) -> dict[str, Float[Tensor, "batch heads queries"]]:
    """The scores that are of ordinary text, for each query from the third token on."""
    rows = pattern[..., FROM:, :]
    # Where a part of the attention goes to no token (GPT-OSS), entropy is of the rest.
    shares = rows / rows.sum(-1, keepdim=True).clamp_min(1e-30)
    return {
        "previous_token": at_distance(pattern, 1)[..., FROM - 1 :],
        "first_token": rows[..., 0],
        "entropy_nats": torch.special.entr(shares).sum(-1),
    }


def uniform_pattern(length: int) -> Float[Tensor, "1 1 pos pos"]:
    """Attention of a head that looks at all tokens alike."""
    seen = torch.ones(1, 1, length, length).tril()
    return seen / seen.sum(-1, keepdim=True)


def _random_batches(model: LanguageModel, n_random: int, length: int, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Sequences whose second half repeats the first, and others of the same first half that do not."""
    ordinary = torch.tensor(ordinary_ids(model.tokenizer, model.d_vocab))
    if n_random < 1 or length < 2 or 2 * length > len(ordinary):
        raise UnknownOption(
            f"n_random={n_random} sequences of length={length} were asked for, without repetition twice as long. Ask for "
            f"one or more, of length 2 to {len(ordinary) // 2}: {model.name!r} has {len(ordinary)} ordinary tokens."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([ordinary[torch.randperm(len(ordinary), generator=generator)[: 2 * length]] for _ in range(n_random)])
    first: Any = model.tokenizer("a")["input_ids"][0]
    start = torch.full((n_random, 1), first)[:, : int(first == model.tokenizer.bos_token_id)]

    def batches(tokens: Tensor) -> list[Batch]:
        rows = torch.cat([start, tokens], 1).to(model.device).split(ROWS)
        return [Batch(part, torch.ones_like(part, dtype=torch.bool)) for part in rows]

    return batches(drawn[:, :length].repeat(1, 2)), batches(drawn)


def _means(
    model: LanguageModel, layers: list[int], batches: list[Batch], measure: Measure
) -> dict[str, Float[Tensor, "layers heads"]]:
    """Means over all queries of what the measure makes of each layer's patterns."""
    totals = {Site("pattern", layer): _Totals(measure) for layer in layers}
    last = Site("resid_post", model.n_layers - 1)  # the pass ends there, before the logits
    for batch in batches:
        with edited(model, totals), keeping(model, [last]):
            model.forward(batch)
    means = [of_layer.means() for of_layer in totals.values()]
    return {name: torch.stack([of_layer[name] for of_layer in means]) for name in means[0]}


class _Totals:
    """An edit that changes nothing, but adds up what a measure makes of the patterns that it sees."""

    def __init__(self, measure: Measure):
        self.measure = measure
        self.sums: dict[str, Tensor] = {}
        self.queries: dict[str, int] = {}

    def __call__(self, pattern: Tensor) -> Tensor:
        for name, value in self.measure(pattern.detach().to(accumulation_dtype(pattern))).items():
            self.sums[name] = self.sums.get(name, 0) + value.sum((0, 2)).cpu().double()
            self.queries[name] = self.queries.get(name, 0) + value.shape[0] * value.shape[2]
        return pattern

    def means(self) -> dict[str, Float[Tensor, " heads"]]:
        return {name: total / self.queries[name] for name, total in self.sums.items()}


def _table(layers: list[int], scores: dict[str, Tensor], n_heads: int) -> pd.DataFrame:
    import pandas as pd

    columns = [f"{score}{which}" for score in SCORES for which in ("", "_null")]
    return pd.DataFrame(
        {
            "layer": np.repeat(layers, n_heads),
            "head": np.tile(np.arange(n_heads), len(layers)),
            **{column: scores[column].expand(len(layers), n_heads).flatten().numpy() for column in columns},
        }
    )
