"""How much of a target's state a linear map of its source carries, for one pair: scores, ceilings and curves over ranks.

Sources: Szablewski and Masiak 2025 (arXiv 2508.17540) for efficiency, ceiling and size. We differ from their release in this:
their map is truncated by its own singular vectors and then scored with the target whitened, where another truncation is the
best (on a purely linear net theirs scores -9 to -32 at low ranks, where 1 can be had); their ceiling is in sample and their
score held out. Here each metric has its own best truncation beside theirs, and both ceilings are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from workbench.moments.joint import Joint
from workbench.moments.layout import Pair
from workbench.transports.canonical import Canonical, ceiling, correlations, participation
from workbench.transports.fit import Fitted, Fitting, Recipe
from workbench.transports.prediction import Prediction, errors_by_rank
from workbench.transports.scoring import adjusted
from workbench.transports.solving import Metric, best_projections, singular_projections

Way = Literal["published", "best"]
LEAST = 0.01
"""A ceiling below which nothing is divided by it."""
RANKS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""That a curve shows, as far as there are any, and the full one."""


class Split(NamedTuple):
    """A map that was fitted without one fold, and that fold."""

    fold: int
    fitted: Fitted
    inside: Joint
    outside: Joint


class HeldOut(NamedTuple):
    """Every fold predicted by the map of all others."""

    prediction: Prediction
    splits: list[Split]


def held_out(fitting: Fitting, recipe: Recipe, pair: Pair, *, shuffled: bool = False) -> HeldOut:
    """
    Raises:
        TooFewTokens: as `Recipe.fit`.
    """
    splits: list[Split] = []
    for fold in fitting.folds:
        others = [other for other in fitting.folds if other != fold]
        fitted = fitting.fit(recipe, pair, others, shuffled=shuffled)
        splits.append(
            Split(fold, fitted, fitting.joint(pair, others, shuffled=shuffled), fitting.joint(pair, [fold], shuffled=shuffled))
        )
    predictions = [Prediction.of(one.outside, one.fitted.matrix, one.fitted.bias) for one in splits]
    total = predictions[0]
    for one in predictions[1:]:
        total = total.plus(one)
    return HeldOut(total, splits)


def pair_row(
    fitting: Fitting, recipe: Recipe, pair: Pair, real: HeldOut, null: HeldOut | None, weights: Mapping[str, Metric]
) -> dict[str, Any]:
    """Scores of one pair.

    Args:
        weights: Further metrics of the target, by name.
    """
    joint, fitted = fitting.joint(pair), fitting.fit(recipe, pair)
    inside = Prediction.of(joint, fitted.matrix, fitted.bias)
    spectra = fitting.spectrum(pair.source), fitting.spectrum(pair.target)
    white = Metric.whitening(spectra[1]).root
    row: dict[str, Any] = {
        "n": joint.n, "in_sample": inside.r2(), "adjusted": adjusted(inside.r2(), joint.n, fitted.freedom),
        "held_out": real.prediction.r2(), "whitened_in_sample": inside.r2(white),
        "whitened_held_out": real.prediction.r2(white),
    }  # fmt: skip
    row |= {name: real.prediction.r2(metric.root) for name, metric in weights.items()}
    own, outside = correlations(joint, *spectra), canonical_outside(fitting, pair, real)
    row |= {
        "ceiling_in_sample": float(ceiling(own, 1 / len(spectra[1].values))[-1]), "ceiling": float(outside.ceiling[-1]),
        "efficiency": _efficiency(row["whitened_held_out"], float(outside.ceiling[-1])), "size_published": participation(own),
    }  # fmt: skip
    if null is not None:
        row |= {"null": null.prediction.r2(), "whitened_null": null.prediction.r2(white)}
        row |= {f"{name}_null": null.prediction.r2(metric.root) for name, metric in weights.items()}
        shuffled = correlations(fitting.joint(pair, shuffled=True), *spectra)
        edge = float(canonical_outside(fitting, pair, real, null).correlations.max())
        above = outside.correlations[outside.correlations > edge]
        row |= {
            "size_null": participation(shuffled), "size": participation(above), "correlations_above_null": len(above),
            "null_edge": edge,
        }  # fmt: skip
    return row | {
        "kept_source": len(spectra[0].values), "kept_target": len(spectra[1].values), "freedom": fitted.freedom,
        "strength": fitted.strength,
    }  # fmt: skip


class Outside(NamedTuple):
    """Of canonical directions on rows that they were not fitted on."""

    correlations: Tensor
    """Mean over folds, in the order of the fits."""
    ceiling: Tensor
    """By rank, the share of the target's whitened squares that slopes along them can explain at most."""


def canonical_outside(fitting: Fitting, pair: Pair, real: HeldOut, null: HeldOut | None = None) -> Outside:
    """x is shrunk by the map's own strength: the map's predictions then lie along these very directions, with slopes that are
    not negative, so that the ceiling is the map's. y is whitened by all rows, as for every whitened score.

    Args:
        null: Take these rows, with the strengths of the real ones.
    """
    target, found, total = fitting.spectrum(pair.target), [], 0.0
    root = Metric.whitening(target).root
    for one, rows in zip(real.splits, (null or real).splits, strict=True):
        others = [other for other in fitting.folds if other != one.fold]
        source = fitting.spectrum(pair.source, others).shrunk(one.fitted.strength)
        found.append(Canonical.of(rows.inside, source, target).on(rows.outside))
        total += float((root * (rows.outside.yy @ root)).sum())
    shortest = min(len(one) for one, _ in found)
    ceilings = torch.stack([ceiling(*one)[: shortest + 1] for one in found]).sum(0) / total
    return Outside(torch.stack([one[:shortest] for one, _ in found]).mean(0), ceilings)


def _efficiency(score: float, most: float) -> float:
    return score / most if most >= LEAST else float("nan")


def curve_rows(
    fitting: Fitting, pair: Pair, real: HeldOut, null: HeldOut | None, weights: Mapping[str, Metric]
) -> Iterator[dict[str, Any]]:
    """R² of the map at some ranks, by metric and by how it is truncated: `published` (its own singular vectors), `best` (for
    the metric). With the whitened metric go the ceiling, on the rows of the fit and on others, and the efficiency: what the map
    has of either; that of the ceiling in sample is the published one."""
    width = len(real.splits[0].fitted.bias)
    whitening = Metric.whitening(fitting.spectrum(pair.target))
    metrics: dict[str, Metric | None] = {"frobenius": None, "whitened": whitening, **weights}
    grid = [rank for rank in RANKS if rank < width] + [width]
    own = correlations(fitting.joint(pair), fitting.spectrum(pair.source), fitting.spectrum(pair.target))
    ceilings = {
        "ceiling_in_sample": ceiling(own, 1 / len(fitting.spectrum(pair.target).values)),
        "ceiling": canonical_outside(fitting, pair, real).ceiling,
    }  # fmt: skip
    for name, metric in metrics.items():
        for way in ("published", "best"):
            scores = {"held_out": _scores(real, metric, way)}
            if null is not None:
                scores["null"] = _scores(null, metric, way)
            if name == "whitened":
                scores |= ceilings
            for rank in grid:
                row = {column: float(values[min(rank, len(values) - 1)]) for column, values in scores.items()}
                if name == "whitened":
                    row["efficiency"] = _efficiency(row["held_out"], row["ceiling"])
                    row["efficiency_published"] = _efficiency(row["held_out"], row["ceiling_in_sample"])
                yield {"metric": name, "truncation": way, "rank": rank} | row


def _scores(held: HeldOut, metric: Metric | None, way: Way) -> Tensor:
    """Held-out R² of every rank."""
    errors, total = [], 0.0
    for one in held.splits:
        fitted, inside, outside = one.fitted, one.inside, one.outside
        matrix, root = fitted.matrix, None if metric is None else metric.root
        projections = singular_projections(matrix) if way == "published" else best_projections(matrix, inside, metric)
        errors.append(errors_by_rank(outside.about(inside.mean_x, inside.mean_y), matrix, projections, root))
        total += float(outside.yy.trace() if root is None else (root * (outside.yy @ root)).sum())
    shortest = min(map(len, errors))
    return 1 - torch.stack([one[:shortest] for one in errors]).sum(0) / total
