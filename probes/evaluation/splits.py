"""What each probe of a cross-validation learns from, and what it is tested on."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from probes.dataset import Dataset
from probes.folds import folds_by_group, numeric_folds
from workbench.errors import TooFewExamples

OF_GROUPS = 0.9
"""Share of examples that have their group's commonest label, from which on labels are the groups'."""
CROSSED = 3
"""Folds of each column, where examples are held out by two: nine cells, each learnt from what shares neither."""


class Splits(NamedTuple):
    """Rows of each problem; every example is tested in one problem at most."""

    train: np.ndarray
    """`[n, problem]`, bool."""
    test: np.ndarray
    crossed: bool = False
    """Whether by two columns: training rows of two problems then share some of what each holds out."""

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


def held_out(dataset: Dataset, folds: int, seed: int, index: np.ndarray | None = None) -> Splits:
    """By group: what is tested shares no group with what is learnt from. Of two columns, such as word and template, it shares
    neither. Folds have like shares of the classes: of other labels than the dataset's, if `index` gives them.

    Raises:
        TooFewExamples: if a class is in too few groups.
    """
    columns = dataset.groups.T
    index = dataset.index if index is None and dataset.kind == "classes" else np.zeros(0) if index is None else index
    if len(columns) == 1:
        return Splits.of(_folds(dataset, index, columns[0], folds, seed))
    a, b = (_folds(dataset, index, column, CROSSED, seed) for column in columns)
    cells = [(i, j) for i in range(a.max() + 1) for j in range(b.max() + 1)]
    train = np.stack([(a != i) & (b != j) for i, j in cells], 1)
    test = np.stack([(a == i) & (b == j) for i, j in cells], 1)
    used = test.any(0)
    if dataset.kind == "classes":
        for learnt in train[:, used].T:
            if len(set(index[learnt])) < len(set(index)):
                raise TooFewExamples(
                    "Without the groups and the templates that are tested, a class has no example left to learn from. Hold out "
                    "by one column, or give more templates."
                )
    return Splits(train[:, used], test[:, used], crossed=True)


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


def _folds(dataset: Dataset, index: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    if dataset.kind == "numbers":
        return numeric_folds(len(dataset), groups, folds, seed)
    return folds_by_group(index, groups, folds, seed)


def shuffled(dataset: Dataset, random: np.random.Generator) -> np.ndarray:
    """Labels that mean nothing, of each example: indices of classes `[n]`, or targets `[n, target]`.

    Where groups have a label of their own (nearly: 9 in 10 examples share their group's commonest), whole groups change
    theirs, so that the null repeats itself as the labels do. Else examples are shuffled.
    """
    own = dataset.labels if dataset.kind == "numbers" else dataset.index
    groups = np.unique(dataset.groups[:, 0], return_inverse=True)[1]
    first = np.unique(groups, return_index=True)[1]
    if dataset.kind == "numbers":
        if (own != own[first[groups]]).any():
            return own[random.permutation(len(own))]
        return own[first[random.permutation(len(first))][groups]]
    table = np.zeros((len(first), own.max() + 1))
    np.add.at(table, (groups, own), 1)
    if table.max(1).sum() < OF_GROUPS * len(own):
        return own[random.permutation(len(own))]
    return dealt(own, groups, random)


def shuffled_set(dataset: Dataset, seed: int) -> Dataset:
    """The same examples with labels of classes that mean nothing."""
    labels = dataset.classes[shuffled(dataset, np.random.default_rng(seed))]
    return replace(dataset, labels=labels, name=f"{dataset.name}, shuffled")


def control_labels(dataset: Dataset, random: np.random.Generator) -> np.ndarray:
    """A label of each type that means nothing (Hewitt and Liang 2019), as `shuffled` gives labels: classes keep their
    shares."""
    own = np.unique(dataset.types, return_inverse=True)[1]
    if dataset.kind == "numbers":
        return dataset.labels[random.integers(len(dataset), size=own.max() + 1)[own]]
    return dealt(dataset.index, own, random)


def dealt(index: np.ndarray, units: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Classes dealt out to units in random order, each by what it still lacks of its examples; every class to some unit, where
    there are enough of them."""
    sizes, lacking = np.bincount(units), np.bincount(index).astype(float)
    found = np.empty(len(sizes), index.dtype)
    order = random.permutation(len(sizes))
    for place, unit in enumerate(order):
        missing = np.setdiff1d(np.arange(len(lacking)), found[order[:place]])
        if len(missing) and len(missing) >= len(order) - place:
            found[unit] = missing[0]
        else:
            share = lacking.clip(0)
            share = share if share.sum() else np.ones_like(share)
            found[unit] = random.choice(len(lacking), p=share / share.sum())
        lacking[found[unit]] -= sizes[unit]
    return found[units]
