"""A result of transport in plain words, made of its own numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from workbench.analyses.transport import TransportScores


def paragraph(result: TransportScores) -> str:
    """What was measured, step by step: what is carried and over what distance, what of it is chance, how many dimensions, which
    directions, from where, and what the model loses."""
    own = result.settings
    table = result.table[result.table["strata"] == own["strata"][0]]
    sentences = [
        f"{len(table)} {'pair' if len(table) == 1 else 'pairs'} of {own['model']} on {int(table['n'].iloc[0]):,} "
        f"{own['strata'][0]} tokens of {own['corpus']!r}, each half of the documents predicted by maps of the other"
        + ("." if len(table) == 1 else "; numbers are medians over pairs, with the least and the greatest."),
        f"A linear map of the source explains {_middle(table['held_out'])} of the target's variance"
        + (f" (shuffled documents: {_middle(table['null'])})." if "null" in table else "."),
    ]
    if table["distance"].nunique() > 2:
        decay = result.decay().set_index("distance")["held_out"]
        near, far = decay.index[0], decay.index[-1]
        sentences.append(f"Over {near:.0f} block it is {decay[near]:.3f} in the mean, over {far:.0f} blocks {decay[far]:.3f}.")
    weighed = {"fisher": "what the output depends on", "readers": "what the next block reads"}
    there = [name for name in weighed if name in table and table[name].notna().any()]
    found = [f"by {weighed[name]} {_middle(table[name])}" for name in there]
    if found:
        sentences.append(f"Weighed {' and '.join(found)}.")
    sentences.append(
        f"With every canonical direction counted alike it is {_middle(table['whitened_held_out'])}; with the best slopes along "
        f"them it would be {_middle(table['ceiling'])} (the ceiling as published, in sample: "
        f"{_middle(table['ceiling_in_sample'])})."
    )
    if "size" in table:
        sentences.append(
            f"The linear-transport subspace has {_middle(table['size'], '.0f')} dimensions whose correlation exceeds every one "
            f"of shuffled documents; as published it would have {_middle(table['size_published'], '.0f')}, and shuffled "
            f"documents {_middle(table['size_null'], '.0f')}."
        )
    if result.directions is not None and "verdict" in result.directions:
        counts = result.directions["verdict"].value_counts()
        many = ", ".join(f"{int(counts.get(name, 0))} {name}" for name in ("carried", "mixed", "made"))
        skipped = int((result.directions["note"] != "").sum())
        sentences.append(
            f"Of {len(result.directions)} directions {many}: carried are those that score more than 95 % of random directions "
            "of the same target, made those that score no more than 95 % of all directions do with the documents shuffled."
            + (f" {skipped} are active on too few tokens to be scored there." if skipped else "")
        )
    return " ".join([*sentences, *_routes(result), *_damage(result)])


def _routes(result: TransportScores) -> list[str]:
    if result.routes is None:
        return []
    gains = result.routes.groupby("route", sort=False)["above_shuffled"].median()
    named = {"attention": "the token attended to most", "previous": "the one before", "random": "an earlier one at random"}
    said = ", ".join(f"{words} {gains[route]:+.3f}" for route, words in named.items())
    return [f"Beside the token's own state, the state of another token adds, above one of another document: {said} (median)."]


def _damage(result: TransportScores) -> list[str]:
    if result.damage is None:
        return []
    middle = result.damage.groupby("way", sort=False)[["change", "restored"]].median()
    return [
        f"What is carried in the place of the state costs the model {middle.loc['transported', 'change']:+.3f} nats a token on "
        f"held-out documents (the mean {middle.loc['mean', 'change']:+.3f}, another token's state "
        f"{middle.loc['resampled', 'change']:+.3f}, zeros {middle.loc['zero', 'change']:+.3f}, the map fed with zeros "
        f"{middle.loc['empty', 'change']:+.3f}, the exact state {middle.loc['exact', 'change']:+.3f}): it restores "
        f"{middle.loc['transported', 'restored']:.1%} of what mean ablation takes away."
    ]


def _middle(values: pd.Series, form: str = ".3f") -> str:
    """Median and, of several, range."""
    values = values.dropna()
    if len(values) == 1:
        return f"{values.iloc[0]:{form}}"
    return f"{values.median():{form}} ({values.min():{form}} to {values.max():{form}})"
