"""Scores of held-out predictions, with intervals by resampling groups."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DRAWS = 1000
"""Resamples of the groups."""
COVERED = 95
"""Percent of them that an interval holds."""


class Resamples:
    """How often each group is drawn in each resample: the same for all scores, so that differences have intervals too."""

    def __init__(self, groups: np.ndarray, seed: int) -> None:
        """
        Args:
            groups: `[n]`, of the examples that are scored.
        """
        self.own = np.unique(groups, return_inverse=True)[1]
        n = self.own.max() + 1
        self.counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)

    def means(self, values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """The weighted mean of values `[n]` or `[n, score]` in every resample, `[draw]` or `[draw, score]`."""
        weights = np.ones(values.shape) if weights is None else np.broadcast_to(weights.T, values.T.shape).T
        return (self.counts @ self._by_group(values * weights)) / np.maximum(self.counts @ self._by_group(weights), 1e-300)

    def _by_group(self, values: np.ndarray) -> np.ndarray:
        sums = np.zeros((self.counts.shape[1], *values.shape[1:]))
        np.add.at(sums, self.own, values)
        return sums


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resamples."""
    low, high = np.percentile(draws, [(100 - COVERED) / 2, (100 + COVERED) / 2])
    return float(low), float(high)


class Classified(NamedTuple):
    """Of one site's held-out predictions."""

    hits: np.ndarray
    """Of each tested example, 0 or 1."""
    accuracy: float
    balanced_accuracy: float
    """The mean over classes of the share found of each."""
    bits: float
    """Mean loss, log₂."""


def classified(log_p: np.ndarray, index: np.ndarray) -> Classified:
    """
    Args:
        log_p: Natural logarithms of probabilities of the tested examples, `[n, class]`.
        index: `[n]`, their classes.
    """
    hits = (log_p.argmax(1) == index).astype(float)
    by_class = [hits[index == i].mean() for i in np.unique(index)]
    loss = -log_p[np.arange(len(index)), index] / np.log(2)
    return Classified(hits, float(hits.mean()), float(np.mean(by_class)), float(loss.mean()))


def entropy_bits(index: np.ndarray) -> float:
    """Of the shares of classes: the mean loss, log₂, of knowing these alone."""
    shares = np.bincount(index) / len(index)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def r_squared(target: np.ndarray, predicted: np.ndarray, mean: np.ndarray) -> tuple[float, np.ndarray]:
    """1 - squared error over that of the training rows' mean, on average over targets, and of each.

    Args:
        target, predicted, mean: `[n, target]`.
    """
    own = 1 - ((target - predicted) ** 2).sum(0) / ((target - mean) ** 2).sum(0)
    return float(own.mean()), own


def kilometres(target: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Great-circle distances between latitudes and longitudes `[n, 2]` in degrees; latitudes beyond a pole count as the
    pole."""
    a, b = np.radians(target), np.radians(np.stack([predicted[:, 0].clip(-90, 90), predicted[:, 1]], 1))
    lat, lon = (a - b).T
    half = np.sin(lat / 2) ** 2 + np.cos(a[:, 0]) * np.cos(b[:, 0]) * np.sin(lon / 2) ** 2
    return 2 * 6371.0 * np.arcsin(np.sqrt(half.clip(0, 1)))
