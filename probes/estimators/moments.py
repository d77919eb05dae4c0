"""Probes in closed form, from second moments alone: discriminant analysis, difference of means, ridge.

All that they need is a `Joint` of rows and class indicators (or targets): its sums can be added over parts of a corpus, and one
of them gives every probe, strength and held-out error of a strength. With C the class indicators, the within-class sums are
xx - xy (n_c)⁻¹ yx, and the means differ from their mean by xy / n_c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.base import MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from probes.estimators.closed_forms import best_strength, joints, plus, ridge, solved, spread_of, within_class
from probes.estimators.inputs import classes_of, require_as_many, rows_of, targets_of
from probes.estimators.linear import LinearProbe, ProbableProbe
from probes.estimators.strength import Strength
from probes.folds import folds_by_group, numeric_folds
from workbench.errors import BadDataset, UnknownOption, require_one_of
from workbench.moments.joint import Joint

SHRINKAGES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 0.6, 0.9, 0.99)
"""Shares of an isotropic covariance that cross-validation tries."""
ALPHAS = tuple(10.0**exponent for exponent in range(-4, 3))
"""Ridge strengths that cross-validation tries, in units of the rows' mean variance times their number."""


Classifier = TypeVar("Classifier", bound="_MomentClassifier")


class _MomentClassifier(LinearProbe):
    """What is fitted on a `Joint` of rows and class indicators."""

    standardize: bool
    folds: int
    seed: int

    def fit(self: Classifier, X: Any, y: Any, *, groups: Any = None) -> Classifier:
        """
        Args:
            X: `[n, d]`, an array or a tensor on any device.
            groups: `[n]`; rows of one are held out together while a strength is chosen.
        Raises:
            TooFewExamples: for one class, a class in fewer than two groups where a strength is to be chosen, or more columns
                than rows where there is none.
            NotFinite, BadDataset: as `rows_of`.
        """
        rows = rows_of(self, X, fitting=True, device=self.device)
        classes, index = classes_of(y, len(rows))
        z = torch.nn.functional.one_hot(torch.as_tensor(index), len(classes)).to(rows)
        if groups is not None:
            require_as_many(len(groups), len(rows), "groups")
        if not self._chooses:
            return self.fit_moments([Joint.of(rows, z, products=rows.dtype)], classes)
        return self.fit_moments(joints(rows, z, folds_by_group(index, groups, self.folds, self.seed)), classes)

    def fit_moments(self: Classifier, joint: Joint | Sequence[Joint], classes: Any = None) -> Classifier:
        """
        Args:
            joint: Of rows and class indicators (a 1 in the column of the row's class), or one for each fold of groups, by
                which a strength can be chosen.
            classes: Names of the indicators, in their order; numbers from 0, if None.
        Raises:
            TooFewExamples: if a class has no row, or a strength is to be chosen of one fold.
            BadDataset: if the second part is no class indicators.
        """
        folds = [joint] if isinstance(joint, Joint) else list(joint)
        total = plus(folds)
        shares = total.mean_y
        if not bool((shares > 0).all()) or len(shares) < 2 or abs(float(shares.sum()) - 1) > 1e-6:
            raise BadDataset(
                f"The moments are of rows and columns whose means are {shares.tolist()[:6]}: no indicators of two or more "
                "classes, each of which has rows."
            )
        self.classes_ = np.arange(len(shares)) if classes is None else np.asarray(classes)
        self.n_features_in_ = len(total.mean_x)
        weight, bias = self._solved(total, folds)
        weight, bias = weight.cpu().numpy(), (bias - total.mean_x @ weight).cpu().numpy()
        two = len(self.classes_) == 2
        self.coef_ = weight[:, 1:].T - weight[:, :1].T if two else weight.T
        self.intercept_ = bias[1:] - bias[:1] if two else bias
        return self

    @property
    def _chooses(self) -> bool:
        raise NotImplementedError

    def _solved(self, total: Joint, folds: list[Joint]) -> tuple[Tensor, Tensor]:
        """Weights `[d, classes]` and biases at the rows' mean."""
        raise NotImplementedError


class LDAProbe(Strength, ProbableProbe, _MomentClassifier):
    """Linear discriminant analysis with a shrunk covariance, (1 - s) S + s tr(S) / d · 1: scikit-learn's with `solver="lsqr"`,
    from moments. Columns are standardised first (`standardize=True`), or the shrinkage would be of the few columns whose
    variance is largest.

    The shrinkage is the one with the least squared error of the class indicators, regressed on held-out groups at the ridge
    strength that gives the same direction (penalised optimal scoring: Hastie, Buja and Tibshirani 1995); moments suffice for
    it.
    """

    option = "shrinkage"

    def __init__(
        self,
        shrinkage: float | str = "cv",
        *,
        shrinkages: Sequence[float] = SHRINKAGES,
        priors: str | None = None,
        folds: int = 5,
        standardize: bool = True,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        """
        Args:
            shrinkage: From 0 to 1; `cv` chooses among `shrinkages`.
            priors: Shares of the classes: as in the rows, or `equal`.
        """
        self.shrinkage, self.shrinkages, self.priors, self.folds = shrinkage, shrinkages, priors, folds
        self.standardize, self.seed, self.device = standardize, seed, device

    @property
    def _chooses(self) -> bool:
        if isinstance(self.shrinkage, str):
            if self.shrinkage != "cv":
                raise UnknownOption(f"shrinkage={self.shrinkage!r} is not known. Give a share from 0 to 1, or 'cv'.")
            if not all(0 <= one < 1 for one in self.shrinkages):
                raise UnknownOption(f"shrinkages={tuple(self.shrinkages)}: what 'cv' chooses among must be from 0 to below 1.")
            return True
        if not 0 <= self.shrinkage <= 1:
            raise UnknownOption(f"shrinkage={self.shrinkage} is no share. Give one from 0 to 1, or 'cv'.")
        return False

    def _solved(self, total: Joint, folds: list[Joint]) -> tuple[Tensor, Tensor]:
        require_one_of("priors", self.priors, (None, "equal"))
        spread = spread_of(total, standardize=self.standardize)
        within, means = within_class(total, spread)
        isotropic = float(within.trace()) / len(within)
        if self._chooses:
            ratios = [s / (1 - s) * isotropic for s in self.shrinkages]
            self.shrinkage_ = float(self.shrinkages[best_strength(folds, ratios, standardize=self.standardize)])
        else:
            self.shrinkage_ = float(self.shrinkage)
        covariance = within * ((1 - self.shrinkage_) / total.n)
        covariance.diagonal().add_(self.shrinkage_ * isotropic / total.n)
        weight = solved(covariance, means, total.n)
        shares = torch.full_like(total.mean_y, 1 / len(total.mean_y)) if self.priors == "equal" else total.mean_y
        return weight / spread[:, None], shares.log() - (means * weight).sum(0) / 2


class MeanDifferenceProbe(Strength, ProbableProbe, _MomentClassifier):
    """The direction from one class mean to the other (of several classes, from the mean of all to each). The classes are taken
    to spread equally along every direction, as much as they do between their means: so its probabilities are of the right
    size, and only sums, no covariance, decide the direction."""

    def __init__(self, *, standardize: bool = False, device: str | None = None) -> None:
        self.standardize, self.device = standardize, device

    @property
    def _chooses(self) -> bool:
        return False

    def _solved(self, total: Joint, folds: list[Joint]) -> tuple[Tensor, Tensor]:
        spread = spread_of(total, standardize=self.standardize)
        within, means = within_class(total, spread)
        length = means.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        variance = ((within @ means) * means).sum() / total.n / length
        weight = means / variance.clamp_min(1e-12 * length)
        return weight / spread[:, None], total.mean_y.log() - (means * weight).sum(0) / 2


class RidgeProbe(Strength, _MomentClassifier):
    """Ridge regression on class indicators of ±1: scikit-learn's RidgeClassifier, from moments, with standardised columns and,
    for `alpha="cv"`, the strength of the least held-out squared error. It gives scores, no probabilities."""

    option = "alpha"

    def __init__(
        self,
        alpha: float | str = "cv",
        *,
        alphas: Sequence[float] = ALPHAS,
        folds: int = 5,
        standardize: bool = True,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        """
        Args:
            alpha: In scikit-learn's units; `cv` chooses among `alphas`.
            alphas: In units of the columns' mean variance times the number of rows.
        """
        self.alpha, self.alphas, self.folds = alpha, alphas, folds
        self.standardize, self.seed, self.device = standardize, seed, device

    @property
    def _chooses(self) -> bool:
        return chooses(self.alpha)

    def _solved(self, total: Joint, folds: list[Joint]) -> tuple[Tensor, Tensor]:
        spread = spread_of(total, standardize=self.standardize)
        self.alpha_ = chosen_alpha(self.alpha, self.alphas, total, folds, standardize=self.standardize)
        weight, bias = ridge(total, spread, self.alpha_)
        if len(self.classes_) == 2:  # differences of the two are regressions on ±1
            return weight, bias
        return 2 * weight, 2 * bias - 1


class RidgeRegressionProbe(MultiOutputMixin, RegressorMixin, Strength):
    """Ridge regression on one or more targets: scikit-learn's Ridge, from moments, with standardised columns and, for
    `alpha="cv"`, the strength of the least squared error on held-out groups, targets weighing alike.

    Attributes:
        coef_: `[targets, d]`, or `[d]` for targets `[n]`, in units of the rows as they were given.
    """

    option = "alpha"

    def __init__(
        self,
        alpha: float | str = "cv",
        *,
        alphas: Sequence[float] = ALPHAS,
        folds: int = 5,
        standardize: bool = True,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        """
        Args:
            alpha, alphas: As `RidgeProbe`.
        """
        self.alpha, self.alphas, self.folds = alpha, alphas, folds
        self.standardize, self.seed, self.device = standardize, seed, device

    def _candidates(self) -> list[float]:
        """For rows of spread 1, 1,000 of them."""
        return [1000 * one for one in self.alphas]

    def fit(self, X: Any, y: Any, *, groups: Any = None) -> RidgeRegressionProbe:
        """
        Raises:
            TooFewExamples: for fewer than two groups where a strength is to be chosen, or more columns than rows where there is
                none.
        """
        rows = rows_of(self, X, fitting=True, device=self.device)
        targets = targets_of(y, len(rows))
        y = torch.as_tensor(targets, device=rows.device, dtype=rows.dtype)
        y = y[:, None] if y.dim() == 1 else y
        if groups is not None:
            require_as_many(len(groups), len(rows), "groups")
        fold = numeric_folds(len(rows), groups, self.folds, self.seed) if chooses(self.alpha) else np.zeros(len(rows), int)
        self.fit_moments(joints(rows, y, fold))
        if targets.ndim == 1:
            self.coef_, self.intercept_ = self.coef_[0], self.intercept_.item()
        return self

    def fit_moments(self, joint: Joint | Sequence[Joint]) -> RidgeRegressionProbe:
        """
        Args:
            joint: Of rows and targets, or one for each fold of groups, by which a strength can be chosen.
        """
        folds = [joint] if isinstance(joint, Joint) else list(joint)
        total = plus(folds)
        self.n_features_in_ = len(total.mean_x)
        self.alpha_ = chosen_alpha(self.alpha, self.alphas, total, folds, standardize=self.standardize)
        weight, bias = ridge(total, spread_of(total, standardize=self.standardize), self.alpha_)
        self.coef_ = weight.T.cpu().numpy()
        self.intercept_: Any = (bias - total.mean_x @ weight).cpu().numpy()
        return self

    def predict(self, X: Any) -> np.ndarray:
        """`[n, targets]`, or `[n]`."""
        check_is_fitted(self)
        rows = rows_of(self, X, fitting=False, device=self.device)
        weight = torch.as_tensor(self.coef_, dtype=rows.dtype, device=rows.device)
        return (rows @ (weight if weight.dim() == 1 else weight.T)).cpu().numpy() + np.asarray(self.intercept_)


def chooses(alpha: float | str) -> bool:
    """
    Raises:
        UnknownOption: for a strength that is no number.
    """
    if (isinstance(alpha, str) and alpha != "cv") or (not isinstance(alpha, str) and not alpha >= 0):
        raise UnknownOption(f"alpha={alpha!r} is not known. Give a number, 0 or above, or 'cv'.")
    return alpha == "cv"


def chosen_alpha(alpha: float | str, alphas: Sequence[float], total: Joint, folds: list[Joint], *, standardize: bool) -> float:
    """The strength that was asked for, or that of the least held-out error, in scikit-learn's units."""
    if not chooses(alpha):
        return float(alpha)
    spread = spread_of(total, standardize=standardize)
    unit = float((total.xx.diagonal() / spread.square()).mean())
    return alphas[best_strength(folds, [one * unit for one in alphas], standardize=standardize)] * unit
