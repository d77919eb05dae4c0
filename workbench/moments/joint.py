"""Second moments of paired rows, centred: all that a linear map from one to the other, and its score, depend on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.moments.products import add_square

PILOT = 256
"""Rows whose mean the others are counted from."""


class Joint(NamedTuple):
    """Counts, means and centred sums of products of `n` pairs of rows x, y; all float64.

    `xx` is the sum over rows of (x - mean)(x - mean)ᵀ, not divided by n: sums add, and a ridge strength is in the units of
    scikit-learn's.
    """

    n: int
    mean_x: Float[Tensor, " dx"]
    mean_y: Float[Tensor, " dy"]
    xx: Float[Tensor, "dx dx"]
    xy: Float[Tensor, "dx dy"]
    yy: Float[Tensor, "dy dy"]

    @classmethod
    def of(cls, x: Float[Tensor, "n dx"], y: Float[Tensor, "n dy"], *, products: torch.dtype = torch.float64) -> Joint:
        """Of rows that are at hand.

        Args:
            products: In which rows, less their mean, are multiplied: float32 takes a quarter of the time.
        """
        n, dx, width = len(x), x.shape[1], x.shape[1] + y.shape[1]
        # Side by side and less a pilot mean, so that one product has all sums; what the pilot is off by is taken away after it.
        pilot = torch.cat([rows[:PILOT].mean(0, dtype=torch.float64) if n else rows.sum(0).double() for rows in (x, y)])
        both = x.new_empty(n, width, dtype=products)
        torch.sub(x, pilot[:dx].to(torch.promote_types(x.dtype, products)), out=both[:, :dx])
        torch.sub(y, pilot[dx:].to(torch.promote_types(y.dtype, products)), out=both[:, dx:])
        sums = (both.new_ones(1, n) @ both)[0].double()
        products_of = x.new_zeros(width, width, dtype=torch.float64)
        add_square(products_of, both)
        products_of = products_of.tril() + products_of.tril(-1).T - torch.outer(sums, sums) / max(n, 1)
        mean = pilot + sums / max(n, 1)
        return cls(
            n, mean[:dx], mean[dx:], products_of[:dx, :dx], products_of[:dx, dx:], products_of[dx:, dx:]
        )  # fmt: skip

    @property
    def total(self) -> float:
        """Sum of squares of y about its mean, over all coordinates."""
        return float(self.yy.trace())

    def plus(self, other: Joint) -> Joint:
        """Of the rows of both (Chan, Golub and LeVeque 1979)."""
        if not (self.n and other.n):
            return self if self.n else other
        n = self.n + other.n
        by_x, by_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        share, weight = other.n / n, self.n * other.n / n
        return Joint(
            n, self.mean_x + share * by_x, self.mean_y + share * by_y,
            self.xx + other.xx + weight * torch.outer(by_x, by_x),
            self.xy + other.xy + weight * torch.outer(by_x, by_y),
            self.yy + other.yy + weight * torch.outer(by_y, by_y),
        )  # fmt: skip

    def turned(self) -> Joint:
        """Of y and x."""
        return Joint(self.n, self.mean_y, self.mean_x, self.yy, self.xy.T, self.xx)

    def without_residual(self) -> Joint:
        """Of x and y - x, without another look at the rows: what a block adds, where x enters it and y leaves it."""
        return self._replace(
            mean_y=self.mean_y - self.mean_x, xy=self.xy - self.xx, yy=self.yy - self.xy - self.xy.T + self.xx
        )  # fmt: skip

    def mapped(self, matrix: Float[Tensor, "dx d2"], bias: Float[Tensor, " d2"]) -> Joint:
        """Of x T + b and y."""
        onto = matrix.T @ self.xx
        return Joint(self.n, self.mean_x @ matrix + bias, self.mean_y, onto @ matrix, matrix.T @ self.xy, self.yy)

    def about(self, x: Float[Tensor, " dx"], y: Float[Tensor, " dy"]) -> Joint:
        """The same rows with sums of products about other points than the means, which these take the place of."""
        by_x, by_y = self.mean_x - x, self.mean_y - y
        return Joint(
            self.n, x, y, self.xx + self.n * torch.outer(by_x, by_x), self.xy + self.n * torch.outer(by_x, by_y),
            self.yy + self.n * torch.outer(by_y, by_y),
        )  # fmt: skip

    def about_zero(self) -> Joint:
        """For maps without an intercept."""
        return self.about(torch.zeros_like(self.mean_x), torch.zeros_like(self.mean_y))
