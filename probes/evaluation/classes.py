"""One site's probe of classes, with its controls."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from probes.dataset import Dataset
from probes.evaluation.code_length import CodeLength, code_length
from probes.evaluation.cross_fit import cross_fit
from probes.evaluation.splits import Splits, control_labels, held_out, shuffled, within_types

CONTROLS = 3
"""Draws of the control task."""


class Plan(NamedTuple):
    """What all sites of a sweep are put to: splits, shuffled labels, a control task."""

    dataset: Dataset
    splits: Splits
    shuffled: list[np.ndarray]
    """Labels that mean nothing."""
    null_splits: list[Splits]
    """Of each of these, its own: folds that are even for the true labels would be uneven for them, and worse than chance."""
    seen: Splits | None
    """Splits in which the types of what is tested were learnt from; None if too few types recur."""
    controls: list[np.ndarray]
    """Labels of the control task, drawn several times."""
    seed: int

    @classmethod
    def of(cls, dataset: Dataset, *, folds: int, shuffles: int, seed: int) -> Plan:
        """
        Raises:
            TooFewExamples: if a class is in too few groups.
        """
        random = np.random.default_rng(seed)
        splits = held_out(dataset, folds, seed)
        null = [shuffled(dataset, random) for _ in range(shuffles)]
        numbers = dataset.kind == "numbers"
        return cls(
            dataset, splits, null, [splits if numbers else held_out(dataset, folds, seed, labels) for labels in null],
            within_types(dataset, folds, seed), [control_labels(dataset, random) for _ in range(CONTROLS)], seed,
        )  # fmt: skip


class Found(NamedTuple):
    """Held-out logarithms of probabilities `[n, class]`, NaN where an example was not tested."""

    log_p: np.ndarray
    shuffled: list[np.ndarray]
    seen: np.ndarray | None
    """Of the task itself where the types of what is tested were learnt from."""
    controls: np.ndarray | None
    """Of the control tasks there, `[draw, n, class]`."""
    code: CodeLength
    shuffled_code: CodeLength | None
    settled: Any
    """The probe at the strength that was chosen most often."""


def probed(probe: Any, rows: Tensor, plan: Plan, *, controls: bool) -> Found:
    """
    Args:
        controls: Also shuffled labels and the control task.
    """
    own = plan.dataset
    index, k, groups = own.index, len(own.classes), own.groups[:, 0]
    (log_p,), settled = cross_fit(probe, rows, index[:, None], k, plan.splits, groups)
    nulls, tasks = [], None
    for labels, splits in zip(plan.shuffled, plan.null_splits, strict=True) if controls else ():
        nulls.append(cross_fit(settled, rows, labels[:, None], k, splits, groups)[0][0])
    if controls and plan.seen is not None:
        tasks, _ = cross_fit(probe, rows, np.stack([index, *plan.controls], 1), k, plan.seen, groups)
    code = code_length(probe, rows, index, k, groups, plan.seed)
    null = code_length(probe, rows, plan.shuffled[0], k, groups, plan.seed) if controls else None
    seen, controlled = (None, None) if tasks is None else (tasks[0], tasks[1:])
    return Found(log_p, nulls, seen, controlled, code, null, settled)
