"""What each probe of a cross-validation learns from, and what it is tested on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from probes.dataset import Dataset
from probes.folds import folds_by_group, numeric_folds
from workbench.errors import TooFewExamples

CROSSED = 3
"""Folds of each column, where examples are held out by two: nine cells, each learnt from what shares neither."""


class Splits(NamedTuple):
    """Rows of each problem; every example is tested in one problem at most."""

    train: np.ndarray
    """`[n, problem]`, bool."""
    test: np.ndarray

    @property
    def tested(self) -> np.ndarray:
        """Examples that are tested in some problem, `[n]`."""
        return np.asarray(self.test.any(1))

    @classmethod
    def of(cls, fold: np.ndarray, keep: np.ndarray | None = None) -> Splits:
        """A problem a fold that has something to test; `keep` says which examples are tested."""
        test = fold[:, None] == np.arange(fold.max() + 1)
        asked = test if keep is None else test & keep[:, None]
        used = asked.any(0)
        return cls(~test[:, used], asked[:, used])


def held_out(dataset: Dataset, folds: int, seed: int) -> Splits:
    """By group: what is tested shares no group with what is learnt from. Of two columns, such as word and template, it shares
    neither.

    Raises:
        TooFewExamples: if a class is in too few groups.
    """
    columns = dataset.groups.T
    if len(columns) == 1:
        return Splits.of(_folds(dataset, columns[0], folds, seed))
    a, b = (_folds(dataset, column, CROSSED, seed) for column in columns[:2])
    cells = [(i, j) for i in range(a.max() + 1) for j in range(b.max() + 1)]
    train = np.stack([(a != i) & (b != j) for i, j in cells], 1)
    test = np.stack([(a == i) & (b == j) for i, j in cells], 1)
    used = test.any(0)
    if dataset.kind == "classes":
        for learnt in train[:, used].T:
            if len(set(dataset.index[learnt])) < len(dataset.classes):
                raise TooFewExamples(
                    "Without the groups and the templates that are tested, a class has no example left to learn from. Hold out "
                    "by one column, or give more templates."
                )
    return Splits(train[:, used], test[:, used])


def within_types(dataset: Dataset, folds: int, seed: int) -> Splits | None:
    """Each type's examples dealt out over the folds, so that a random label of the type could be learnt; types with one
    example are learnt from, never tested. None if fewer than half of the examples could be."""
    own = np.unique(dataset.types, return_inverse=True)[1]
    recurs = np.bincount(own)[own] > 1
    if recurs.mean() < 0.5:
        return None
    random = np.random.default_rng(seed)
    order = random.permutation(len(own))
    order = order[np.argsort(own[order], kind="stable")]
    starts = np.searchsorted(own[order], np.arange(own.max() + 1))
    place = np.arange(len(own)) - starts[own[order]]
    fold = np.empty(len(own), np.int64)
    fold[order] = (place + random.integers(folds, size=own.max() + 1)[own[order]]) % folds
    return Splits.of(fold, recurs)


def cells_of(splits: Splits) -> np.ndarray:
    """Which rows are on the same side of every problem, `[n]`: their sums need to be made once."""
    return np.unique(np.concatenate([splits.train, splits.test], 1), axis=0, return_inverse=True)[1].ravel()


def _folds(dataset: Dataset, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    if dataset.kind == "numbers":
        return numeric_folds(len(dataset), groups, folds, seed)
    return folds_by_group(dataset.index, groups, folds, seed)


def shuffled(dataset: Dataset, random: np.random.Generator) -> np.ndarray:
    """Labels that mean nothing, of each example: indices of classes `[n]`, or targets `[n, target]`.

    Where all examples of a group have one label, whole groups change theirs, so that the null repeats itself as the labels do:
    classes are dealt out to groups in random order, each by what it still lacks of its examples. Else examples are shuffled.
    """
    own = dataset.labels if dataset.kind == "numbers" else dataset.index
    groups = np.unique(dataset.groups[:, 0], return_inverse=True)[1]
    first = np.unique(groups, return_index=True)[1]
    if (own != own[first[groups]]).any():
        return own[random.permutation(len(own))]
    if dataset.kind == "numbers":
        return own[first[random.permutation(len(first))][groups]]
    sizes, lacking = np.bincount(groups), np.bincount(own).astype(float)
    dealt = np.empty(len(first), own.dtype)
    for group in random.permutation(len(first)):
        dealt[group] = random.choice(len(lacking), p=lacking.clip(0) / lacking.clip(0).sum())
        lacking[dealt[group]] -= sizes[group]
    return dealt[groups]


def control_labels(dataset: Dataset, random: np.random.Generator) -> np.ndarray:
    """Of each type the label of an example drawn at random (Hewitt and Liang 2019), as `shuffled` gives labels: their shares
    stay, what they meant does not."""
    own = np.unique(dataset.types, return_inverse=True)[1]
    drawn = random.integers(len(dataset), size=own.max() + 1)[own]
    return (dataset.labels if dataset.kind == "numbers" else dataset.index)[drawn]
