"""Iterative nullspace projection: find a direction that tells the classes apart, remove it, and look again."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import clone
from torch import Tensor

from probes.erasers.concept import Concept, solved_by
from probes.erasers.eraser import Eraser
from probes.estimators.inputs import classes_of, require_as_many, require_positive, rows_of
from probes.estimators.logistic import LogisticProbe
from probes.folds import folds_by_group
from workbench.analyses.held_out_loss import mean_and_error
from workbench.errors import BadDataset, NotFinite, UnknownOption
from workbench.moments.joint import Joint

INDEPENDENT = 1e-6
"""What must be left of a classifier's weights, relative to their length, once what was removed before is taken away."""
HELD_OUT = 5
"""One in so many groups says when there is nothing more to be found."""


class Round(NamedTuple):
    """One round of INLP."""

    rank: int
    """Dimensions removed before it."""
    accuracy: float
    """Of its classifier, on groups held out."""
    chance: float
    """Of the commonest class."""
    error: float
    """The standard error of the difference, over groups."""
    main_class: Any = None
    """The class of the main task that it was trained on."""

    def found(self, errors: float) -> bool:
        """Whether the classifier does better than chance by so many errors."""
        return self.accuracy > self.chance + errors * self.error


class INLP(Eraser):
    """Iterative nullspace projection (Ravfogel et al. 2020, arXiv 2004.07667): orthogonal, one or more directions a round.

    Differently from the published code: an orthonormal basis is kept, to which each classifier's weights are added where they
    are independent of it (published: the range of a sum of projections, which takes two directions that differ by rounding for
    two); the projection leaves the mean where it is; and a round that finds nothing on held-out groups ends it (published: it
    is skipped, and with a deterministic classifier repeats for ever) without removing what it found.

    Attributes:
        rounds_: What each round found (`Round`).
        classifiers_: Weights of each round that was taken, `[k, d]`.
    """

    def __init__(
        self,
        classifier: Any = "logistic",
        *,
        directions: int | None = None,
        rounds: int = 100,
        errors: float = 1.0,
        patience: int = 3,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        """
        Args:
            classifier: A linear classifier of scikit-learn's kind, with `coef_` after `fit`; `logistic`: `LogisticProbe`, its
                strength chosen in the first round.
            directions: The budget: at most so many are removed. The width, if None.
            rounds: At most.
            errors: Standard errors (over groups) above the commonest class, from which on a round has found something.
            patience: Rounds after one another that find nothing, at which it ends; what they found is not removed.
        """
        self.classifier, self.directions, self.rounds = classifier, directions, rounds
        self.errors, self.patience, self.seed, self.device = errors, patience, seed, device

    def fit(self, X: Any, y: Any = None, *, groups: Any = None, main: Any = None) -> INLP:
        """
        Args:
            groups: `[n]`; a fifth of them is held out to say when to end.
            main: `[n]`, labels of another task. Each round then learns from the rows of one of its classes, so that the concept
                is removed within classes (for equal odds; the published option by_class).
        Raises:
            TooFewExamples: for one class, or a class in fewer than two groups.
            UnknownOption: for a larger budget than rows have columns, or a classifier without coefficients.
        """
        require_positive(rounds=self.rounds, patience=self.patience)
        rows = rows_of(self, X, fitting=True, device=self.device)
        self.classes_, index = classes_of(y, len(rows))
        budget = self._budget(rows.shape[1])
        own = np.arange(len(rows)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        require_as_many(len(own), len(rows), "groups")
        held_out = folds_by_group(index, own, HELD_OUT, self.seed) == 0
        parts = _parts(main, index, own, held_out)
        random = np.random.default_rng(self.seed)
        mean = rows.mean(0, dtype=torch.float64)
        basis = torch.zeros(len(mean), 0, dtype=torch.float64, device=rows.device)
        classifier, self.rounds_, self.classifiers_, idle, taken = self._first(), [], [], 0, 0
        for _ in range(self.rounds):
            if basis.shape[1] >= budget:
                break
            name = None if main is None else random.choice(list(parts))
            part = parts[name]
            left = _without(rows, mean, basis)
            fitted, weight = _fitted(classifier, left, index, part & ~held_out, own)
            classifier = fitted.settled() if isinstance(fitted, LogisticProbe) else classifier
            new = independent(weight.to(basis.device), basis)[:, : budget - basis.shape[1]]
            self.rounds_.append(_scored(fitted, left, index, part, held_out, own, basis.shape[1], name))
            idle = 0 if self.rounds_[-1].found(self.errors) and new.shape[1] else idle + 1
            basis = torch.cat([basis, new], 1)
            self.classifiers_.append(weight.cpu().numpy())
            taken = basis.shape[1] if not idle else taken
            if idle >= self.patience * (1 if main is None else len(parts)) or not new.shape[1]:
                break
        self.classifiers_ = self.classifiers_[: len(self.classifiers_) - idle]
        return self._set(mean, basis[:, :taken], basis[:, :taken])

    def fit_moments(self, joint: Joint) -> INLP:
        """By moments alone: each round's weights are those of discriminant analysis of what is left, Σ⁻¹C, and it ends when
        what is left correlates with the concept no more than by chance.

        Args:
            joint: Of rows and the concept's columns.
        """
        require_positive(rounds=self.rounds)
        budget = self._budget(len(joint.mean_x))
        basis = joint.xx.new_zeros(len(joint.mean_x), 0)
        self.rounds_, self.classifiers_ = [], []
        for _ in range(self.rounds):
            left = torch.eye(len(basis), dtype=basis.dtype, device=basis.device) - basis @ basis.T
            concept = Concept.of(joint._replace(xx=left @ joint.xx @ left, xy=left @ joint.xy))
            if not concept.cross.shape[1] or basis.shape[1] >= budget:
                break
            weight = solved_by(concept.covariance, concept.cross)[0].T
            new = independent(weight, basis)[:, : budget - basis.shape[1]]
            basis = torch.cat([basis, new], 1)
            self.classifiers_.append(weight.cpu().numpy())
        return self._set(joint.mean_x, basis, basis)

    def _budget(self, width: int) -> int:
        if self.directions is not None and not 1 <= self.directions <= width:
            raise UnknownOption(f"directions={self.directions} is out of range: rows have {width} columns.")
        return self.directions or width

    def _first(self) -> Any:
        if not isinstance(self.classifier, str):
            return self.classifier
        if self.classifier != "logistic":
            raise UnknownOption(f"classifier={self.classifier!r} is not known. Give 'logistic', or a linear classifier.")
        return LogisticProbe(seed=self.seed, device=self.device)


def independent(weight: Float[Tensor, "k d"], basis: Float[Tensor, "d r"]) -> Float[Tensor, "d new"]:
    """Orthonormal directions that the weights add to an orthonormal basis.

    Each row is scaled to length 1, so that a classifier of rows in thousands, whose weights are small, counts as any other;
    what the basis has is taken away twice (once leaves rounding as large as what is new, where that is little).
    """
    lengths = weight.norm(dim=1, keepdim=True)
    rows = (weight / torch.where(lengths > 0, lengths, 1.0)).to(basis)
    for _ in range(2):
        rows = rows - (rows @ basis) @ basis.T
    _, sizes, found = torch.linalg.svd(rows, full_matrices=False)
    return found[sizes > INDEPENDENT].T


def _without(rows: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """The rows as they were, less all that was removed: errors of rounds do not add up."""
    if not basis.shape[1]:
        return rows
    own = basis.to(rows.dtype)
    return rows - ((rows - mean.to(rows.dtype)) @ own) @ own.T


def _fitted(classifier: Any, rows: Tensor, index: np.ndarray, train: np.ndarray, groups: np.ndarray) -> tuple[Any, Tensor]:
    some = rows[torch.from_numpy(np.flatnonzero(train)).to(rows.device)]
    fitted: Any = clone(classifier)
    if isinstance(fitted, LogisticProbe):
        fitted.fit(some, index[train], groups=groups[train])
    else:
        fitted.fit(some.cpu().numpy(), index[train])
    if not hasattr(fitted, "coef_"):
        raise UnknownOption(f"A {type(fitted).__name__} has no coef_: it is no linear classifier. Give one that has.")
    weight = torch.as_tensor(np.atleast_2d(fitted.coef_), dtype=torch.float64)
    if not bool(torch.isfinite(weight).all()):
        raise NotFinite(f"The {type(fitted).__name__} found coefficients that are no numbers. Scale the rows.")
    return fitted, weight


def _scored(
    fitted: Any,
    rows: Tensor,
    index: np.ndarray,
    part: np.ndarray,
    held_out: np.ndarray,
    groups: np.ndarray,
    rank: int,
    name: Any,
) -> Round:
    test = part & held_out
    some = rows[torch.from_numpy(np.flatnonzero(test)).to(rows.device)]
    predicted = fitted.predict(some if isinstance(fitted, LogisticProbe) else some.cpu().numpy())
    commonest = np.bincount(index[part]).argmax()
    hits, luck = (predicted == index[test]).astype(float), (index[test] == commonest).astype(float)
    _, error = mean_and_error(hits - luck, groups[test])
    return Round(rank, float(hits.mean()), float(luck.mean()), error, name)


def _parts(main: Any, index: np.ndarray, groups: np.ndarray, held_out: np.ndarray) -> dict[Any, np.ndarray]:
    """Rows of each class of the main task from which the concept can be learnt, two groups of each of its classes there, and in
    which some rows are held out."""
    if main is None:
        return {None: np.ones(len(index), bool)}
    main = np.asarray(main)
    require_as_many(len(main), len(index), "labels of the main task")
    found = {}
    for name in np.unique(main):
        own = main == name
        learnt = own & ~held_out
        sizes = [len(set(groups[learnt & (index == z)])) for z in set(index[learnt])]
        if len(sizes) > 1 and min(sizes) > 1 and (own & held_out).any():
            found[name] = own
    if not found:
        raise BadDataset("No class of the main task has rows of two classes of the concept, so none can be learnt within one.")
    return found
