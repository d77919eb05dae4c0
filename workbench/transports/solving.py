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


def truncated(
    matrix: Float[Tensor, "dx dy"], joint: Joint, rank: int, how: Truncation, target: Spectrum | None = None
) -> tuple[Float[Tensor, "dx r"], Float[Tensor, "r dy"]]:
    """Factors of a map of lower rank.

    `rrr`: the outputs are projected onto the directions of y in which the map explains most of its variance: of least squares
    the principal directions of the fitted values (reduced-rank regression; Izenman 1975). `cca`: the same with y whitened, so
    that of least squares the canonical correlations are kept, largest first. `svd`: the matrix's own singular vectors, which
    know nothing of how x is spread: in variance never better than `rrr`, as it projects the outputs too; it is here because
    published work does it.

    Args:
        target: The spectrum of y, for `cca`.
    Raises:
        UnknownOption: for a rank that the matrix cannot have.
    """
    require_one_of("truncation", how, ("rrr", "cca", "svd"))
    if not 0 <= rank <= min(matrix.shape):
        raise UnknownOption(f"rank={rank} is out of range: this map has 0 to {min(matrix.shape)}.")
    if how == "svd":
        u, sizes, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank] * sizes[:rank], vt[:rank]
    if how == "rrr":
        directions = _most_explained(matrix, joint.xx, joint.xy)[:, :rank]
        return matrix @ directions, directions.T
    target = Spectrum.of(joint.yy) if target is None else target
    whitened = matrix @ target.power(-0.5)
    directions = _most_explained(whitened, joint.xx, joint.xy @ target.power(-0.5))[:, :rank]
    return whitened @ directions, directions.T @ target.power(0.5)


def _most_explained(matrix: Tensor, xx: Tensor, xy: Tensor) -> Tensor:
    """Directions of y, as columns: projected onto v, the map explains vᵀ (Tᵀxy + yxT - TᵀxxT) v of its squares. (Where T is
    least squares, all three are the fitted values'.)"""
    crossed = matrix.T @ xy
    gained = crossed + crossed.T - matrix.T @ xx @ matrix
    return torch.linalg.eigh((gained + gained.T) / 2)[1].flip(1)
