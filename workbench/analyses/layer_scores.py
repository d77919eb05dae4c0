"""Scores of one layer from its moments: every part, kind of tokens and target, beside their nulls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from workbench.analyses.layer_moments import LayerMoments, LayerSites, Part, Turning
from workbench.moments.joint import Joint
from workbench.moments.layout import Pair
from workbench.moments.moments import Moments, Strata
from workbench.transports.fit import Recipe
from workbench.transports.scoring import Explained, adjusted, explained, explained_in_sample
from workbench.transports.solving import Spectrum, chosen_strength

if TYPE_CHECKING:
    import pandas as pd

SHOWN: tuple[Strata, ...] = ("all", "ordinary")


def with_sinks(table: pd.DataFrame) -> pd.DataFrame:
    """The share of the target's squares, about their mean, that ordinary tokens alone do not have."""
    keys = ["layer", "part", "residual"]
    squares = (table["variance"] * table["n"]).groupby([table[key] for key in keys])
    whole, ordinary = (squares.transform(way) for way in ("first", "last"))  # `all` stands before `ordinary`
    return table.assign(sinks=(1 - ordinary / whole).where(table["strata"] == "all"))


def layer_rows(
    moments: Moments, sites: LayerSites, layer: int, recipe: Recipe, parts: Sequence[Part], turning: Turning
) -> list[dict[str, Any]]:
    """Rows of `Linearity.table` for a layer."""
    rows = []
    null = moments.has_null(Pair(sites.x, sites.a))
    for strata in SHOWN:
        folds = [LayerMoments(moments, sites, strata, folds) for folds in (None, [0], [1])]
        for part in parts:
            spectra = [one.spectrum(part) for one in folds]
            cosine, growth = turning.of(layer, part, strata)
            for residual in (True, False):
                joints = [one.joint(part, residual=residual) for one in folds]
                inside, outside, freedom = _scores(joints, spectra, recipe)
                whole = joints[0]
                row = {
                    "layer": layer, "part": part, "strata": strata, "residual": residual, "n": whole.n,
                    "in_sample": inside.frobenius, "adjusted": adjusted(inside.frobenius, whole.n, freedom),
                    "held_out": outside.frobenius, "uniform_held_out": outside.uniform, "variance": whole.total / whole.n,
                }  # fmt: skip
                adds, everything = sites.adds(part), (*sites.reads(part), *sites.adds(part))
                for name, elsewhere in (("null", everything), ("unrelated", adds)) if null else ():
                    if name == "null" or residual:
                        moved = [one.joint(part, residual=residual, elsewhere=elsewhere) for one in folds]
                        inside, outside, _ = _scores(moved, spectra, recipe)
                        row |= {f"{name}_in_sample": inside.frobenius, f"{name}_held_out": outside.frobenius}
                sizes = torch.linalg.svdvals(whole.xy)
                row |= {
                    "procrustes": float(sizes.sum() ** 2 / (whole.xx.trace() * whole.yy.trace())),
                    "cosine": cosine, "growth": growth, "condition": spectra[0].condition,
                }  # fmt: skip
                rows.append(row)
    return rows


def _scores(joints: list[Joint], spectra: list[Spectrum], recipe: Recipe) -> tuple[Explained, Explained, float]:
    """In sample, held out (each fold by the map of the other), and the degrees of freedom spent.

    Args:
        joints: Of all tokens, of the first fold, of the second.
    """
    whole, spectrum = joints[0], spectra[0]
    strength = chosen_strength(spectrum, whole) if recipe.kind == "ridge" else 0.0
    first, second = (recipe.fit(joint, own) for joint, own in zip(joints[1:], spectra[1:], strict=True))
    outside = explained(joints[2], first.matrix, first.bias).plus(explained(joints[1], second.matrix, second.bias))
    return explained_in_sample(whole, spectrum, strength), outside, spectrum.freedom(strength)
