"""One site's probe of classes, with its controls."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from probes.dataset import Dataset
from probes.evaluation.code_length import CodeLength, code_length
from probes.evaluation.cross_fit import cross_fit
from probes.evaluation.splits import Splits, control_labels, held_out, shuffled, within_types


class Plan(NamedTuple):
    """What all sites of a sweep are put to: splits, shuffled labels, a control task."""

    dataset: Dataset
    splits: Splits
    shuffled: list[np.ndarray]
    """Labels that mean nothing."""
    seen: Splits | None
    """Splits in which the types of what is tested were learnt from; None if too few types recur."""
    control: np.ndarray
    """Labels of the control task."""
    seed: int

    @classmethod
    def of(cls, dataset: Dataset, *, folds: int, shuffles: int, seed: int) -> Plan:
        """
        Raises:
            TooFewExamples: if a class is in too few groups.
        """
        random = np.random.default_rng(seed)
        return cls(
            dataset, held_out(dataset, folds, seed), [shuffled(dataset, random) for _ in range(shuffles)],
            within_types(dataset, folds, seed), control_labels(dataset, random), seed,
        )  # fmt: skip


class Found(NamedTuple):
    """Held-out logarithms of probabilities `[n, class]`, NaN where an example was not tested."""

    log_p: np.ndarray
    shuffled: np.ndarray
    """`[shuffle, n, class]`."""
    seen: np.ndarray | None
    """Of the task itself where the types of what is tested were learnt from."""
    control: np.ndarray | None
    """Of the control task there."""
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
    labels = np.stack([index, *(plan.shuffled if controls else ())], 1)
    log_p, settled = cross_fit(probe, rows, labels, k, plan.splits, groups)
    seen = control = None
    if controls and plan.seen is not None:
        tasks = np.stack([index, plan.control], 1)
        (seen, control), _ = cross_fit(probe, rows, tasks, k, plan.seen, groups)
    code = code_length(probe, rows, index, k, groups, plan.seed)
    null = code_length(probe, rows, labels[:, 1], k, groups, plan.seed) if controls else None
    return Found(log_p[0], log_p[1:], seen, control, code, null, settled)
