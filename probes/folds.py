"""Who is held out: whole groups, so that no word, name or template is on both sides."""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.errors import TooFewExamples


def folds_by_group(index: np.ndarray, groups: Any, folds: int, seed: int) -> np.ndarray:
    """The fold of each row, `[n]`, from 0: rows of one group lie in one fold, and folds have about the same share of each class
    (scikit-learn's StratifiedGroupKFold). There are fewer folds where a class has fewer groups.

    Args:
        index: Of each row's class.
        groups: `[n]`; None makes every row one.
    Raises:
        TooFewExamples: if a class has fewer than two groups, so that it cannot be both learnt and held out.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    own = np.arange(len(index)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    fewest = min(len(np.unique(own[index == i])) for i in np.unique(index))
    if fewest < 2 or folds < 2:
        raise TooFewExamples(
            f"folds={folds}, and the class with the fewest groups has {fewest}. Two of each are needed, one to learn from and "
            "one to hold out: give more examples, or join classes."
        )
    n = min(folds, fewest)
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    found = np.empty(len(index), np.int64)
    parts = splitter(n, shuffle=True, random_state=seed).split(index[:, None], index, None if groups is None else own)
    for i, (_, held_out) in enumerate(parts):
        found[held_out] = i
    require_learnable(index, found)
    return found


def numeric_folds(n: int, groups: Any, folds: int, seed: int) -> np.ndarray:
    """As `folds_by_group`, for targets that are numbers: groups are dealt out at random, the largest first, to the smallest
    fold.

    Raises:
        TooFewExamples: if there are fewer than two groups.
    """
    own = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sizes = np.bincount(own)
    k = min(folds, len(sizes))
    if k < 2:
        raise TooFewExamples(
            f"folds={folds}, {len(sizes)} groups, n_samples={n}: two groups are needed, one to learn from and one to hold out."
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of, filled = np.empty(len(sizes), np.int64), np.zeros(k, np.int64)
    for group in order:
        fold_of[group] = filled.argmin()
        filled[fold_of[group]] += sizes[group]
    return fold_of[own]


def require_learnable(index: np.ndarray, fold: np.ndarray) -> None:
    """
    Raises:
        TooFewExamples: if some fold holds all rows of a class, so that the others cannot teach it.
    """
    for i in range(fold.max() + 1):
        if missing := sorted(set(index.tolist()) - set(index[fold != i].tolist())):
            raise TooFewExamples(
                f"All examples of class {missing[0]} (in sorted order) fall into one fold: their groups are too few or too "
                "unequal. Give more groups, or fewer folds."
            )
