"""Relaxed linear adversarial concept erasure: a projection against which the best linear classifier does worst."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.erasers.eraser import Eraser
from probes.estimators.inputs import classes_of, require_positive, rows_of
from probes.estimators.linear import standardised
from probes.estimators.solver import Logistic, solve_logistic
from workbench.errors import UnknownOption, require_one_of

BISECTIONS = 50
EVERY = 5
"""Steps after which the relaxed projection is made one, to see what it leaves."""
TOLERANCE, STEPS = 1e-3, 25
"""Of the classifier's answers."""


class RLACE(Eraser):
    """R-LACE (Ravfogel et al. 2022, arXiv 2201.12091): of all orthogonal projections that remove `directions` dimensions, the
    one under which logistic regression's least loss is largest, sought among their convex hull, 0 ≤ P ≤ 1 with tr P =
    directions.

    Differently from the published code, which takes small random steps by turns (up to 75,000, an eigendecomposition each), the
    classifier's best answer to each projection is found, on all rows, from its last one on; and the projection then takes a
    step along the slope of that best loss. Kept is the step that, made a projection, leaves the largest loss on the rows
    (published: the lowest accuracy, on the rows as well).

    With as many directions as the concept has independent columns, the optimum is known: no linear classifier does better than
    chance just where class means are equal (Belrose et al. 2023, theorem 3.1), so it is mean projection. With fewer it is not.

    Attributes:
        losses_: What the best classifier was left with after each step tried, nats.
        chance_: What it would be left with without the rows.
    """

    def __init__(
        self,
        directions: int = 1,
        *,
        start: str = "covariance",
        steps: int = 200,
        step_size: float = 0.3,
        penalty: float = 1e-2,
        tol: float = 1e-4,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        """
        Args:
            directions: How many are removed.
            start: `covariance`: the directions that covary most with the concept; `random`, as published.
            steps: Of the projection, at most.
            step_size: Length of the first step for one direction, in eigenvalues of the projection; later ones shrink with the
                root of their number.
            penalty: Of half the classifier's squared weights, for rows of mean variance 1 and the mean loss.
            tol: It ends where the loss lacks less than this share of what it would be without the rows.
        """
        self.directions, self.start, self.steps, self.step_size = directions, start, steps, step_size
        self.penalty, self.tol, self.seed, self.device = penalty, tol, seed, device

    def fit(self, X: Any, y: Any = None, *, groups: Any = None) -> RLACE:
        """
        Args:
            groups: Not looked at: it is fitted to all rows.
        Raises:
            TooFewExamples: for one class.
            UnknownOption: for more directions than rows have columns.
        """
        require_positive(steps=self.steps, step_size=self.step_size, penalty=self.penalty)
        require_one_of("start", self.start, ("covariance", "random"))
        rows = rows_of(self, X, fitting=True, device=self.device)
        self.classes_, index = classes_of(y, len(rows))
        if not 1 <= self.directions <= rows.shape[1]:
            raise UnknownOption(f"directions={self.directions} is out of range: rows have {rows.shape[1]} columns.")
        mean = rows.mean(0, dtype=torch.float64)
        x, _, _ = standardised(rows, torch.ones(len(rows), device=rows.device), standardize=False)
        game = Game(x, torch.as_tensor(index, device=x.device), self.penalty)
        shares = torch.bincount(game.labels).double() / len(rows)
        self.chance_ = float(-(shares * shares.log()).sum())
        relaxed = self._begun(game)
        best, kept, self.losses_ = -1.0, relaxed[:, : self.directions], []
        for step in range(self.steps):
            if step % EVERY == 0:
                exact = leading(relaxed, self.directions)
                self.losses_.append(game.loss(exact @ exact.T))
                if self.losses_[-1] > best:
                    best, kept = self.losses_[-1], exact
                if best >= self.chance_ * (1 - self.tol):
                    break
            slope = game.slope(relaxed)
            length = self.step_size * (self.directions / (1 + step)) ** 0.5
            relaxed = hull_projection(relaxed + length * slope / slope.norm().clamp_min(1e-30), self.directions)
        return self._set(mean, kept, kept)

    def _begun(self, game: Game) -> Tensor:
        """The first projection."""
        d = game.x.shape[1]
        if self.start == "random":
            drawn = torch.randn(d, self.directions, generator=torch.Generator().manual_seed(self.seed)).to(game.x)
            basis = torch.linalg.qr(drawn)[0]
            return basis @ basis.T
        basis = torch.linalg.svd(game.cross, full_matrices=False)[0][:, : self.directions]
        return basis @ basis.T


class Game:
    """Logistic regression on what projections leave of rows, one after another."""

    def __init__(self, x: Tensor, labels: Tensor, penalty: float) -> None:
        """
        Args:
            x: About centred and of about unit scale.
        """
        self.x, self.labels, self.penalty = x, labels, penalty
        self.z = torch.nn.functional.one_hot(labels).to(x)
        self.cross = x.T @ (self.z - self.z.mean(0)) / len(x)
        self.last: Logistic | None = None

    def loss(self, projection: Tensor) -> float:
        """The least mean loss, nats, without the penalty."""
        log_p, _ = self._answer(projection)
        return float(-(log_p * self.z).sum(1).mean())

    def slope(self, projection: Tensor) -> Tensor:
        """Of the least loss by the projection: at the best answer, the classifier's own change counts for nothing (Danskin)."""
        log_p, weight = self._answer(projection)
        off = (log_p.exp() - self.z) / len(self.x)
        found = -(self.x.T @ off) @ weight
        return (found + found.T) / 2

    def _answer(self, projection: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of probabilities `[n, class]`, and weights `[class, d]`."""
        left = self.x - self.x @ projection
        k = self.z.shape[1]
        found = solve_logistic(
            left, self.labels[:, None], left.new_ones(len(left), 1),
            left.new_full((1, 1, left.shape[1]), self.penalty * len(left)), k, tol=TOLERANCE, max_steps=STEPS, start=self.last,
        )  # fmt: skip
        self.last = found
        weight, bias = found.weight[0, 0], found.bias[0, 0]
        if k == 2:
            weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
        return (left @ weight.T + bias).log_softmax(-1), weight


def hull_projection(matrix: Float[Tensor, "d d"], trace: int) -> Float[Tensor, "d d"]:
    """The nearest matrix with eigenvalues from 0 to 1 that add up to `trace` (Vu et al. 2013): eigenvalues are moved alike and
    cut off."""
    values, vectors = torch.linalg.eigh(matrix)
    low, high = values.min() - 1, values.max()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        more = (values - middle).clamp(0, 1).sum() > trace
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return (vectors * (values - (low + high) / 2).clamp(0, 1)) @ vectors.T


def leading(matrix: Float[Tensor, "d d"], rank: int) -> Float[Tensor, "d rank"]:
    """The leading eigenvectors."""
    return torch.linalg.eigh(matrix)[1][:, -rank:]
