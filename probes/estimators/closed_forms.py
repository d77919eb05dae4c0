"""What closed forms of probes share: moments by fold, within-class sums, ridge, and which strength predicts best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workbench.errors import TooFewExamples
from workbench.moments.joint import Joint


def joints(rows: Tensor, y: Tensor, fold: np.ndarray) -> list[Joint]:
    """Moments of each fold's rows."""
    parts = [torch.as_tensor(np.flatnonzero(fold == i), device=rows.device) for i in range(int(fold.max()) + 1)]
    if len(parts) == 1:
        return [Joint.of(rows, y, products=rows.dtype)]
    return [Joint.of(rows[part], y[part], products=rows.dtype) for part in parts]


def plus(parts: Sequence[Joint]) -> Joint:
    """Of the rows of all."""
    total = parts[0]
    for part in parts[1:]:
        total = total.plus(part)
    return total


def spread_of(total: Joint, *, standardize: bool) -> Tensor:
    """What columns are divided by: their spread, 1 where that is 0, or 1 everywhere."""
    if not standardize:
        return torch.ones_like(total.mean_x)
    variance = total.xx.diagonal().clamp_min(0) / total.n
    constant = variance <= (1e-6 * total.mean_x).square() * 1e-2
    return torch.where(constant, 1.0, variance.sqrt())


def within_class(total: Joint, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Of scaled rows: sums of products about the class means `[d, d]`, and the class means less the mean, `[d, classes]`."""
    counts = total.n * total.mean_y
    means = total.xy / spread[:, None] / counts
    scaled = total.xx / spread / spread[:, None]
    return scaled - (means * counts) @ means.T, means


def ridge(total: Joint, spread: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Weights `[d, targets]` of unscaled rows, and the targets' means."""
    scaled = total.xx / spread / spread[:, None]
    scaled.diagonal().add_(alpha)
    return solved(scaled, total.xy / spread[:, None], total.n) / spread[:, None], total.mean_y


def solved(matrix: Tensor, right: Tensor, n: int) -> Tensor:
    """
    Raises:
        TooFewExamples: if the matrix is singular.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    floor = torch.finfo(torch.float64).eps * len(matrix) * matrix.diagonal().max()
    if bool(failed) or bool(factor.diagonal().square().min() <= floor):
        raise TooFewExamples(
            f"{n} rows of {len(matrix)} columns do not determine a covariance that can be inverted. Shrink it (a strength "
            "above 0, or 'cv'), give more rows, or take out constant columns."
        )
    return torch.cholesky_solve(right, factor)


def best_strength(folds: Sequence[Joint], strengths: Sequence[float], *, standardize: bool) -> int:
    """Which ridge strength has the least squared error on folds held out in turn, relative to each target's own variance.

    Args:
        strengths: Of all rows together; with a fold left out, they are taken down by its share.
    Raises:
        TooFewExamples: if there is one fold.
    """
    if len(folds) < 2:
        raise TooFewExamples("A strength is chosen by folds held out. Give moments of two or more folds, or a number.")
    total = plus(folds)
    errors = torch.zeros(len(strengths), dtype=torch.float64, device=total.xx.device)
    for i, out in enumerate(folds):
        train = plus([fold for j, fold in enumerate(folds) if j != i])
        spread = spread_of(train, standardize=standardize)
        values, vectors = torch.linalg.eigh(train.xx / spread / spread[:, None])
        turned = vectors.T @ (train.xy / spread[:, None])
        about = out.about(train.mean_x, train.mean_y)
        for s, strength in enumerate(strengths):
            weight = (vectors @ (turned / (values.clamp_min(0) + strength * train.n / total.n)[:, None])) / spread[:, None]
            squares = about.yy.diagonal() - 2 * (weight * about.xy).sum(0) + (weight * (about.xx @ weight)).sum(0)
            errors[s] += (squares / total.yy.diagonal().clamp_min(1e-300)).sum()
    return int(errors.argmin())
