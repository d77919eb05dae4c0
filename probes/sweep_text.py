"""A sweep in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from workbench.results import wrapped

if TYPE_CHECKING:
    from probes.probe_sweep import ProbeSweep

SHOWN = 8
"""Sites in the printed table, spread evenly, the best one among them."""


def sweep_text(result: ProbeSweep) -> str:
    """What was asked, of which examples, the sites beside the controls, and in a sentence each what these say."""
    own, measure, best = result.settings, result.measure, result.best()
    kind = "held out by two columns" if own["held_out_columns"] > 1 else f"{own['folds']} folds of groups"
    size = f"{own['examples']:,} examples in {own['groups'][0]:,} groups"
    lines = [
        f"{own['dataset']} in {own['model']}: {size}, {own['probe']}, {kind}",
        _table(result).to_string(index=False, float_format=lambda x: f"{x:.3f}"),
        "Without the model's work:",
        result.references[[c for c in _columns(result) if c in result.references]]
        .rename(columns=_SHORT)
        .to_string(index=False, float_format=lambda x: f"{x:.3f}"),
    ]
    lines += [wrapped(line) for line in _said(result, best, measure)]
    return "\n".join([*lines, "  .table .references .predictions .best() .confusion() .probes[site] .plot() .save(folder)"])


_SHORT = {
    "accuracy_low": "from", "accuracy_high": "to", "r2_low": "from", "r2_high": "to", "information_bits": "bits known",
    "shuffled_accuracy": "shuffled", "shuffled_r2": "shuffled", "control_accuracy": "control", "control_r2": "control",
    "untrained_accuracy": "untrained", "untrained_r2": "untrained",
}  # fmt: skip


def _columns(result: ProbeSweep) -> list[str]:
    m = result.measure
    wanted = [
        "site", m, f"{m}_low", f"{m}_high", f"shuffled_{m}", f"control_{m}", "selectivity", f"untrained_{m}", "over_embeddings",
        "information_bits", "compression", "shuffled_compression", "median_km", "bits_saved",
    ]  # fmt: skip
    there = set(result.table.columns) | set(result.references.columns)
    return [column for column in wanted if column in there]


def _table(result: ProbeSweep) -> pd.DataFrame:
    n = len(result.table)
    at = sorted({round(i * (n - 1) / max(SHOWN - 1, 1)) for i in range(SHOWN)} | {int(result.table[result.measure].argmax())})
    shown = result.table.iloc[at if n > SHOWN else range(n)]
    return pd.DataFrame(shown[[c for c in _columns(result) if c in shown]].rename(columns=_SHORT))


def _said(result: ProbeSweep, best: pd.Series, measure: str) -> list[str]:
    own = result.settings
    width = f"{best[f'{measure}_low']:.3f} to {best[f'{measure}_high']:.3f}"
    lines = [f"Best at {best['site']}: {measure} {best[measure]:.3f} ({width})."]
    for column, beside, work in (
        ("over_untrained", "the untrained model", "training has put it there"),
        ("over_embeddings", "embeddings alone", "layers add to what the words say"),
    ):
        if column in best:
            clear = best[f"{column}_low"] > 0
            found = f"{best[column]:+.3f} ({best[f'{column}_low']:+.3f} to {best[f'{column}_high']:+.3f})"
            lines.append(f"Against {beside} it is {found}: {work if clear else 'no clear gain'}.")
    if "selectivity" in best:
        lines.append(
            f"Selectivity {best['selectivity']:+.3f}: {best[f'seen_{measure}']:.3f} on words it saw elsewhere, "
            f"{best[f'control_{measure}']:.3f} for random labels of the same words."
        )
    elif own["controls"]:
        lines.append("No control task: too few of the words asked about stand in more than one example.")
    if own.get("at_first_token"):
        at = f"{own['at_first_token']:.0%} of the examples are"
        lines.append(f"{at} read at the first token, whose state is like no other.")
    if own["more_columns_than_rows"]:
        lines.append(
            "There are more columns than examples: every probe that is not shrunk would fit them all. These are shrunk."
        )
    return lines
