"""How rows go together with a concept: their moments, and which directions of it are more than chance."""

from __future__ import annotations

from math import exp, log, sin, tan
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.estimators.inputs import require_as_many
from workbench.errors import BadDataset, NotFinite, TooFewExamples, UnknownOption
from workbench.moments.joint import Joint
from workbench.transports.solving import Spectrum, least_squares

LEVEL = 0.01
"""How often a concept that has nothing to do with the rows would be taken for one that has."""
TRACY_WIDOM = 2.0234
"""Its quantile of 1 - LEVEL (first order; Johnstone 2008, table 1)."""
RELATIVE = 1e-7
"""Canonical correlations below this are rounding."""


def indicators(z: Any, n: int, classes: Any = None) -> tuple[Float[Tensor, "n k"], np.ndarray | None]:
    """A concept as columns, and the names of its classes: an indicator each where labels are one of a few names or whole
    numbers; the columns themselves, where they are floats or there are several.

    Args:
        classes: All there are, where these rows may not have each.
    Raises:
        BadDataset: if there are not as many labels as rows, or of a class that was not named.
        TooFewExamples: if the concept is the same in all rows.
        NotFinite: if a number is none.
    """
    if z is None:
        raise BadDataset("An eraser needs the concept: fit(X, y), with a label or a number for each row.")
    z = z.cpu().numpy() if isinstance(z, Tensor) else np.asarray(z)
    require_as_many(len(z), n, "labels")
    if z.ndim == 2 or z.dtype.kind == "f":
        columns = torch.from_numpy(np.array(z, float).reshape(n, -1))
        if not bool(torch.isfinite(columns).all()):
            raise NotFinite("The concept holds NaN or infinity. Leave those rows out.")
        return columns, None
    names = np.unique(z) if classes is None else np.asarray(classes)
    if len(names) < 2:
        raise TooFewExamples(
            f"All {n} labels are one class, {names[0]!r}: the concept is constant, and there is nothing to erase. Give rows of "
            "two classes or more."
        )
    if unknown := sorted(set(z.tolist()) - set(names.tolist())):
        raise BadDataset(f"Label {unknown[0]!r} is none of the classes {', '.join(map(str, names))}.")
    index = np.searchsorted(names, z, sorter=(order := np.argsort(names)))
    return torch.nn.functional.one_hot(torch.from_numpy(order[index]), len(names)).double(), names


def joint_of(rows: Float[Tensor, "n d"], columns: Float[Tensor, "n k"]) -> Joint:
    """Sums in the rows' own dtype, but those of the concept alone in float64: rounding would give indicators, which add up to
    1, one direction more."""
    columns = columns.to(rows.device)
    mean = columns.mean(0)
    centred = columns - mean
    found = Joint.of(rows, columns.to(rows.dtype), products=rows.dtype)
    return found._replace(mean_y=mean, yy=centred.T @ centred)


class Concept(NamedTuple):
    """What erasers are made of; all float64."""

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    cross: Float[Tensor, "d q"]
    """Covariances with q uncorrelated parts of the concept, each of variance 1, that are more than chance: the columns of
    Σ_xz Σ_zz^{-1/2} V."""
    correlations: Float[Tensor, " p"]
    """All canonical correlations of rows and concept, falling."""
    chance: Float[Tensor, " p"]
    """What each of these could be by chance; 1 where there are too few rows to say."""

    @classmethod
    def of(cls, joint: Joint, tolerance: float | str = "chance") -> Concept:
        """
        Args:
            joint: Of rows and the concept's columns.
            tolerance: Canonical correlations up to this are not erased. `chance`: up to what a concept that is independent of
                the rows reaches in 99 of 100 samples (exactly for one column; by Johnstone 2008 for more). Rows are taken to be
                independent. The concept-erasure package compares with 0.01 the singular values of Σ_xx^{-1/2} Σ_xz, which a
                rare class never reaches; these are divided by the concept's own spread.
        Raises:
            UnknownOption: for another word, or a number out of range.
            TooFewExamples: if the concept is constant.
        """
        if isinstance(tolerance, str) and tolerance != "chance":
            raise UnknownOption(f"tolerance={tolerance!r} is not known. Give 'chance', or a canonical correlation from 0 to 1.")
        if not isinstance(tolerance, str) and not 0 <= tolerance < 1:
            raise UnknownOption(f"tolerance={tolerance} is no canonical correlation: give one from 0 to below 1, or 'chance'.")
        values, vectors = torch.linalg.eigh(joint.yy)
        there = values > RELATIVE * values[-1].clamp_min(1e-300)
        if joint.n < 2 or not bool(there.any()) or not bool(values[-1] > 0):
            raise TooFewExamples("The concept is the same in all rows: there is nothing to erase. Give rows that differ.")
        white = joint.xy @ (vectors[:, there] * (values[there] / joint.n) ** -0.5) / joint.n
        solved, rank = solved_by(joint.xx / joint.n, white)
        squares, parts = torch.linalg.eigh(_even(white.T @ solved))
        squares, parts = squares.flip(0).clamp(0, 1), parts.flip(1)
        correlations = squares.sqrt()
        p = len(correlations)
        chance = torch.tensor([chance_correlation(joint.n, rank - i, p - i) for i in range(p)], dtype=torch.float64)
        least = torch.where(chance < 1, chance, RELATIVE) if isinstance(tolerance, str) else torch.full((p,), float(tolerance))
        more = (correlations.cpu() > least.clamp_min(RELATIVE)).cummin(0).values  # the first that is chance ends it
        cross = white @ parts[:, more.to(white.device)]
        return cls(joint.mean_x, joint.xx / joint.n, cross, correlations, chance)

    def shrunk(self, n: int) -> Float[Tensor, "d d"]:
        """The covariance, drawn to an isotropic one as far as n rows leave it uncertain (Bodnar, Gupta and Parolya 2014, as in
        concept-erasure)."""
        d, trace = len(self.covariance), self.covariance.trace()
        off = self.covariance.square().sum() - trace**2 / d
        kept = (1 - trace**2 / n / off.clamp_min(1e-300)).clamp(0, 1)
        found = kept * self.covariance
        found.diagonal().add_((1 - kept) * trace / d)
        return found


def solved_by(matrix: Float[Tensor, "d d"], right: Float[Tensor, "d q"]) -> tuple[Float[Tensor, "d q"], int]:
    """matrix⁺ right, and the matrix's rank: by Cholesky's factors where it is regular, by eigenvectors where not."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if not bool(failed) and bool(pivots.min() > len(matrix) * torch.finfo(torch.float64).eps * matrix.diagonal().max()):
        return torch.cholesky_solve(right, factor), len(matrix)
    spectrum = Spectrum.of(matrix)
    return least_squares(spectrum, right), len(spectrum.values)


def chance_correlation(n: int, d: int, q: int) -> float:
    """The largest canonical correlation that n rows of d and of q independent columns have in 99 of 100 samples; 1 where rows
    are too few for one to mean anything.

    Of one column its square is Beta(d/2, (n - 1 - d)/2); of more, its logit is nearly μ + σ · Tracy-Widom (Johnstone 2008,
    "Multivariate analysis and Jacobi ensembles", theorem 1). Both are for normal rows, and hold for others as sums grow normal.
    """
    if n - 1 <= d + q:
        return 1.0
    if min(d, q) < 1:
        return 0.0
    if min(d, q) == 1:
        from scipy.stats import beta

        return float(beta.ppf(1 - LEVEL, max(d, q) / 2, (n - 1 - max(d, q)) / 2) ** 0.5)
    few, many = min(d, q), max(d, q)
    total = n - 2  # m + n - 1 of the paper, whose m is n - 1 - many here and n is many
    gamma, phi = (2 * np.arcsin(np.sqrt((one - 0.5) / total)) for one in (few, many))
    mean = 2 * log(tan((phi + gamma) / 2))
    spread = (16 / total**2 / (sin(phi + gamma) ** 2 * sin(phi) * sin(gamma))) ** (1 / 3)
    odds = exp(mean + spread * TRACY_WIDOM)
    return float((odds / (1 + odds)) ** 0.5)


def _even(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
