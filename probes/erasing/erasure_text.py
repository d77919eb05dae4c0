"""An erasure in words: the table, and what holds and what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from workbench.results import wrapped

if TYPE_CHECKING:
    from probes.erasing.erasure import Erasure

SHOWN = {
    "eraser": "eraser", "rank": "rank", "linear": "linear", "linear_fresh": "fresh", "mlp": "mlp", "mlp_fresh": "mlp fresh",
    "neighbours": "5-nn", "neighbours_seen": "5-nn seen", "gap_seen": "gap seen", "gap_fresh": "gap fresh", "edit": "edit",
    "main_accuracy": "main", "tpr_gap": "TPR gap",
}  # fmt: skip
GUARDED = 1e-4
"""Share of the distance between class means that may be left, in the rows of the fit, by rounding of float32 states."""


def erasure_text(result: Erasure) -> str:
    """What was erased, the tables by site, and what was found to hold, aloud."""
    own = result.settings
    lines = [
        f"{own['dataset']} erased from {own['model']}: {own['examples']:,} examples in {own['groups'][0]:,} groups, half of "
        f"which each eraser is fitted to; chance {own['chance']:.3f}"
    ]
    for site, some in result.table.groupby("site", sort=False):
        shown = some[[column for column in SHOWN if column in some]].rename(columns=SHOWN)
        lines += [f"{site}:", shown.to_string(index=False, float_format=_number)]
        lines += [wrapped(line) for line in said(result, str(site), some)]
    return "\n".join([*lines, "  .table .curve .points .eraser(name) .plot() .save(folder)"])


def said(result: Erasure, site: str, table: pd.DataFrame) -> list[str]:
    """Post-conditions: guarded? a class left alone? more removed than needed? found again by rows that were not seen, or by a
    network?"""
    own, rows = result.settings, table.set_index("eraser")
    needed = len(own["classes"]) - 1
    linear = [name for name in rows.index if name not in ("none", "random", "shuffled")]
    guarded = [name for name in linear if rows.loc[name, "gap_seen"] <= GUARDED]
    open_ = [name for name in linear if name not in guarded]
    lines = []
    if guarded:
        lines.append(
            f"Class means are equal in the rows of the fit after {', '.join(guarded)}: no linear probe is left anything."
        )
    if open_:
        left = ", ".join(f"{name} ({rows.loc[name, 'gap_seen']:.1%} of their distance is left)" for name in open_)
        lines.append(f"They are not after {left}.")
    concept = own["concept"].get(site)
    if concept:
        kept = sum(c <= least for c, least in zip(concept["correlations"], concept["chance"], strict=True) if least < 1)
        untested = any(least >= 1 for least in concept["chance"])
        if untested:
            lines.append("There are too few rows to tell the concept from chance, so all that correlates was erased.")
        elif kept:
            lines.append(
                f"{kept} of the concept's {len(concept['correlations'])} independent parts correlate with the states no more "
                "than chance would, and were left alone (tolerance=0 erases them)."
            )
    more = [f"{name} ({rows.loc[name, 'rank']:.0f})" for name in linear if rows.loc[name, "rank"] > needed]
    if more:
        lines.append(f"More was removed than the {needed} dimensions that guarding takes: by {', '.join(more)}.")
    again = [name for name in linear if rows.loc[name, "linear_fresh_low"] > own["chance"]]
    if again:
        found = ", ".join(f"{name} {rows.loc[name, 'linear_fresh']:.3f}" for name in again)
        lines.append(
            f"A linear probe that learns from rows which the eraser did not see finds the concept again ({found}; chance "
            f"{own['chance']:.3f}): the eraser was fitted to a sample."
        )
    if "mlp_low" in rows:
        deep = [f"{name} {rows.loc[name, 'mlp']:.3f}" for name in linear if rows.loc[name, "mlp_low"] > own["chance"]]
        lines.append(
            f"A network with one hidden layer still finds it after {', '.join(deep)}." if deep
            else "A network with one hidden layer finds no more than chance after any."
        )  # fmt: skip
    below = [  # neighbours drawn by lot have the class with p = Σ shares², and their commonest one no less often
        name
        for name in linear
        if rows.loc[name, "neighbours_seen_high"] < min(own["alike"], rows.loc["none", "neighbours_seen"])
    ]
    if below:
        lines.append(
            f"Neighbours in the rows of the fit point to the other class more often than chance after {', '.join(below)}: "
            "labels of these rows leak by being avoided (anti-clustering)."
        )
    return lines


def _number(x: float) -> str:
    return f"{x:.0f}" if x == int(x) and abs(x) >= 2 else f"{x:.3f}" if abs(x) >= 5e-4 or x == 0 else f"{x:.0e}"
