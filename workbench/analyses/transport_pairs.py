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
    white, width = Metric.whitening(spectra[1]).root, len(joint.mean_y)
    row: dict[str, Any] = {
        "n": joint.n, "in_sample": inside.r2(), "adjusted": adjusted(inside.r2(), joint.n, fitted.freedom),
        "held_out": real.prediction.r2(), "whitened_in_sample": inside.r2(white),
        "whitened_held_out": real.prediction.r2(white),
    }  # fmt: skip
    row |= {name: real.prediction.r2(metric.root) for name, metric in weights.items()}
    own = correlations(joint, *spectra)
    outside, shares = canonical_outside(fitting, pair, real)
    row |= {
        "ceiling_in_sample": float(ceiling(own, 1 / width)[-1]), "ceiling": float(ceiling(outside, shares)[-1]),
        "size_published": participation(own),
    }  # fmt: skip
    row["efficiency"] = row["whitened_held_out"] / row["ceiling"] if row["ceiling"] else float("nan")
    if null is not None:
        row |= {"null": null.prediction.r2(), "whitened_null": null.prediction.r2(white)}
        row |= {f"{name}_null": null.prediction.r2(metric.root) for name, metric in weights.items()}
        shuffled = correlations(fitting.joint(pair, shuffled=True), *spectra)
        edge = float(canonical_outside(fitting, pair, real, null)[0].max())
        row |= {
            "size_null": participation(shuffled), "size": participation(outside[outside > edge]),
            "correlations_above_null": int((outside > edge).sum()), "null_edge": edge,
        }  # fmt: skip
    return row | {
        "kept_source": len(spectra[0].values), "kept_target": len(spectra[1].values), "freedom": fitted.freedom,
        "strength": fitted.strength,
    }  # fmt: skip


def canonical_outside(fitting: Fitting, pair: Pair, real: HeldOut, null: HeldOut | None = None) -> tuple[Tensor, Tensor]:
    """Canonical correlations on rows that their directions were not fitted on, and shares of y's whitened squares there: means
    over folds, in the order of the fits.

    x is shrunk by the map's own strength: its predictions then lie along these very directions, and no slopes along them could
    explain more. y is whitened by all rows, as for every whitened score.

    Args:
        null: Take these rows, with the strengths of the real ones.
    """
    found = []
    for one, rows in zip(real.splits, (null or real).splits, strict=True):
        others = [other for other in fitting.folds if other != one.fold]
        source = fitting.spectrum(pair.source, others).shrunk(one.fitted.strength)
        found.append(Canonical.of(rows.inside, source, fitting.spectrum(pair.target)).on(rows.outside))
    shortest = min(len(one) for one, _ in found)
    outside, shares = (torch.stack([one[i][:shortest] for one in found]).mean(0) for i in (0, 1))
    return outside, shares


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
        "ceiling_in_sample": ceiling(own, 1 / width), "ceiling": ceiling(*canonical_outside(fitting, pair, real))
    }  # fmt: skip
    for name, metric in metrics.items():
        for way in ("published", "best"):
            scores = {"held_out": _scores(real, metric, way)}
            if null is not None:
                scores["null"] = _scores(null, metric, way)
            if name == "whitened":
                best = scores["held_out"][: len(ceilings["ceiling"])]
                scores |= ceilings | {
                    "efficiency": best / ceilings["ceiling"][: len(best)],
                    "efficiency_published": best / ceilings["ceiling_in_sample"][: len(best)],
                }  # fmt: skip
            for rank in grid:
                yield {"metric": name, "truncation": way, "rank": rank} | {
                    column: float(values[min(rank, len(values) - 1)]) for column, values in scores.items()
                }


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
