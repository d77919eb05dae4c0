"""Canonical correlations: what any linear map could carry, how many dimensions that is, and how much of it is chance.

Source: Szablewski and Masiak 2025 (arXiv 2508.17540), whose ceiling is Σᵢ ρᵢ² / d over the r largest correlations, and whose
size of the linear transport subspace is (Σρ)² / Σρ². Both are of the rows that were fitted: unrelated rows have a ceiling of
d / (n - 1) and a size of most of d. Here correlations are also measured on rows that the directions were not fitted on, and the
size counts those alone that are above every correlation of shuffled documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.moments.joint import Joint
from workbench.transports.solving import Spectrum


class Canonical(NamedTuple):
    """Pairs of directions, the most correlated first."""

    correlations: Float[Tensor, " k"]
    """On the rows of the fit, 0 to 1."""
    left: Float[Tensor, "dx k"]
    right: Float[Tensor, "dy k"]

    @classmethod
    def of(cls, joint: Joint, source: Spectrum, target: Spectrum) -> Canonical:
        """Hotelling 1936, by the singular values of the whitened products (Björck and Golub 1973), as eigenvalues of their
        square: half the time, and correlations below 1e-8 are as good as none.

        Args:
            source, target: Spectra by which x and y are whitened, of these rows (of other or shrunk ones the numbers are no
                correlations, but the directions are what they are); what they leave out counts as not varying.
        """
        white_x, white_y = (own.vectors * own.values**-0.5 for own in (source, target))
        crossed = white_x.T @ joint.xy @ white_y
        few = min(crossed.shape)
        squares, u = (found.flip(-1)[..., :few] for found in torch.linalg.eigh(crossed @ crossed.T))
        v = crossed.T @ u
        return cls(squares.clamp(0, 1).sqrt(), white_x @ u, white_y @ (v / v.norm(dim=0).clamp_min(1e-300)))

    def on(self, joint: Joint) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Correlations of the same directions on other rows, -1 to 1, and the squares of y along each. (Where y was whitened by
        its own rows all of these are equal; a direction that a single row made has none on others, however well it
        correlates.)"""
        x, y = (
            ((square @ side) * side).sum(0).clamp_min(1e-300)
            for square, side in ((joint.xx, self.left), (joint.yy, self.right))
        )
        return ((joint.xy @ self.right) * self.left).sum(0) / (x * y).sqrt(), y


def correlations(joint: Joint, source: Spectrum, target: Spectrum) -> Float[Tensor, " k"]:
    """Those of `Canonical.of`, without the directions."""
    crossed = (source.vectors.T @ joint.xy @ target.vectors) * source.values[:, None] ** -0.5 * target.values**-0.5
    crossed = crossed if crossed.shape[0] <= crossed.shape[1] else crossed.T
    return torch.linalg.eigvalsh(crossed @ crossed.T).flip(0).clamp(0, 1).sqrt()


def ceiling(found: Float[Tensor, " k"], squares: Float[Tensor, " k"] | float) -> Float[Tensor, " ranks"]:
    """What slopes that are not negative can explain at most along 0, 1, … directions of these correlations.

    Args:
        squares: Of y along each.
    """
    explained = found.clamp_min(0).square() * squares
    return torch.cat([explained.new_zeros(1), explained.cumsum(0)])


def participation(found: Float[Tensor, " k"]) -> float:
    """(Σρ)² / Σρ²: how many dimensions, were all of them carried alike; 0 for none."""
    own = found.clamp_min(0)
    squares = float(own.square().sum())
    return float(own.sum()) ** 2 / squares if squares else 0.0
