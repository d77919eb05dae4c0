"""Logistic regression, its strength by cross-validation over groups."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from probes.estimators.inputs import classes_of, require_as_many, require_positive, rows_of, weights_of
from probes.estimators.linear import ProbableProbe, standardised
from probes.estimators.solver import Logistic, solve_logistic
from probes.estimators.strength import Strength
from probes.folds import folds_by_group
from workbench.errors import TooFewExamples, UnknownOption

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of C that cross-validation tries."""
AT_ONCE = 1 << 27
"""Logits that lie in memory at once; more problems are solved after one another."""


class LogisticProbe(Strength, ProbableProbe):
    """Logistic regression with an L2 penalty and a free intercept; multinomial for more than two classes.

    The loss is scikit-learn's, ½ |w|² + C Σ weight · -log p, and so are its coefficients, once both have converged. Differently
    from scikit-learn, rows are standardised inside (`standardize=True`), since a few columns of a language model's states are
    hundreds of times as large as the others, which a penalty on raw columns would favour; and C is chosen by the mean loss on
    groups held out, all folds and strengths being solved in one go. Rows are multiplied in their own dtype, float32 or float64.
    """

    option = "C"

    def __init__(
        self,
        C: float | int | str = "cv",
        *,
        Cs: Sequence[float] = STRENGTHS,
        folds: int = 5,
        standardize: bool = True,
        class_weight: dict | str | None = None,
        tol: float = 1e-4,
        max_iter: int = 300,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        """
        Args:
            C: Inverse strength of the penalty, as scikit-learn's; `cv` chooses among `Cs`.
            folds: Of the cross-validation; groups are given to `fit`, or else every row is one.
            class_weight: `balanced`, or a dict by class, as scikit-learn's.
            tol: Solved where no entry of the mean loss's gradient, by standardised columns, is larger: scikit-learn's default.
        """
        self.C, self.Cs, self.folds, self.standardize = C, Cs, folds, standardize
        self.class_weight, self.tol, self.max_iter, self.seed, self.device = class_weight, tol, max_iter, seed, device

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, groups: Any = None) -> LogisticProbe:
        """
        Args:
            X: `[n, d]`, an array or a tensor on any device.
            groups: `[n]`; rows of one are held out together while C is chosen.
        Raises:
            TooFewExamples: for one class, or a class in fewer than two groups where C is to be chosen.
            NotFinite, BadDataset: as `rows_of`.
        """
        if isinstance(self.C, str) and self.C != "cv":
            raise UnknownOption(f"C={self.C!r} is not known. Give a number above 0, or 'cv'.")
        require_positive(tol=self.tol, max_iter=self.max_iter, **({} if isinstance(self.C, str) else {"C": self.C}))
        rows = rows_of(self, X, fitting=True, device=self.device)
        self.classes_, index = classes_of(y, len(rows))
        weights = weights_of(sample_weight, self.class_weight, self.classes_, index)
        scaled = Scaled.of(rows, torch.as_tensor(weights, device=rows.device), standardize=self.standardize)
        labels, mass = index[:, None], weights[:, None]
        if self.C == "cv":
            if groups is not None:
                require_as_many(len(groups), len(rows), "groups")
            fold = folds_by_group(index, groups, self.folds, self.seed)
            train = np.stack([(fold != i) * weights for i in range(fold.max() + 1)], 1)
            found = self.solve(scaled, np.repeat(labels, train.shape[1], 1), train, self.Cs)
            losses = mean_losses(found, scaled, index, np.stack([fold == i for i in range(fold.max() + 1)], 1) * mass)
            self.C_ = float(self.Cs[int(losses.mean(1).argmin())])
        else:
            self.C_ = float(self.C)
        found = self.solve(scaled, labels, mass, [self.C_])
        self.n_iter_ = np.array([found.steps])
        if float(found.gradient.max()) > self.tol:
            warnings.warn(
                f"Not solved to tol={self.tol} in {found.steps} steps. Raise max_iter or tol.", ConvergenceWarning, stacklevel=2
            )
        self.coef_, self.intercept_ = scaled.back(found.weight[0, 0], found.bias[0, 0])
        return self

    def solve(self, rows: Scaled, labels: np.ndarray, weights: np.ndarray, strengths: Sequence[float]) -> Logistic:
        """All problems at all strengths.

        Args:
            labels, weights: `[n, problem]`: indices of classes, and weights of which those of a problem's training rows alone
                are not 0. Columns are standardised by these.
        """
        n_classes = len(self.classes_)
        device, dtype = rows.x.device, rows.x.dtype
        at_once = max(1, AT_ONCE // (len(rows.x) * len(strengths) * n_classes))
        parts = []
        for start in range(0, labels.shape[1], at_once):
            some = slice(start, start + at_once)
            mass = torch.as_tensor(weights[:, some], dtype=dtype, device=device)
            own = torch.as_tensor(strengths, dtype=dtype, device=device)
            parts.append(
                solve_logistic(
                    rows.x, torch.as_tensor(labels[:, some], device=device), mass,
                    rows.penalties(mass, standardize=self.standardize) / own[:, None, None], n_classes,
                    tol=self.tol, max_steps=self.max_iter,
                )
            )  # fmt: skip
        return Logistic(
            torch.cat([part.weight for part in parts], 1), torch.cat([part.bias for part in parts], 1),
            max(part.steps for part in parts), torch.cat([part.gradient for part in parts], 1),
        )  # fmt: skip


class Scaled(NamedTuple):
    """Rows less their mean, over a spread, once for all problems: what the solver needs to be quick. It is no part of what is
    solved, as the penalty of each problem is in units of its own training rows."""

    x: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor, *, standardize: bool) -> Scaled:
        return cls(*standardised(rows, weights, standardize=standardize))

    def penalties(self, weights: Tensor, *, standardize: bool) -> Tensor:
        """Of a coefficient of these rows, `[problem, d]`, where that of a standardised column (or a raw one) has 1."""
        if not standardize:
            return (1 / self.spread.square()).expand(weights.shape[1], -1)
        if weights.shape[1] == 1 and bool((weights > 0).all()):
            return torch.ones_like(self.spread)[None]
        share = weights / weights.sum(0)
        mean = share.T @ self.x
        variance = (share.T @ self.x.square() - mean.square()).clamp_min(0)
        constant = variance <= 100 * torch.finfo(variance.dtype).eps * (1 + mean.square())  # sums' rounding
        return torch.where(constant, 1.0, variance)

    def back(self, weight: Tensor, bias: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients and intercepts of the rows as they were, float64."""
        own = weight.double() / self.spread.double()
        return own.cpu().numpy(), (bias.double() - own @ self.mean.double()).cpu().numpy()


def log_probabilities(found: Logistic, rows: Scaled) -> Tensor:
    """`[strength, problem, n, classes]`."""
    flat = rows.x @ found.weight.flatten(0, 2).T + found.bias.flatten()
    logits = flat.T.reshape(*found.bias.shape, -1).mT
    if logits.shape[-1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], -1)
    return logits.log_softmax(-1)


def mean_losses(found: Logistic, rows: Scaled, index: np.ndarray, weights: np.ndarray) -> Tensor:
    """Mean loss of each strength and problem, in nats, over rows weighted by `weights`, `[n, problem]`.

    Raises:
        TooFewExamples: if a problem has no such row.
    """
    mass = torch.as_tensor(weights.T, device=rows.x.device)
    if bool((mass.sum(1) <= 0).any()):
        raise TooFewExamples("A fold has no row of any weight. Give fewer folds, or fewer rows of weight 0.")
    log_p = log_probabilities(found, rows)
    own = torch.as_tensor(index, device=rows.x.device)[None, None, :, None].expand(*log_p.shape[:2], -1, 1)
    return -(log_p.gather(-1, own)[..., 0] * mass).sum(-1) / mass.sum(1)
