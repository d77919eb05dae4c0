"""Several directions of a concept, each at right angles to the ones before: Project and Probe."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import TransformerMixin

from probes.estimators.closed_forms import solved, spread_of, within_class
from probes.estimators.inputs import classes_of, require_as_many, rows_of
from probes.estimators.linear import ProbableProbe
from probes.estimators.logistic import LogisticProbe
from probes.estimators.strength import Strength
from workbench.errors import UnknownOption
from workbench.moments.joint import Joint


class ProjectAndProbe(TransformerMixin, Strength, ProbableProbe):
    """Pro² (Chen et al. 2023, arXiv 2302.05441): r orthonormal directions, each the best linear probe of what the ones before
    leave, and a logistic probe on the r numbers. With r = 1 it is a linear probe; with more, a concept that another set of
    texts tells by another direction can be learnt there from few labels: `make_pipeline(fitted, LogisticProbe())`, or
    `LogisticProbe().fit(fitted.transform(X_new), y_new)`.

    Every direction is that of discriminant analysis with a shrunk covariance, solved from moments that are projected, not from
    the rows. Columns are standardised, or the order of the directions would be one of scale. They are not whitened: in whitened
    rows of two classes all that a linear probe can find lies along the first direction.

    Attributes:
        components_: `[r, d]`, orthonormal, of standardised columns.
    """

    def __init__(self, r: int = 4, *, shrinkage: float = 0.03, standardize: bool = True, device: str | None = None) -> None:
        """
        Args:
            shrinkage: Of each covariance, as `LDAProbe`'s.
        """
        self.r, self.shrinkage, self.standardize, self.device = r, shrinkage, standardize, device

    def fit(self, X: Any, y: Any, *, groups: Any = None) -> ProjectAndProbe:
        """
        Args:
            groups: Not needed: nothing is chosen by holding out.
        Raises:
            UnknownOption: for r that is no number of directions.
            TooFewExamples, NotFinite, BadDataset: as `LDAProbe`.
        """
        rows = rows_of(self, X, fitting=True, device=self.device)
        self.classes_, index = classes_of(y, len(rows))
        if groups is not None:
            require_as_many(len(groups), len(rows), "groups")
        if not 1 <= self.r <= rows.shape[1] or not 0 < self.shrinkage <= 1:
            raise UnknownOption(
                f"r={self.r} directions of n_features={rows.shape[1]} with shrinkage={self.shrinkage}: r must be from 1 to the "
                "number of columns, and the shrinkage above 0, to 1."
            )
        z = torch.nn.functional.one_hot(torch.as_tensor(index), len(self.classes_)).to(rows)
        total = Joint.of(rows, z, products=rows.dtype)
        spread = spread_of(total, standardize=self.standardize)
        basis = self._directions(*within_class(total, spread), total.n)
        self.components_, self.mean_ = basis.T.cpu().numpy(), total.mean_x.cpu().numpy()
        self.scale_ = spread.cpu().numpy()
        inner = LogisticProbe(1.0, device=self.device).fit(self._projected(rows), index)
        self.coef_ = inner.coef_ @ self.components_ / self.scale_
        self.intercept_ = inner.intercept_ - self.coef_ @ self.mean_
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Rows along the directions, `[n, r]`."""
        return self._projected(rows_of(self, X, fitting=False, device=self.device)).cpu().numpy()

    def _projected(self, rows: torch.Tensor) -> torch.Tensor:
        mean, scale, basis = (
            torch.as_tensor(part, dtype=rows.dtype, device=rows.device) for part in (self.mean_, self.scale_, self.components_)
        )
        return ((rows - mean) / scale) @ basis.T

    def _directions(self, within: torch.Tensor, means: torch.Tensor, n: int) -> torch.Tensor:
        """`[d, r]`. Of several classes, the strongest direction of each round is taken."""
        d = len(within)
        basis = within.new_zeros(d, 0)
        ridge = self.shrinkage * float(within.trace()) / d
        covariance = (1 - self.shrinkage) * within
        covariance.diagonal().add_(ridge)
        for _ in range(self.r):
            left = covariance - basis @ (basis.T @ covariance)
            left = left - (left @ basis) @ basis.T + ridge * basis @ basis.T
            apart = means - basis @ (basis.T @ means)
            found = solved(left, apart, n)
            strongest = torch.linalg.svd(found, full_matrices=False)[0][:, 0]
            for _ in range(2):  # once more for rounding
                strongest = strongest - basis @ (basis.T @ strongest)
            basis = torch.cat([basis, (strongest / strongest.norm())[:, None]], 1)
        return basis
