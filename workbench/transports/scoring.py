"""How well a linear map predicts, from second moments: four numbers that are all called R², each by its own name.

`frobenius` weights coordinates by their variance (Razzhigaev et al. 2024, arXiv 2405.12250), `uniform` counts them alike
(scikit-learn's default; Yom Din et al. 2024, arXiv 2303.09435), `whitened` counts canonical directions of the target alike
(Szablewski and Masiak 2025, arXiv 2508.17540). The fourth, of single directions, is a matter of transport operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.moments.joint import Joint
from workbench.transports.solving import Spectrum


class Explained(NamedTuple):
    """Squared errors and squared deviations from the mean; pooled over folds by adding."""

    error: float
    total: float
    error_by_coordinate: Float[Tensor, " dy"]
    total_by_coordinate: Float[Tensor, " dy"]
    whitened_error: float
    """Squared errors, and squared deviations, added over the target's whitened directions."""
    whitened_total: float

    @property
    def frobenius(self) -> float:
        return 1 - self.error / self.total if self.total else float("nan")

    @property
    def uniform(self) -> float:
        """Mean over the coordinates that vary."""
        varying = self.total_by_coordinate > 0
        found = 1 - self.error_by_coordinate[varying] / self.total_by_coordinate[varying]
        return float(found.mean()) if varying.any() else float("nan")

    @property
    def whitened(self) -> float:
        return 1 - self.whitened_error / self.whitened_total if self.whitened_total else float("nan")

    def plus(self, other: Explained) -> Explained:
        added: Any = (a + b for a, b in zip(self, other, strict=True))
        return Explained(*added)


def explained(
    joint: Joint, matrix: Float[Tensor, "dx dy"], bias: Float[Tensor, " dy"], target: Spectrum | None = None
) -> Explained:
    """Of x T + b, on rows of which these are the moments: those the map was fitted on, or others.

    Args:
        target: The spectrum of y over all tokens, for the whitened number; without it that is nan. (Whitened by the spectrum
            of few held-out tokens alone, the noise of these would count as error.)
    """
    missed = joint.mean_y - joint.mean_x @ matrix - bias
    onto = joint.xx @ matrix
    own = joint.yy.diagonal() - 2 * (matrix * joint.xy).sum(0) + (matrix * onto).sum(0) + joint.n * missed.square()
    whitened = whitened_total = 0.0
    if target is not None:
        crossed = matrix.T @ joint.xy
        error = joint.yy - crossed - crossed.T + matrix.T @ onto + joint.n * torch.outer(missed, missed)
        onto_unit = target.vectors.T / target.values[:, None]
        whitened = float(((target.vectors.T @ error) * onto_unit).sum())
        whitened_total = float(((target.vectors.T @ joint.yy) * onto_unit).sum())
    own = own.clamp_min(0)
    return Explained(float(own.sum()), joint.total, own, joint.yy.diagonal().clamp_min(0), whitened, whitened_total)


def explained_in_sample(joint: Joint, spectrum: Spectrum, strength: float) -> Explained:
    """Of the ridge (or least-squares) map of these very moments, with an intercept, without making it; not whitened."""
    share = (spectrum.values + 2 * strength) / (spectrum.values + strength) ** 2
    own = joint.yy.diagonal() - ((spectrum.vectors.T @ joint.xy).square() * share[:, None]).sum(0)
    own = own.clamp_min(0)
    return Explained(float(own.sum()), joint.total, own, joint.yy.diagonal().clamp_min(0), 0.0, 0.0)


def adjusted(r2: float, n: int, freedom: float) -> float:
    """What the score would be if every degree of freedom had explained noise: 1 - (1 - R²)(n - 1) / (n - freedom - 1)."""
    return 1 - (1 - r2) * (n - 1) / (n - freedom - 1) if n > freedom + 1 else float("nan")
