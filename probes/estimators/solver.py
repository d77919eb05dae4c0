"""Many logistic regressions on the same rows at once: of every fold, every strength of the penalty, every set of labels.

All problems share two products with the rows a step, so that 50 regressions cost about five times what one does; those that are
solved are left behind. Steps are those of L-BFGS (Liu and Nocedal 1989) in coordinates in which the rows' covariance and the
penalty together are the identity: half as many as scikit-learn's takes on standardised rows. Lines are searched at no product
more: logits are linear along them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.moments.products import add_square

MEMORY = 10
"""Steps that L-BFGS looks back."""
CURVATURE = 0.15
"""Of the loss, by which the penalty is weighed in the coordinates taken: a logit's p(1 - p) is 0.25 at most."""
ROWS_A_COLUMN = 16
"""Rows by which the coordinates are chosen, for each column: they decide the number of steps, not the solution."""
LINE_STEPS = 8


class Logistic(NamedTuple):
    """Solutions, `[strength, problem, logit, …]`; two classes have one logit, of the second."""

    weight: Float[Tensor, "strength problem logit column"]
    bias: Float[Tensor, "strength problem logit"]
    steps: int
    gradient: Float[Tensor, "strength problem"]
    """The largest entry of the mean loss's gradient that was left."""


@torch.no_grad()
def solve_logistic(
    x: Float[Tensor, "row column"],
    labels: Int[Tensor, "row problem"],
    weights: Float[Tensor, "row problem"],
    penalties: Float[Tensor, "strength problem column"],
    n_classes: int,
    *,
    tol: float,
    max_steps: int,
    start: Logistic | None = None,
) -> Logistic:
    """Minimise Σ_i weight_i · -log p(label_i | x_i) + ½ Σ_j penalty_j |w_j|², the bias free, for every strength and problem.

    Args:
        x: About centred and of about unit scale; anything else costs steps.
        weights: Of a row in a problem; 0 leaves it out.
        tol: The largest entry of the gradient, over the problem's weights, at which it is solved: as scikit-learn's.
        start: The solution of a problem like this one; 0, if None.
    """
    shape = (*penalties.shape[:2], 1 if n_classes == 2 else n_classes)
    start = start or Logistic(x.new_zeros(*shape, x.shape[1]), x.new_zeros(shape), 0, x.new_zeros(shape[:2]))
    return _from(start, x, labels, weights, penalties, _covariance(x), tol, max_steps)


def _from(
    start: Logistic,
    x: Tensor,
    labels: Tensor,
    weights: Tensor,
    penalties: Tensor,
    covariance: Tensor,
    tol: float,
    max_steps: int,
) -> Logistic:
    """The solutions, from a start. When half of them are there, the strengths and problems that are not done go on alone."""
    weight, bias = start.weight, start.bias
    strengths, problems = bias.shape[:2]
    total = weights.sum(0)
    loss, scale = _Loss(x, labels, weights, bias.shape[2]), _Coordinates(covariance, penalties, total)
    logits, u = loss.logits(weight, bias), scale.back(weight, bias)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    previous: tuple[Tensor, Tensor] | None = None
    largest, some, steps = start.gradient, (total, total), 0
    for steps in range(max_steps + 1):
        slope_w, slope_b = loss.slopes(logits)
        slope_w = slope_w + (penalties[:, :, None] * weight)
        largest = torch.maximum(slope_w.abs().amax((2, 3)), slope_b.abs().amax(2)) / total
        left = largest > tol
        some = (left.any(1).nonzero()[:, 0], left.any(0).nonzero()[:, 0])
        if steps == max_steps or 2 * len(some[0]) * len(some[1]) <= strengths * problems:
            break
        gradient = scale.slopes(slope_w, slope_b)
        if previous is not None:
            pairs = [*pairs[1 - MEMORY :], _pair(u - previous[0], gradient - previous[1])]
        previous = (u, gradient)
        direction = -_times_inverse_hessian(gradient, pairs) * left.reshape(-1, 1, 1)
        along_w, along_b = scale.of(direction)
        along = loss.logits(along_w, along_b)
        falls = (gradient * direction).sum((1, 2)).reshape(strengths, problems).abs()
        step = loss.best_step(logits, along, weight, along_w, penalties, falls)
        weight, bias = weight + step[:, :, None, None] * along_w, bias + step[:, :, None] * along_b
        logits = logits + step[..., None] * along
        u = u + step.reshape(-1, 1, 1) * direction
    if len(some[0]) and steps < max_steps:
        s, q = some[0][:, None], some[1]
        begun = Logistic(weight[s, q], bias[s, q], 0, largest[s, q])
        rest = _from(begun, x, labels[:, q], weights[:, q], penalties[s, q], covariance, tol, max_steps - steps)
        weight[s, q], bias[s, q], largest[s, q] = rest.weight, rest.bias, rest.gradient
        steps += rest.steps
    return Logistic(weight, bias, steps, largest)


def _covariance(x: Tensor) -> Tensor:
    """Of enough rows."""
    rows = x[:: max(1, len(x) // (ROWS_A_COLUMN * x.shape[1]))]
    found = x.new_zeros(x.shape[1], x.shape[1])
    add_square(found, rows)
    return (found.tril() + found.tril(-1).T) / len(rows)


def _times_inverse_hessian(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """L-BFGS's two loops, of all problems at once."""
    if not pairs:
        return gradient
    found, kept = gradient, []
    for moved, turned, inverse in reversed(pairs):
        share = (moved * found).sum((1, 2)) * inverse
        found = found - share[:, None, None] * turned
        kept.append(share)
    _, turned, inverse = pairs[-1]
    bent = inverse * turned.square().sum((1, 2))
    found = found * torch.where(bent > 0, 1 / bent, 1.0)[:, None, None]
    for (moved, turned, inverse), share in zip(pairs, reversed(kept), strict=True):
        found = found + (share - (turned * found).sum((1, 2)) * inverse)[:, None, None] * moved
    return found


def _pair(moved: Tensor, turned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A step, what the gradient turned by, and one over their product; 0 where the loss is as good as straight along the step,
    as along the bias of a class without rows, or nothing moved: such a step says nothing of how the loss bends."""
    product, sizes = (moved * turned).sum((1, 2)), moved.norm(dim=(1, 2)) * turned.norm(dim=(1, 2))
    return moved, turned, torch.where(product > torch.finfo(moved.dtype).eps * sizes, 1 / product, 0.0)


class _Coordinates:
    """u, in which the penalised loss is about round: w = L⁻ᵀu with LLᵀ = curvature · covariance + penalty."""

    def __init__(self, covariance: Tensor, penalties: Tensor, total: Tensor) -> None:
        self.strengths, self.problems = penalties.shape[:2]
        each = (penalties / total[:, None]).mean(1)  # problems differ little: one factorisation does for all of a strength
        matrix = CURVATURE * covariance + torch.diag_embed(each)
        matrix.diagonal(dim1=1, dim2=2).add_(1e-5 * covariance.diagonal() + 1e-12)
        self.factor = torch.linalg.cholesky(matrix)
        self.size = total.sqrt()
        self.bias_size = (CURVATURE * total).sqrt()

    def of(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and biases at u."""
        u = u.reshape(self.strengths, self.problems, *u.shape[1:])
        flat = u[..., :-1].flatten(1, 2).mT
        weight = torch.linalg.solve_triangular(self.factor.mT, flat, upper=True).mT.reshape_as(u[..., :-1])
        return weight / self.size[:, None, None], u[..., -1] / self.bias_size[:, None]

    def back(self, weight: Tensor, bias: Tensor) -> Tensor:
        """u of weights and biases."""
        own = (weight * self.size[:, None, None]).flatten(1, 2) @ self.factor
        return torch.cat([own.reshape(weight.shape), (bias * self.bias_size[:, None])[..., None]], -1).flatten(0, 1)

    def slopes(self, slope_w: Tensor, slope_b: Tensor) -> Tensor:
        """The gradient in u."""
        flat = slope_w.flatten(1, 2).mT
        own = torch.linalg.solve_triangular(self.factor, flat, upper=False).mT.reshape_as(slope_w)
        own = own / self.size[:, None, None]
        return torch.cat([own, (slope_b / self.bias_size[:, None])[..., None]], -1).flatten(0, 1)


class _Loss:
    """The loss of all problems; logits are `[row, strength, problem, logit]`, one column a logit."""

    def __init__(self, x: Tensor, labels: Tensor, weights: Tensor, k: int) -> None:
        self.x, self.k = x, k
        self.weights = weights[:, None, :, None]
        if k == 1:
            self.wanted = labels.to(x.dtype)[:, None, :, None]
        else:
            self.wanted = torch.nn.functional.one_hot(labels, k).to(x.dtype)[:, None]

    def logits(self, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias.flatten(), self.x, weight.flatten(0, 2).T).reshape(-1, *bias.shape)

    def slopes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the loss by weights and biases."""
        off = (self._probabilities(logits) - self.wanted) * self.weights
        flat = off.flatten(1)
        return (flat.T @ self.x).reshape(*logits.shape[1:], -1), flat.sum(0).reshape(logits.shape[1:])

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.k == 1 else logits.softmax(-1)

    def best_step(
        self, logits: Tensor, along: Tensor, weight: Tensor, along_w: Tensor, penalties: Tensor, falls: Tensor
    ) -> Tensor:
        """Where the line's slope is at most a tenth of what it is at its start (`falls`), by Newton's method held within a
        bracket."""
        p = penalties[:, :, None]
        first, second = (p * weight * along_w).sum((2, 3)), (p * along_w.square()).sum((2, 3))
        step = torch.ones_like(first)
        low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
        weighted = along * self.weights
        for _ in range(LINE_STEPS):
            q = self._probabilities(logits + step[..., None] * along)
            slope = ((q - self.wanted) * weighted).sum((0, 3)) + first + step * second
            if bool((slope.abs() <= 0.1 * falls).all()):
                break
            mean = 0.0 if self.k == 1 else (q * along).sum(-1, keepdim=True)
            spread = q * (1 - q) if self.k == 1 else q
            bend = (spread * (along - mean) * weighted).sum((0, 3)) + second
            low, high = torch.where(slope < 0, step, low), torch.where(slope > 0, step, high)
            newton = step - slope / bend.clamp_min(1e-30)
            middle = torch.where(high.isinf(), 2 * step, (low + high) / 2)
            step = torch.where((newton > low) & (newton < high), newton, middle)
        return step
