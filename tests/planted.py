"""Rows with something planted in them, and scikit-learn's fits of the same, which tests of probes are held against."""

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler


def blobs(n: int = 300, d: int = 6, classes: int = 2, *, apart: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes whose means differ, of unequal shares; columns of unlike size, correlated, not centred."""
    random = np.random.default_rng(seed)
    y = random.choice(classes, n, p=np.arange(2, classes + 2) / np.arange(2, classes + 2).sum())
    rows = random.normal(size=(n, d)) + apart * random.normal(size=(classes, d))[y]
    rows = rows @ (np.eye(d) + 0.3 * random.normal(size=(d, d)))
    return rows * np.logspace(-1, 1, d) + np.linspace(-3, 5, d), y


def by_sklearn(
    x: np.ndarray, y: np.ndarray, C: float, *, standardize: bool, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of raw columns and intercepts; of several classes less their mean, which the loss leaves open."""
    scaler = StandardScaler(with_mean=True, with_std=standardize).fit(x, sample_weight=weights)
    found = LogisticRegression(C=C, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
    found.fit(scaler.transform(x), y, sample_weight=weights)
    coef = found.coef_ / (scaler.scale_ if standardize else 1.0)
    return without_mean(coef, found.intercept_ - coef @ scaler.mean_)


def without_mean(coef: np.ndarray, intercept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of several classes, what their probabilities depend on."""
    return (coef, intercept) if len(coef) == 1 else (coef - coef.mean(0), intercept - intercept.mean())


def log_loss(log_p: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Of each row, in nats."""
    return -log_p[np.arange(len(index)), index]


def close(one: Any, other: Any, tolerance: float) -> None:
    """The difference is so small a share of the whole."""
    one, other = (np.asarray(part, float) for part in (one, other))
    assert one.shape == other.shape
    assert np.linalg.norm(one - other) <= tolerance * max(np.linalg.norm(other), 1e-300)


def parallel(one: np.ndarray, other: np.ndarray) -> float:
    """Cosine."""
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def tensor(rows: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).to(dtype)
