"""A neuron card on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from workbench.analyses.unit_examples import in_context
from workbench.analyses.word_statistics import LEAST
from workbench.tokens import joined, shortened, shown

if TYPE_CHECKING:
    import pandas as pd

    from workbench.analyses.neuron_card import NeuronCard
    from workbench.analyses.neuron_text import NeuronText

WORDS, NEIGHBOURS, EXAMPLES = 8, 2, 5
"""Of each end that are shown; the tables hold all."""
SIGNS = {"top": "+", "bottom": "-"}
VALUES = {
    "lowest": "lowest", "q1": "1 %", "q25": "25 %", "q50": "median", "q75": "75 %", "q99": "99 %", "highest": "highest",
}  # fmt: skip
"""Of a neuron over text, by their columns."""


def lines_of(card: NeuronCard) -> Iterator[str]:
    """All of it, in some 70 lines."""
    own = card.settings
    yield (
        f"Neuron {card.name} of {own['model']} ({own['family']}, {own['n_layers']} layers, "
        f"{own['layer_neurons']:,} neurons in this one)"
    )
    yield from _weights(card)
    yield from _neighbours(card)
    if card.text is not None:
        yield from _text(card.text)
    if card.logits is not None:
        yield from _logits(card.logits)
    if card.clamp is not None:
        yield from _clamp(card.clamp, own["n_random"])


def _weights(card: NeuronCard) -> Iterator[str]:
    yield f"\nIts words, decoder {card.settings['decoder']} (score: standard deviations from the other neurons)"
    scores = card.scores.set_index(["side", "end"])
    for side in card.sides.to_dict("records"):
        yield f"  {side['side']:<5} norm {side['norm']:.2f}, longer than {side['longer_fraction']:.0%} of its layer's"
        words = card.table[card.table["side"] == side["side"]]
        for end, sign in SIGNS.items():
            best = scores.loc[(side["side"], end)]
            yield f"    {sign} {joined(words[words['end'] == end]['token'].head(WORDS))}"
            null = f"99 % of random directions within {number(best['null_score'], '+.1f')}"
            yield f"      most of all {shown(str(best['word']))}: {best['score']:+.1f} ({null})"
    yield "  cosines of its sides (in brackets the middle 98 % of its layer's)"
    for row in card.cosines.to_dict("records"):
        span = f"{row['layer_low']:+.2f} to {row['layer_high']:+.2f}"
        yield f"    {row['side'] + ' and ' + row['other']:<14} {row['cosine']:+.2f} ({span})"


def _neighbours(card: NeuronCard) -> Iterator[str]:
    yield "\nThe neurons of all layers most like it and most opposite, by cosine"
    nulls = card.sides.set_index("side")
    for side, rows in card.nearest.groupby("side", sort=False):
        null = nulls.loc[side]
        yield (
            f"  {side:<5} (a random direction reaches {null['null_nearest_median']:.2f}; 99 % stay below "
            f"{null['null_nearest']:.2f})"
        )
        for row in rows[rows["rank"] < NEIGHBOURS].to_dict("records"):
            yield f"    {row['cosine']:+.2f}  {row['layer']}.{row['neuron']:<6}{row['tokens']}"


def _text(text: NeuronText) -> Iterator[str]:
    unit, own = text.statistics.set_index("side").loc["down"], text.settings
    yield f"\nOn {own['tokens']:,} ordinary tokens of {own['corpus']}: above zero on {unit['firing_rate']:.1%}"
    yield "  " + "   ".join(f"{name} {unit[column]:.3g}" for column, name in VALUES.items())
    for end, rows in text.examples.groupby("end", sort=False):
        yield f"  where it is {end}"
        yield from (f"    {row['activation']:>8.3g}  {in_context(row)}" for row in rows.head(EXAMPLES).to_dict("records"))
    others = f"in brackets with the words of {own['null_neurons']} other neurons, the middle 90 %"
    yield f"\nDoes it fire on its words? AUC (chance: 0.5; {others})"
    for (side, end), rows in text.words.groupby(["side", "end"], sort=False):
        at, before = (_area(row) for row in rows.to_dict("records"))
        yield f"  {side:<5}{SIGNS[str(end)]}  at a word {at:<42} before one {before}"


def _area(row: dict[str, Any]) -> str:
    if row["present"] < LEAST:
        return f"seen {row['present']} times: too few"
    if not row["null_neurons"]:
        return f"{row['auc']:.3f} (none of them seen enough)"
    return f"{row['auc']:.3f} ({row['null_low']:.3f} to {row['null_high']:.3f}, {row['null_neurons']} seen enough)"


def _logits(logits: pd.DataFrame) -> Iterator[str]:
    yield "\nWhat one unit of it adds to the logits directly (the final norm's scale held; later layers left out)"
    for end, sign in SIGNS.items():
        rows = logits[logits["end"] == end].head(WORDS).to_dict("records")
        yield f"  {sign} " + "  ".join(f"{shown(row['token'])} {row['logit']:+.2g}" for row in rows)


def _clamp(clamp: pd.DataFrame, n_random: int) -> Iterator[str]:
    for value, rows in clamp.groupby("value", sort=False):
        yield f"\nClamped to {value:.3g}, where it writes {joined(rows['words'].iloc[0][:WORDS])}"
        for row in rows.to_dict("records"):
            null = f"{n_random} random neurons {row['null_low']:+.2f} to {row['null_high']:+.2f} (p {row['p']:.3f})"
            yield f"  {shortened(row['prompt'])}: {row['change']:+.2f} nats a word ({row['direct']:+.2f} directly); {null}"
            yield f"    before {row['text_before']!r}"
            yield f"    after  {row['text_after']!r}"


def number(value: float | None, form: str) -> str:
    """A number, or that there is none."""
    return "none" if value is None or value != value else format(value, form)
