"""What a map predicts beside what is there, on rows that it was not fitted on: every score of every direction follows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.moments.joint import Joint
from workbench.transports.solving import Projections


class Along(NamedTuple):
    """Sums over tokens of what stands along some directions, one entry a direction: of the target a and its prediction â."""

    n: Tensor
    target: Tensor
    """Of (a - mean)²."""
    predicted: Tensor
    """Of (â - mean)²."""
    crossed: Tensor
    error: Tensor
    """Of (a - â)²: a wrong mean counts."""

    @classmethod
    def of_sums(cls, sums: Float[Tensor, "folds *batch six"]) -> Along:
        """From sums over the tokens of each fold, of 1, a, â, a², â², aâ; means are those of the fold, as in a `Prediction`."""
        n, a, b, aa, bb, ab = sums.double().unbind(-1)
        some = n.clamp_min(1)
        by_fold = (n, aa - a * a / some, bb - b * b / some, ab - a * b / some, aa - 2 * ab + bb)
        return cls(*(one.sum(0) for one in by_fold))

    @property
    def r2(self) -> Tensor:
        """Share of the target's squares about its mean that the prediction explains; nan where it does not vary."""
        return 1 - self.error / _varying(self.target)

    @property
    def correlation(self) -> Tensor:
        """Pearson's."""
        return self.crossed / _varying(self.target * self.predicted).sqrt()

    @property
    def slope(self) -> Tensor:
        """Of the target on its prediction: below 1 the prediction goes too far."""
        return self.crossed / _varying(self.predicted)

    @property
    def rms_ratio(self) -> Tensor:
        """How much the prediction varies, relative to the target."""
        return (self.predicted / _varying(self.target)).sqrt()


class Prediction(NamedTuple):
    """Sums of products of predictions ŷ and targets y over held-out rows, about the means of each fold; they add over folds."""

    n: int
    pp: Float[Tensor, "dy dy"]
    py: Float[Tensor, "dy dy"]
    yy: Float[Tensor, "dy dy"]
    error: Float[Tensor, "dy dy"]
    """Of (y - ŷ)(y - ŷ)ᵀ: a wrong mean counts."""

    @classmethod
    def of(cls, joint: Joint, matrix: Float[Tensor, "dx dy"], bias: Float[Tensor, " dy"]) -> Prediction:
        """What x T + b predicts of the rows of a joint."""
        n, mean, mean_y, pp, py, yy = joint.mapped(matrix, bias)
        missed = mean_y - mean
        return cls(n, pp, py, yy, yy - py - py.T + pp + n * torch.outer(missed, missed))

    def plus(self, other: Prediction) -> Prediction:
        added: Any = (a + b for a, b in zip(self, other, strict=True))
        return Prediction(*added)

    def r2(self, root: Float[Tensor, "dy k"] | None = None) -> float:
        """Share of squares explained, measured by root rootᵀ; plainly (`frobenius`), if None."""
        if root is None:
            error, total = float(self.error.trace()), float(self.yy.trace())
        else:
            error, total = (float((root * (square @ root)).sum()) for square in (self.error, self.yy))
        return 1 - error / total if total else float("nan")

    def along(self, directions: Float[Tensor, "f dy"]) -> Along:
        """Of each direction by itself."""
        rows = directions.to(self.yy)
        target, predicted, crossed, error = (
            ((rows @ square) * rows).sum(1).clamp_min(0 if square is not self.py else -torch.inf)
            for square in (self.yy, self.pp, self.py, self.error)
        )
        return Along(torch.full_like(target, self.n), target, predicted, crossed, error)


def errors_by_rank(
    joint: Joint,
    matrix: Float[Tensor, "dx dy"],
    projections: Projections,
    root: Float[Tensor, "dy m"] | None = None,
) -> Float[Tensor, " ranks"]:
    """Squared errors of a map of every rank from 0 up, measured by root rootᵀ (plainly, if None).

    Args:
        joint: Of the rows to predict, `about` the means of those that the map was fitted on: an error of the mean is an error.
    """
    predicted, crossed = matrix.T @ joint.xx @ matrix, matrix.T @ joint.xy
    outof, into = projections
    onto = into if root is None else into @ root
    gained = 2 * ((outof.T @ crossed) * (into if root is None else onto @ root.T)).sum(1).cumsum(0)
    within = (outof.T @ predicted @ outof) * (onto @ onto.T)
    spent = within.cumsum(0).cumsum(1).diagonal()
    total = float(joint.yy.trace() if root is None else (root * (joint.yy @ root)).sum())
    return torch.cat([gained.new_tensor([total]), total - gained + spent])


def _varying(squares: Tensor) -> Tensor:
    """nan in place of nothing: a score of what does not vary is none."""
    return torch.where(squares > 0, squares, torch.nan)
