"""What of a concept is left in rows from which it was erased: probes, neighbours, class means, and what was paid for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.estimators.logistic import LogisticProbe
from probes.estimators.nonlinear import MLPProbe
from probes.evaluation.cross_fit import cross_fit
from probes.evaluation.splits import Splits
from probes.folds import folds_by_group

NEIGHBOURS = 5
SAME = 1e-3
"""Logarithms of probabilities, nats, that do not differ by more from row to row are the same."""
FRESH_FOLDS = 3
"""Of the rows that an eraser did not see, by which a probe that learns from them is scored."""


class Half(NamedTuple):
    """Rows that an eraser was fitted to, and rows that it was not, with the concept of each."""

    seen: Tensor
    fresh: Tensor
    index_seen: np.ndarray
    index_fresh: np.ndarray
    groups_seen: np.ndarray
    groups_fresh: np.ndarray
    at: np.ndarray
    """Where the fresh rows stand among all."""

    @classmethod
    def two(cls, rows: Tensor, index: np.ndarray, groups: np.ndarray, seed: int) -> list[Half]:
        """Both ways of taking half of the groups."""
        fold = folds_by_group(index, groups, 2, seed)
        sides = [np.flatnonzero(fold == side) for side in (0, 1)]
        return [
            cls(
                rows[torch.from_numpy(a).to(rows.device)], rows[torch.from_numpy(b).to(rows.device)], index[a], index[b],
                groups[a], groups[b], b,
            )
            for a, b in (sides, sides[::-1])
        ]  # fmt: skip


class Hits(NamedTuple):
    """Whether each fresh row's class was found, 0 or 1, by each way of looking."""

    linear: np.ndarray
    """Logistic regression that learnt from the rows the eraser was fitted to: the published protocol."""
    linear_fresh: np.ndarray
    """One that learnt from other groups that the eraser did not see either."""
    mlp: np.ndarray | None
    mlp_fresh: np.ndarray | None
    neighbours: np.ndarray
    """By the commonest class of the nearest fitted rows, of other groups."""
    neighbours_seen: np.ndarray
    """The same for the fitted rows themselves. Below chance, classes were moved into each other (anti-clustering)."""


def hits(half: Half, seen: Tensor, fresh: Tensor, *, mlp: bool, seed: int) -> Hits:
    """
    Args:
        seen, fresh: The half's rows after erasing.
    """
    device = str(seen.device)
    linear: Any = LogisticProbe(seed=seed, device=device).fit(seen, half.index_seen, groups=half.groups_seen)
    again, _ = _crossed(linear.settled().set_params(C="cv"), half, fresh, seed)
    network = deep = None
    if mlp:
        own = MLPProbe(seed=seed, device=device).fit(seen, half.index_seen, groups=half.groups_seen)
        network = (own.predict(fresh) == half.index_fresh).astype(float)
        deep, _ = _crossed(MLPProbe(seed=seed, device=device), half, fresh, seed)
    return Hits(
        (answers(linear, fresh, half.index_seen) == half.index_fresh).astype(float), again, network, deep,
        nearest(seen, half.index_seen, half.groups_seen, fresh, half.index_fresh, half.groups_fresh),
        nearest(seen, half.index_seen, half.groups_seen, seen, half.index_seen, half.groups_seen),
    )  # fmt: skip


def answers(probe: Any, rows: Tensor, learnt: np.ndarray) -> np.ndarray:
    """A probe's answers; the commonest class of what it learnt from, where it gives all rows the same probabilities. (After
    means were made equal its weights are rounding, and of classes of equal size rounding would choose.)"""
    log_p = probe.predict_log_proba(rows)
    if np.ptp(log_p, axis=0).max() < SAME:
        return np.full(len(log_p), np.bincount(learnt).argmax())
    return probe.classes_[log_p.argmax(1)]


def _crossed(probe: Any, half: Half, fresh: Tensor, seed: int) -> tuple[np.ndarray, Any]:
    fold = folds_by_group(half.index_fresh, half.groups_fresh, FRESH_FOLDS, seed)
    k = int(max(half.index_seen.max(), half.index_fresh.max())) + 1
    (log_p,), settled = cross_fit(probe, fresh, half.index_fresh[:, None], k, Splits.of(fold), half.groups_fresh)
    return (log_p.argmax(1) == half.index_fresh).astype(float), settled


def nearest(
    rows: Tensor, index: np.ndarray, groups: np.ndarray, asked: Tensor, wanted: np.ndarray, own: np.ndarray
) -> np.ndarray:
    """Whether the commonest class of each asked row's nearest rows, of other groups than its own, is its class."""
    names = {name: i for i, name in enumerate(dict.fromkeys([*groups.tolist(), *own.tolist()]))}
    a, b = (torch.tensor([names[one] for one in some.tolist()]) for some in (own, groups))
    distance = torch.cdist(asked.float(), rows.float()).cpu()
    distance.masked_fill_(a[:, None] == b, torch.inf)
    near = torch.from_numpy(index)[distance.topk(min(NEIGHBOURS, len(rows)), largest=False).indices]
    votes = torch.nn.functional.one_hot(near).sum(1).numpy()
    return (votes.argmax(1) == wanted).astype(float)


def mean_gap(rows: Tensor, index: np.ndarray) -> float:
    """How far class means are from the mean of all: the root of their mean square, each class by its share."""
    z = torch.nn.functional.one_hot(torch.from_numpy(index)).to(rows.device, torch.float64)
    shares = z.mean(0)
    means = z.T @ rows.double() / z.sum(0)[:, None]
    return float((shares[:, None] * (means - rows.double().mean(0)).square()).sum().sqrt())


class MainTask(NamedTuple):
    """Another task that rows serve, and how unequally it is done for the concept's classes."""

    accuracy: float
    tpr_gap: float
    """Root mean square over the task's classes of how much more often one is recognised in one class of the concept than in
    another (for two: De-Arteaga et al. 2019's GAP; for more, the largest less the smallest)."""


def main_task(half: Half, seen: Tensor, fresh: Tensor, main_seen: np.ndarray, main_fresh: np.ndarray, seed: int) -> MainTask:
    """Of logistic regression that learnt from the erased rows that the eraser was fitted to, on the others."""
    probe: Any = LogisticProbe(seed=seed, device=str(seen.device)).fit(seen, main_seen, groups=half.groups_seen)
    hit = probe.predict(fresh) == main_fresh
    gaps = []
    for name in np.unique(main_fresh):
        own = [hit[(main_fresh == name) & (half.index_fresh == z)] for z in np.unique(half.index_fresh)]
        rates = [one.mean() for one in own if len(one)]
        if len(rates) > 1:
            gaps.append(max(rates) - min(rates))
    return MainTask(float(hit.mean()), float(np.sqrt(np.mean(np.square(gaps)))) if gaps else float("nan"))
