"""Linear maps in closed form, from second moments alone.

Rows are read left to right, y ≈ x T + b. All maps of a source come from one eigendecomposition of its moments, xx = V Λ Vᵀ:
with M = Vᵀ xy, ridge is T = V (Λ + α)⁻¹ M, its training residual tr(yy) - Σᵢ ‖Mᵢ‖² (λᵢ + 2α) / (λᵢ + α)², and its degrees of
freedom Σᵢ λᵢ / (λᵢ + α). α is in the units of scikit-learn's `Ridge`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UnknownOption, require_one_of
from workbench.moments.joint import Joint

Truncation = Literal["rrr", "cca", "svd"]
STRENGTHS = tuple(10.0**exponent for exponent in range(-10, 3))
"""Ridge strengths that are tried, in units of the mean variance of a coordinate of x times n: tr(xx) / d."""


class Spectrum(NamedTuple):
    """Eigenvalues, falling, and eigenvectors (columns) of a source's centred sums of products; what is zero within float64, or
    within the precision of the sums, is left out."""

    values: Float[Tensor, " rank"]
    vectors: Float[Tensor, "d rank"]
    width: int

    @classmethod
    def of(cls, xx: Float[Tensor, "d d"], noise: float = 0.0) -> Spectrum:
        """
        Args:
            noise: What the sums themselves may be wrong by; eigenvalues below it are taken for zero.
        """
        values, vectors = torch.linalg.eigh((xx + xx.T) / 2)
        kept = values > max(float(values[-1]) * len(values) * torch.finfo(torch.float64).eps, noise)
        return cls(values[kept].flip(0), vectors[:, kept].flip(1), len(values))

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue kept."""
        return float(self.values[0] / self.values[-1]) if len(self.values) else float("nan")

    def freedom(self, strength: float) -> float:
        """Degrees of freedom that ridge of this strength spends on each coordinate of the target."""
        return float((self.values / (self.values + strength)).sum())

    def shrunk(self, strength: float) -> Spectrum:
        """Of xx + strength · 1, on what it spans."""
        return self._replace(values=self.values + strength)

    def power(self, exponent: float) -> Float[Tensor, "d d"]:
        """The symmetric matrix to that power, on what it spans."""
        return (self.vectors * self.values**exponent) @ self.vectors.T


def least_squares(spectrum: Spectrum, xy: Float[Tensor, "dx dy"], strength: float = 0.0) -> Float[Tensor, "dx dy"]:
    """The matrix of ridge regression; of least squares (of minimal norm), where the strength is 0."""
    return spectrum.vectors @ ((spectrum.vectors.T @ xy) / (spectrum.values + strength)[:, None])


def chosen_strength(spectrum: Spectrum, joint: Joint) -> float:
    """The strength of `STRENGTHS` with the least generalised cross-validation (Golub, Heath and Wahba 1979): the training
    residual over (1 - (freedom + 1) / n)². It needs the training rows alone, and no fold of them: their sums suffice. Strengths
    that leave less than a hundredth of the rows to judge by are not considered: their residual is rounding."""
    unit = float(joint.xx.trace()) / spectrum.width
    values, by_row = spectrum.values, (spectrum.vectors.T @ joint.xy).square().sum(1)
    never = max(joint.total - float((by_row / values).sum()), 0.0)  # what no strength explains
    best, found = float("inf"), STRENGTHS[-1] * unit
    for relative in STRENGTHS:
        strength = relative * unit
        residual = never + float((by_row * strength**2 / (values * (values + strength) ** 2)).sum())
        left = 1 - (spectrum.freedom(strength) + 1) / joint.n
        if left > 0.01 and residual / left**2 < best:
            best, found = residual / left**2, strength
    return found


def rotation(joint: Joint, *, scaled: bool) -> Float[Tensor, "dx dy"]:
    """The orthogonal matrix that brings x closest to y (Schönemann 1966), times the best factor if scaled."""
    u, sizes, vt = torch.linalg.svd(joint.xy, full_matrices=False)
    return u @ vt * (float(sizes.sum() / joint.xx.trace()) if scaled else 1.0)


class Metric(NamedTuple):
    """How differences of y are measured: W = root rootᵀ, and the way back, root inverse = 1 on what W spans."""

    root: Float[Tensor, "dy k"]
    inverse: Float[Tensor, "k dy"]

    @classmethod
    def whitening(cls, target: Spectrum) -> Metric:
        """In which every direction of y varies alike: the inverse of its sums of products."""
        return cls(target.vectors * target.values**-0.5, (target.vectors * target.values**0.5).T)

    @classmethod
    def of(cls, square: Float[Tensor, "dy dy"]) -> Metric:
        """W itself, symmetric and not negative."""
        own = Spectrum.of(square)
        return cls(own.vectors * own.values**0.5, (own.vectors * own.values**-0.5).T)


class Projections(NamedTuple):
    """A map T of every rank r at once: T outof[:, :r] into[:r]."""

    outof: Float[Tensor, "dy k"]
    into: Float[Tensor, "k dy"]


def best_projections(matrix: Float[Tensor, "dx dy"], joint: Joint, metric: Metric | None = None) -> Projections:
    """Of least squares those of every rank that leave the smallest error in a metric: the principal directions of the
    fitted values there (reduced-rank regression; Izenman 1975). With y whitened the canonical correlations are kept, largest
    first.

    Args:
        metric: The plain one, if None.
    """
    if metric is None:
        directions = _most_explained(matrix, joint.xx, joint.xy)
        return Projections(directions, directions.T)
    directions = _most_explained(matrix @ metric.root, joint.xx, joint.xy @ metric.root)
    return Projections(metric.root @ directions, directions.T @ metric.inverse)


def singular_projections(matrix: Float[Tensor, "dx dy"]) -> Projections:
    """The matrix's own singular vectors, which know nothing of how x is spread: in variance never better than the best, as they
    project the outputs too. They are here because published work takes them."""
    vectors = torch.linalg.svd(matrix, full_matrices=False)[2]
    return Projections(vectors.T, vectors)


def truncated(
    matrix: Float[Tensor, "dx dy"], joint: Joint, rank: int, how: Truncation, target: Spectrum | None = None
) -> tuple[Float[Tensor, "dx r"], Float[Tensor, "r dy"]]:
    """Factors of a map of lower rank: `rrr`, the best in plain squares; `cca`, the best with y whitened; `svd`, the matrix's
    own singular vectors.

    Args:
        target: The spectrum of y, for `cca`.
    Raises:
        UnknownOption: for a rank that the matrix cannot have.
    """
    require_one_of("truncation", how, ("rrr", "cca", "svd"))
    if not 0 <= rank <= min(matrix.shape):
        raise UnknownOption(f"rank={rank} is out of range: this map has 0 to {min(matrix.shape)}.")
    if how == "svd":
        found = singular_projections(matrix)
    else:
        metric = Metric.whitening(Spectrum.of(joint.yy) if target is None else target) if how == "cca" else None
        found = best_projections(matrix, joint, metric)
    return matrix @ found.outof[:, :rank], found.into[:rank]


def _most_explained(matrix: Tensor, xx: Tensor, xy: Tensor) -> Tensor:
    """Directions of y, as columns: projected onto v, the map explains vᵀ (Tᵀxy + yxT - TᵀxxT) v of its squares. (Where T is
    least squares, all three are the fitted values'.)"""
    crossed = matrix.T @ xy
    gained = crossed + crossed.T - matrix.T @ xx @ matrix
    return torch.linalg.eigh((gained + gained.T) / 2)[1].flip(1)
