"""Held-out probabilities of a probe, for several sets of labels at once: the true ones, shuffled ones, random ones of each
type.

The strength of a probe is chosen by the true labels, on training rows alone, and then kept for all others: they are put to the
same probe.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.estimators.closed_forms import plus
from probes.estimators.inputs import weights_of
from probes.estimators.logistic import LogisticProbe, Scaled, log_probabilities
from probes.estimators.moments import LDAProbe, MeanDifferenceProbe
from probes.estimators.strength import afresh
from probes.evaluation.splits import Splits, cells_of
from workbench.errors import NotFinite
from workbench.moments.joint import Joint


def cross_fit(
    probe: Any, rows: Tensor, labels: np.ndarray, n_classes: int, splits: Splits, groups: np.ndarray
) -> tuple[np.ndarray, Any]:
    """Logarithms of the probabilities that probes give to examples they did not learn from, `[label set, n, class]`, NaN where
    an example is not tested; and a probe, not fitted, of the strength that was chosen most often.

    Args:
        rows: `[n, d]`, float32 or float64.
        labels: `[n, label set]`, indices of classes; the first are the true ones.
        groups: `[n]`, by which a probe may hold out some of its training rows.
    Raises:
        NotFinite: if rows hold NaN or infinity.
    """
    if not bool(torch.isfinite(rows.sum())):
        raise NotFinite("The states hold NaN or infinity. Load the model in a dtype of wider range.")
    if isinstance(probe, LogisticProbe):
        return _logistic(probe, rows, labels, n_classes, splits, groups)
    if isinstance(probe, (LDAProbe, MeanDifferenceProbe)):
        if probe.option == "" or getattr(probe, probe.option) != "cv":
            return _from_moments(probe, rows, labels, n_classes, splits)
        if not splits.crossed and splits.train.shape[1] > 2:  # cells are folds of groups
            return _from_moments(probe, rows, labels, n_classes, splits)
    found = np.full((labels.shape[1], len(rows), n_classes), np.nan)
    settled = []
    for train, test in zip(splits.train.T, splits.test.T, strict=True):
        learnt, asked = (rows[torch.from_numpy(np.flatnonzero(part)).to(rows.device)] for part in (train, test))
        same = probe
        for q, own in enumerate(labels.T):
            fitted = afresh(same).fit(learnt, own[train], groups=groups[train])
            found[q, test] = -np.inf  # of a class that no training row has
            found[q][np.ix_(test, fitted.classes_)] = fitted.predict_log_proba(asked)
            if q == 0:
                same = fitted.settled()
                settled.append(same)
    return found, _commonest(settled)


def _commonest(probes: list[Any]) -> Any:
    """Of probes with the same options but the strength, one that most are equal to."""
    names = [repr(sorted(one.get_params().items(), key=str)) for one in probes]
    return probes[max(range(len(names)), key=lambda i: names.count(names[i]))]


def _logistic(
    probe: LogisticProbe, rows: Tensor, labels: np.ndarray, n_classes: int, splits: Splits, groups: np.ndarray
) -> tuple[np.ndarray, Any]:
    """All strengths of all pairs of problems in one go: what neither problem of a pair tests is learnt from, and what the one
    tests is what the other is tried on. So each problem's strength is chosen on its own training rows, by half as many
    fits."""
    probe = afresh(probe)
    probe.classes_ = np.arange(n_classes)
    scaled = Scaled.of(rows, torch.ones(len(rows), device=rows.device), standardize=probe.standardize)
    chosen = _strengths(probe, scaled, labels[:, 0], splits, groups)
    found = np.full((labels.shape[1], len(rows), n_classes), np.nan)
    for C in sorted(set(chosen)):
        problems = [p for p, own in enumerate(chosen) if own == C]
        pairs = [(q, p) for q in range(labels.shape[1]) for p in problems]
        own = np.stack([labels[:, q] for q, _ in pairs], 1)
        train = np.stack([splits.train[:, p] for _, p in pairs], 1)
        fitted = probe.solve(scaled, own, weighted(probe, own, train), [C])
        log_p = log_probabilities(fitted, scaled)[0].double().cpu().numpy()
        for at, (q, p) in enumerate(pairs):
            test = splits.test[:, p]
            found[q, test] = log_p[at, test]
    return found, _commonest([afresh(probe, C=C) for C in chosen])


def weighted(probe: LogisticProbe, labels: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Weights `[n, problem]` of training rows, by the probe's class weights; 0 of all others."""
    found = train.astype(float)
    if probe.class_weight is not None:
        for own, rows, into in zip(labels.T, train.T, found.T, strict=True):
            into[rows] = weights_of(
                None, probe.class_weight, np.unique(own[rows]), np.unique(own[rows], return_inverse=True)[1]
            )
    return found


def _strengths(probe: LogisticProbe, rows: Scaled, index: np.ndarray, splits: Splits, groups: np.ndarray) -> list[float]:
    """C of each problem."""
    problems = splits.train.shape[1]
    if probe.C != "cv":
        return [float(probe.C)] * problems
    pairs = []
    for p, q in combinations(range(problems), 2):
        tried = splits.test[:, q] & splits.train[:, p]
        learnt = splits.train[:, p] & splits.train[:, q]
        if tried.any() and len(set(index[learnt])) == len(probe.classes_):
            pairs.append((p, q, learnt))
    if not pairs:  # of two problems, each tests what the other learnt from
        x = rows.x.cpu().numpy()
        return [afresh(probe).fit(x[own], index[own], groups=groups[own]).C_ for own in splits.train.T]
    labels = np.repeat(index[:, None], len(pairs), 1)
    fitted = probe.solve(rows, labels, weighted(probe, labels, np.stack([own for _, _, own in pairs], 1)), probe.Cs)
    own = torch.as_tensor(index, device=rows.x.device)[None, None, :, None].expand(*fitted.bias.shape[:2], -1, 1)
    losses = -log_probabilities(fitted, rows).gather(-1, own)[..., 0]
    total, n = torch.zeros(len(probe.Cs), problems, dtype=torch.float64), torch.zeros(problems, dtype=torch.float64)
    for at, (p, q, _) in enumerate(pairs):
        for one, other in ((p, q), (q, p)):
            tried = torch.from_numpy(splits.test[:, other] & splits.train[:, one]).to(losses.device)
            total[:, one] += losses[:, at, tried].sum(1).double().cpu()
            n[one] += int(tried.sum())
    return [float(probe.Cs[int(best)]) for best in (total / n.clamp_min(1)).argmin(0)]


def _from_moments(
    probe: LDAProbe | MeanDifferenceProbe, rows: Tensor, labels: np.ndarray, n_classes: int, splits: Splits
) -> tuple[np.ndarray, Any]:
    """Rows that are on the same side of every problem are summed once, beside the indicators of all label sets."""
    cells = cells_of(splits)
    z = torch.nn.functional.one_hot(torch.as_tensor(labels), n_classes).flatten(1).to(rows)
    parts = [torch.from_numpy(np.flatnonzero(cells == cell)).to(rows.device) for cell in range(cells.max() + 1)]
    sums = [Joint.of(rows[part], z[part], products=rows.dtype) for part in parts]
    found = np.full((labels.shape[1], len(rows), n_classes), np.nan)
    settled = []
    for train, test in zip(splits.train.T, splits.test.T, strict=True):
        learnt = [own for own, part in zip(sums, parts, strict=True) if train[int(part[0])]]
        asked, same = rows[torch.from_numpy(np.flatnonzero(test)).to(rows.device)], probe
        for q in range(labels.shape[1]):
            own = slice(q * n_classes, (q + 1) * n_classes)
            folds = [part._replace(mean_y=part.mean_y[own], xy=part.xy[:, own], yy=part.yy[own, own]) for part in learnt]
            there = np.flatnonzero(plus(folds).mean_y.cpu().numpy() > 0)
            some = torch.from_numpy(there).to(rows.device)
            folds = [one._replace(mean_y=one.mean_y[some], xy=one.xy[:, some], yy=one.yy[some][:, some]) for one in folds]
            fitted = afresh(same).fit_moments(folds)
            found[q, test] = -np.inf  # of a class that no training row has
            found[q][np.ix_(test, there)] = fitted.predict_log_proba(asked)
            if q == 0:
                same = fitted.settled()
                settled.append(same)
    return found, _commonest(settled)
