"""One site's probe of numbers, with its controls."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.estimators.moments import RidgeRegressionProbe
from probes.estimators.strength import afresh
from probes.evaluation.classes import Plan
from probes.evaluation.code_length import blocks_of
from probes.evaluation.splits import Splits, cells_of
from workbench.moments.joint import Joint

SPREADS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Spread of what is left over, relative to the targets' own, of which the best is taken for a code."""


class Numbers(NamedTuple):
    """Held-out predictions `[n, target]`, NaN where an example was not tested."""

    predicted: np.ndarray
    mean: np.ndarray
    """Of the training rows' targets: what scores are relative to."""
    shuffled: np.ndarray
    """`[shuffle, n, target]`."""
    seen: np.ndarray | None
    controls: np.ndarray | None
    """Of the control tasks, `[draw, n, target]`."""
    bits_saved: float
    """An example and target: by how much the online code of the targets is shorter than one that knows no states."""
    shuffled_bits_saved: float | None
    settled: Any
    """The probe at the median of the strengths that were chosen."""


def probed(probe: Any, rows: Tensor, plan: Plan, *, controls: bool) -> Numbers:
    """As `classes.probed`, of numbers."""
    own = plan.dataset
    y, groups = own.labels, own.groups[:, 0]
    sets = [y, *(plan.shuffled if controls else ())]
    found, settled = _cross_fit(probe, rows, sets, plan.splits, groups)
    tasks = None
    if controls and plan.seen is not None:
        tasks, _ = _cross_fit(probe, rows, [y, *plan.controls], plan.seen, groups)
    seen, controlled = (None, None) if tasks is None else (tasks[0], tasks[1:])
    bits = _bits_saved(probe, rows, y, groups, plan.seed)
    null = _bits_saved(probe, rows, plan.shuffled[0], groups, plan.seed) if controls else None
    return Numbers(found[0], training_means(y, plan.splits), found[1:], seen, controlled, bits, null, settled)


def training_means(y: np.ndarray, splits: Splits) -> np.ndarray:
    """Of each tested example the mean of the targets that its probe learnt from: what R² is relative to."""
    found = np.full(y.shape, np.nan)
    for train, test in zip(splits.train.T, splits.test.T, strict=True):
        found[test] = y[train].mean(0)
    return found


def _cross_fit(probe: Any, rows: Tensor, sets: list[np.ndarray], splits: Splits, groups: np.ndarray) -> tuple[np.ndarray, Any]:
    """Predictions of each set of targets, `[set, n, target]`, by the strength that was chosen for the first."""
    found = np.full((len(sets), *sets[0].shape), np.nan)
    closed = isinstance(probe, RidgeRegressionProbe)
    width, settled, strengths = sets[0].shape[1], afresh(probe), []
    sums, parts = _sums(rows, sets, splits) if closed else ([], [])
    for train, test in zip(splits.train.T, splits.test.T, strict=True):
        learnt, asked = (rows[torch.from_numpy(np.flatnonzero(part)).to(rows.device)] for part in (train, test))
        same = probe
        for q, y in enumerate(sets):
            if closed:
                own = slice(q * width, (q + 1) * width)
                kept = [joint for joint, part in zip(sums, parts, strict=True) if train[int(part[0])]]
                kept = [one._replace(mean_y=one.mean_y[own], xy=one.xy[:, own], yy=one.yy[own, own]) for one in kept]
                if same.alpha == "cv" and (splits.crossed or len(kept) < 2):  # cells are no folds of groups
                    same = afresh(same, alpha=afresh(same).fit(learnt, y[train], groups=groups[train]).alpha_)
                fitted = afresh(same).fit_moments(kept)
            else:
                fitted = afresh(same).fit(learnt, y[train], groups=groups[train])
            found[q, test] = fitted.predict(asked).reshape(int(test.sum()), -1)
            if q == 0:
                same = settled = fitted.settled()
                strengths.append(getattr(same, same.option) if same.option else 0.0)
    if settled.option:
        settled = afresh(settled, **{settled.option: float(np.median(strengths))})
    return found, settled


def _sums(rows: Tensor, sets: list[np.ndarray], splits: Splits) -> tuple[list[Joint], list[Tensor]]:
    cells = cells_of(splits)
    y = torch.as_tensor(np.concatenate(sets, 1), device=rows.device)
    parts = [torch.from_numpy(np.flatnonzero(cells == cell)).to(rows.device) for cell in range(cells.max() + 1)]
    return [Joint.of(rows[part], y[part].to(rows.dtype), products=rows.dtype) for part in parts], parts


def _bits_saved(probe: Any, rows: Tensor, y: np.ndarray, groups: np.ndarray, seed: int) -> float:
    """An online code as `code_length`'s, of Gaussians: about a probe's predictions, of a spread that is a share of the
    targets' so far, against one about their mean, each of its best share. The best strength costs log₂ of their number more."""
    order, ends = blocks_of(groups, seed)
    x, own = rows[torch.from_numpy(order).to(rows.device)], y[order]
    variants = probe.variants()
    saved, base = np.zeros((len(variants), len(SPREADS))), np.zeros(len(SPREADS))
    shares = np.array(SPREADS)[:, None, None]
    for start, end in pairwise(ends):
        mean, spread = own[:start].mean(0), own[:start].std(0)
        if start < 2 or (spread == 0).any():
            continue  # what came before says nothing of the spread: both codes are alike
        off = (own[start:end] - mean) / spread
        base += _bits(off, off, shares)
        for at, one in enumerate(variants):
            left = (own[start:end] - one.fit(x[:start], own[:start]).predict(x[start:end]).reshape(off.shape)) / spread
            saved[at] += _bits(off, left, shares)
    return float(saved.max() - math.log2(len(variants)) - base.max()) / y.size


def _bits(off: np.ndarray, left: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """By how much a code of what is left over is shorter at each share of the spread, than one of `off` at the whole of it."""
    return ((off**2 - (left / shares) ** 2) / 2 - np.log(shares)).sum((1, 2)) / math.log(2)
