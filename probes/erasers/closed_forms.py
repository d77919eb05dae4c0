"""Erasers in closed form. All of LEACE, mean projection and SAL remove what lies in the span of the covariances of rows with
the concept; they differ in what they take along with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probes.erasers.concept import RELATIVE, Concept, solved_by
from probes.erasers.eraser import MomentEraser
from probes.estimators.inputs import rows_of
from workbench.errors import BadDataset, UnknownOption
from workbench.moments.joint import Joint


class LEACE(MomentEraser):
    """Least-squares concept erasure (Belrose et al. 2023, arXiv 2306.03819): of all affine maps after which no linear
    classifier of the concept does better than its shares alone, the one that moves rows least, in every inner product at once.

    In the form without roots, with C the covariances with the concept: P = 1 - Σ⁻¹ C (CᵀΣ⁻¹C)⁻¹ Cᵀ for rows, by one Cholesky
    factorisation. It is oblique: idempotent, not symmetric. Differently from the concept-erasure package, what is left alone
    as chance is found by canonical correlations (see `Concept.of`), sums are kept in float64 (rows are multiplied in their own
    precision), and there is no constraint on the trace, which the optimum obeys: tr cov = tr Σ - what is removed.
    """

    def __init__(self, *, tolerance: float | str = "chance", shrink: bool = True, device: str | None = None) -> None:
        """
        Args:
            tolerance: As `Concept.of`. 0 erases all that correlates in these rows, chance too.
            shrink: Whether Σ is shrunk, as far as the number of rows leaves it uncertain. It is guarded either way.
        """
        self.tolerance, self.shrink, self.device = tolerance, shrink, device

    def fit_moments(self, joint: Joint) -> LEACE:
        concept = Concept.of(joint, self.tolerance)
        self.correlations_, self.chance_ = concept.correlations.cpu().numpy(), concept.chance.numpy()
        if not concept.cross.shape[1]:
            return self._set(concept.mean, concept.cross, concept.cross)
        solved, _ = solved_by(concept.shrunk(joint.n) if self.shrink else concept.covariance, concept.cross)
        write, upper = torch.linalg.qr(concept.cross)
        # read = Σ⁻¹ C (CᵀΣ⁻¹C)⁻¹ Rᵀ, for C = write R
        read = solved @ torch.linalg.solve(concept.cross.T @ solved, upper.T)
        return self._set(concept.mean, read, write)


class MeanProjection(MomentEraser):
    """The orthogonal projection that makes all class means equal (Haghighatkhah et al. 2022, arXiv 2212.04273): what lies in
    the span of their differences is removed. It guards as LEACE does, and moves rows further."""

    def __init__(self, *, tolerance: float | str = "chance", device: str | None = None) -> None:
        """
        Args:
            tolerance: As `Concept.of`.
        """
        self.tolerance, self.device = tolerance, device

    def fit_moments(self, joint: Joint) -> MeanProjection:
        """
        Raises:
            BadDataset: if the concept is no classes.
        """
        shares = joint.mean_y
        if not torch.allclose(joint.yy / joint.n, shares.diag() - torch.outer(shares, shares), rtol=1e-4, atol=1e-6):
            raise BadDataset("Numbers have no class means. Erase them with LEACE or SAL, or give labels of classes.")
        concept = Concept.of(joint, self.tolerance)
        self.correlations_, self.chance_ = concept.correlations.cpu().numpy(), concept.chance.numpy()
        basis = torch.linalg.qr(concept.cross)[0]
        return self._set(concept.mean, basis, basis)


class SAL(MomentEraser):
    """Spectral removal (Shao, Ziser and Cohen 2023, arXiv 2203.07893): the directions that covary most with the concept, of
    which some number is removed orthogonally. All of them are mean projection. The concept's columns are taken uncorrelated
    and of variance 1, or a rare class would come last."""

    def __init__(self, directions: int | None = None, *, tolerance: float | str = "chance", device: str | None = None) -> None:
        """
        Args:
            directions: How many; all, if None.
            tolerance: As `Concept.of`.
        """
        self.directions, self.tolerance, self.device = directions, tolerance, device

    def fit_moments(self, joint: Joint) -> SAL:
        """
        Raises:
            UnknownOption: for more directions than the concept has columns that are independent.
        """
        concept = Concept.of(joint, self.tolerance)
        most = len(concept.correlations)
        if self.directions is not None and not 1 <= self.directions <= most:
            raise UnknownOption(f"directions={self.directions}: this concept has 1 to {most}.")
        basis = torch.linalg.svd(concept.cross, full_matrices=False)[0][:, : self.directions]
        return self._set(concept.mean, basis, basis)


class RandomSubspace(MomentEraser):
    """A subspace drawn at random, as large as another eraser's: what removing so many dimensions does by itself."""

    def __init__(self, directions: int = 1, *, seed: int = 0, device: str | None = None) -> None:
        self.directions, self.seed, self.device = directions, seed, device

    def fit(self, X: Any, y: Any = None, *, groups: Any = None) -> RandomSubspace:
        """
        Args:
            y: Not looked at.
        """
        rows = rows_of(self, X, fitting=True, device=self.device)
        return self._drawn(rows.mean(0, dtype=torch.float64))

    def fit_moments(self, joint: Joint) -> RandomSubspace:
        return self._drawn(joint.mean_x)

    def _drawn(self, mean: Tensor) -> RandomSubspace:
        """
        Raises:
            UnknownOption: for more directions than rows have columns.
        """
        if not 0 <= self.directions <= len(mean):
            raise UnknownOption(f"directions={self.directions} is out of range: rows have {len(mean)} columns.")
        drawn = torch.randn(len(mean), self.directions, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        basis = torch.linalg.qr(drawn)[0]
        return self._set(mean, basis, basis)


class OracleLEACE(MomentEraser):
    """What LEACE would do if it knew each row's label: x - (z - mean) Σ_zz⁺ Σ_zx, the residual of a regression on the concept.
    It moves rows less still, but needs the label of every row, so it is no edit of a model."""

    def __init__(self, *, device: str | None = None) -> None:
        self.device = device

    def fit_moments(self, joint: Joint) -> OracleLEACE:
        Concept.of(joint, 0.0)  # a constant concept is said to be one
        values, vectors = torch.linalg.eigh(joint.yy)
        there = values > RELATIVE * values[-1]
        self.coef_ = (vectors[:, there] / values[there]) @ (vectors[:, there].T @ joint.xy.T)
        self.z_mean_ = joint.mean_y
        empty = joint.mean_x.new_zeros(len(joint.mean_x), 0)
        return self._set(joint.mean_x, empty, empty)

    def transform(self, X: Any, y: Any = None) -> Any:
        """
        Args:
            y: The concept of each row.
        Raises:
            UnknownOption: if it is not given.
        """
        if y is None:
            raise UnknownOption("OracleLEACE needs each row's label: transform(X, y). LEACE does without.")
        from probes.erasers.concept import indicators

        rows = X if isinstance(X, Tensor) else rows_of(self, X, fitting=False)
        columns, _ = indicators(y, len(rows), getattr(self, "classes_", None))
        if columns.shape[1] != len(self.z_mean_):
            raise BadDataset(
                f"The concept has {columns.shape[1]} columns here, and had {len(self.z_mean_)} where it was fitted."
            )
        coef = self.coef_.to(rows.device, rows.dtype)
        found = rows - (columns.to(rows) - self.z_mean_.to(rows)) @ coef
        return found if isinstance(X, Tensor) else found.numpy()

    def fit_transform(self, X: Any, y: Any = None, **options: Any) -> Any:
        return self.fit(X, y, **options).transform(X, y)

    @property
    def rank(self) -> int:
        """Columns of the concept that are independent."""
        return int(torch.linalg.matrix_rank(self.coef_))

    def as_edit(self, *args: Any, **options: Any) -> Any:
        """
        Raises:
            UnknownOption: always.
        """
        raise UnknownOption("OracleLEACE needs each row's label, which a model's states do not carry. Use LEACE.")
