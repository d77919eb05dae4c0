"""A result of transport in plain words, made of its own numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from workbench.analyses.transport_scores import TransportScores


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
        sentences.append(f"Over {near:.0f} block the median is {decay[near]:.3f}, over {far:.0f} blocks {decay[far]:.3f}.")
    weighed = {"fisher": "what the output depends on", "readers": "what the next block reads"} | {
        name: f"what block {name.partition('@')[2]} reads" for name in own["weigh"] if "@" in name
    }
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
            f"{_middle(table['correlations_above_null'], '.0f')} canonical correlations exceed every one of shuffled "
            f"documents: "
            f"as a size (their participation ratio) {_middle(table['size'], '.0f')} dimensions. As published, of all of them "
            f"and "
            f"in sample, it would be {_middle(table['size_published'], '.0f')}, and of shuffled documents "
            f"{_middle(table['size_null'], '.0f')}."
        )
    elif own["null"]:
        sentences.append(
            f"There is no null: {own['unshuffled']:.0%} of tokens have none of another document to stand beside. Take a corpus "
            "of more documents for sizes and verdicts."
        )
    if result.directions is not None and "verdict" in result.directions:
        counts = result.directions["verdict"].value_counts()
        many = ", ".join(f"{int(counts.get(name, 0))} {name}" for name in ("carried", "mixed", "made"))
        skipped = int((result.directions["note"] != "").sum())
        sentences.append(
            f"Of {len(result.directions)} directions {many}: carried are those of which a map explains more than it misses, "
            "made those that score no more than 95 % of all directions do with the documents shuffled."
            + (f" {skipped} are active on too few tokens to be scored there." if skipped else "")
        )
    return " ".join([*sentences, *_routes(result), *_damage(result)])


def _routes(result: TransportScores) -> list[str]:
    if result.routes is None:
        return []
    gains = result.routes.groupby("route", sort=False)["above_shuffled"].median()
    named = {"attention": "those attended to most", "previous": "those just before", "random": "earlier ones at random"}
    said = ", ".join(f"{words} {gains[route]:+.3f}" for route, words in named.items())
    n = result.settings["sources"]
    n = result.settings["sources"]
    one = "the state of one other token of the text adds" if n == 1 else f"the states of {n} other tokens of the text add"
    return [f"Beside the token's own state, {one} to this, above what tokens of other documents do: {said} (medians)."]


def _damage(result: TransportScores) -> list[str]:
    if result.damage is None:
        return []
    own = result.damage
    middle, first = own.groupby("way", sort=False)[["change", "change_error", "restored"]].median(), own.iloc[0]
    return [
        f"On {int(first['n']):,} tokens of {int(first['documents'])} held-out documents, what is carried in the place of the "
        f"state costs the model {middle.loc['transported', 'change']:+.3f} ± {middle.loc['transported', 'change_error']:.3f} "
        f"nats a "
        f"token (the mean {middle.loc['mean', 'change']:+.3f}, another token's state {middle.loc['resampled', 'change']:+.3f}, "
        f"zeros {middle.loc['zero', 'change']:+.3f}, the map fed with zeros {middle.loc['empty', 'change']:+.3f}, the exact "
        f"state {middle.loc['exact', 'change']:+.3f}): it restores {middle.loc['transported', 'restored']:.1%} of what mean "
        f"ablation "
        "takes away."
    ]


def _middle(values: pd.Series, form: str = ".3f") -> str:
    """Median and, of several, range."""
    values = values.dropna()
    if len(values) == 1:
        return f"{values.iloc[0]:{form}}"
    return f"{values.median():{form}} ({values.min():{form}} to {values.max():{form}})"
