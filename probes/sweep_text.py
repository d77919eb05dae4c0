"""A sweep in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    "seen_accuracy": "seen", "seen_r2": "seen", "untrained_accuracy": "untrained", "untrained_r2": "untrained",
}  # fmt: skip


def _columns(result: ProbeSweep) -> list[str]:
    m = result.measure
    wanted = [
        "site", m, f"{m}_low", f"{m}_high", f"shuffled_{m}", f"seen_{m}", f"control_{m}", "selectivity", f"untrained_{m}",
        "over_embeddings",         "information_bits", "compression", "shuffled_compression", "median_km", "bits_saved",
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
    chosen = own["best_beside"]
    if chosen["sites"] > 1 and "shuffled" in chosen:
        luck = f"{chosen['shuffled']:.3f} on average, {chosen['shuffled_most']:.3f} at most"
        lines.append(f"It was chosen among {chosen['sites']} sites; the best of these on shuffled labels reaches {luck}.")
    if "untrained_site" in chosen:
        beside = f"the untrained model at its own best site ({chosen['untrained_site']})"
        lines.append(_difference(beside, chosen, "over_untrained", "more than one random initialisation has"))
    elif own["controls"]:
        lines.append("No untrained model was run: these are rows at hand.")
    if "over_embeddings" in best:
        lines.append(_difference("the best of the embeddings", best, "over_embeddings", "layers add to what the words say"))
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
        lines.append("There are more columns than examples to learn from: a probe that is not shrunk would fit any labels.")
    return lines


def _difference(beside: str, row: Any, column: str, work: str) -> str:
    found = f"{row[column]:+.3f} ({row[f'{column}_low']:+.3f} to {row[f'{column}_high']:+.3f})"
    return f"Against {beside} it is {found}: {work if row[f'{column}_low'] > 0 else 'no clear gain'}."
