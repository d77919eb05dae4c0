"""A probe that may look at k columns alone: is one neuron enough, or ten?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from probes.estimators.closed_forms import plus, within_class
from probes.estimators.inputs import classes_of, require_as_many, rows_of
from probes.estimators.linear import ProbableProbe
from probes.estimators.logistic import LogisticProbe
from probes.estimators.strength import Strength
from workbench.errors import UnknownOption
from workbench.moments.joint import Joint

FIRST = 16
"""Columns that are looked at for each one wanted, before halving begins."""


class SparseProbe(Strength, ProbableProbe):
    """Logistic regression on k columns (Gurnee et al. 2023, arXiv 2305.01610: adaptive thresholding). Of all columns those are
    taken whose class means lie furthest apart, in within-class spreads; a probe of them is fitted, the half with the larger
    coefficients (of standardised columns) kept, and so on until k are left.

    Attributes:
        support_: The k columns, in order; `coef_` is 0 elsewhere.
    """

    def __init__(
        self, k: int = 1, *, C: float = 1.0, class_weight: dict | str | None = None, device: str | None = None
    ) -> None:
        """
        Args:
            C: Of every regression on the way; with few columns it hardly matters.
        """
        self.k, self.C, self.class_weight, self.device = k, C, class_weight, device

    def fit(self, X: Any, y: Any, *, groups: Any = None) -> SparseProbe:
        """
        Args:
            groups: Not needed: nothing is chosen by holding out.
        Raises:
            UnknownOption: for k that is no number of columns.
            TooFewExamples, NotFinite, BadDataset: as `LogisticProbe`.
        """
        rows = rows_of(self, X, fitting=True, device=self.device)
        classes, index = classes_of(y, len(rows))
        if groups is not None:
            require_as_many(len(groups), len(rows), "groups")
        if not 1 <= self.k <= rows.shape[1]:
            raise UnknownOption(
                f"k={self.k} columns of n_features={rows.shape[1]} cannot be kept. Use a number from 1 to that."
            )
        kept = self._apart(rows, index, len(classes))[: self.k * FIRST]
        while True:
            inner = LogisticProbe(self.C, class_weight=self.class_weight, device=self.device)
            inner.fit(rows[:, torch.from_numpy(kept).to(rows.device)], index)
            if len(kept) == self.k:
                break
            spread = rows[:, torch.from_numpy(kept).to(rows.device)].std(0, correction=0).cpu().numpy()
            weight = np.abs(inner.coef_ * spread).max(0)
            kept = kept[np.argsort(-weight, kind="stable")[: max(self.k, len(kept) // 2)]]
        order = np.argsort(kept)
        self.support_, self.classes_ = kept[order], classes
        self.coef_ = np.zeros((len(inner.coef_), rows.shape[1]))
        self.coef_[:, self.support_] = inner.coef_[:, order]
        self.intercept_ = inner.intercept_
        return self

    @staticmethod
    def _apart(rows: torch.Tensor, index: np.ndarray, n_classes: int) -> np.ndarray:
        """Columns, those first whose class means lie furthest apart."""
        parts = []
        for some in rows.split(512, 1):  # their own sums are needed, not those of every pair
            z = torch.nn.functional.one_hot(torch.as_tensor(index), n_classes).to(some)
            total = plus([Joint.of(some, z, products=some.dtype)])
            within, means = within_class(total, torch.ones_like(total.mean_x))
            counts = total.n * total.mean_y
            parts.append((means.square() * counts).sum(1) / within.diagonal().clamp_min(1e-30))
        return torch.cat(parts).argsort(descending=True, stable=True).cpu().numpy()
