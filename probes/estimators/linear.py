"""What all linear probes share: scores, probabilities, and the direction of a class in the model's own units."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from probes.estimators.inputs import rows_of
from workbench.errors import UnknownOption


class LinearProbe(ClassifierMixin, BaseEstimator):
    """A classifier of one logit a class, or of one, the second class's, for two.

    Attributes:
        coef_: `[1 or classes, d]`, in units of the rows as they were given, whatever they were scaled by inside.
        intercept_: `[1 or classes]`.
        classes_: Sorted.
        device: Where rows are multiplied; where they are (the CPU, for arrays), if None.
    """

    coef_: np.ndarray
    intercept_: np.ndarray
    classes_: np.ndarray
    device: str | None = None

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits: `[n]`, of the second class, for two classes, else `[n, classes]`."""
        check_is_fitted(self)
        rows = rows_of(self, X, fitting=False, device=self.device)
        weight, bias = (torch.as_tensor(part, dtype=rows.dtype, device=rows.device) for part in (self.coef_, self.intercept_))
        logits = (rows @ weight.T + bias).double().cpu().numpy()
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row."""
        logits = self.decision_function(X)
        return self.classes_[(logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(1)]

    def direction(self, label: Any = None) -> np.ndarray:
        """The vector `[d]`, in the rows' own units, along which a class becomes likelier; of two classes the second, if none is
        named, and the other's is its negative.

        Raises:
            UnknownOption: if there is no such class, or none is named of several.
        """
        check_is_fitted(self)
        if (label is None and len(self.classes_) > 2) or (label is not None and label not in self.classes_):
            known = ", ".join(map(repr, self.classes_.tolist()))
            raise UnknownOption(f"label={label!r} names no class. Use one of {known}.")
        at = 1 if label is None else int(np.flatnonzero(self.classes_ == label)[0])
        if len(self.coef_) == 1:
            return self.coef_[0] if at else -self.coef_[0]
        return self.coef_[at] - self.coef_.mean(0)


class ProbableProbe(LinearProbe):
    """One whose logits are those of probabilities."""

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Natural logarithms of the probabilities, `[n, classes]`."""
        logits = self.decision_function(X)
        if logits.ndim == 1:
            return -np.logaddexp(0, np.stack([logits, -logits], 1))
        return log_softmax(logits, 1)

    def predict_proba(self, X: Any) -> np.ndarray:
        """`[n, classes]`."""
        return np.exp(self.predict_log_proba(X))


def standardised(rows: Tensor, weights: Tensor, *, standardize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows less the mean of each column and over its spread; the mean; and the spread, as scikit-learn's StandardScaler has
    them: that of a constant column is 1. Without `standardize` all spreads are the mean one, which keeps the shape of the rows
    and makes numbers of ordinary size of them."""
    share = (weights / weights.sum()).to(rows.dtype)
    mean = share @ rows
    centred = rows - mean
    variance = share @ centred.square()
    if not standardize:
        spread = variance.mean().sqrt().clamp_min(torch.finfo(rows.dtype).tiny).expand_as(mean)
    else:
        constant = variance <= (10 * torch.finfo(rows.dtype).eps * mean).square()
        spread = torch.where(constant, 1.0, variance.sqrt())
    return centred.div_(spread), mean, spread
