"""The gradient of one weight matrix as the two factors that make it, and what can be said of it without forming it.

Source: Katz, Belinkov, Geva and Wolf 2024 (arXiv 2402.12865). For `z = x W` at tokens i, with δ_i the derivative of the loss
at z_i, the gradient of W is `Xᵀ D = Σ x_i δ_iᵀ`: its rank is at most the number of tokens, and its singular values, its
products with other gradients and what a step does to the layer follow from matrices of tokens by tokens. The paper treats one
token; here what tokens do to each other is kept (a step moves the outputs for the same inputs by `-step (X Xᵀ) D`, not its
diagonal alone).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import NotComparable
from workbench.projection import accumulation_dtype


class Decomposition(NamedTuple):
    """Singular value decomposition of a gradient, `left · values @ right`."""

    left: Float[Tensor, "d_in rank"]
    values: Float[Tensor, " rank"]
    right: Float[Tensor, "rank d_out"]


@dataclass(frozen=True, eq=False, repr=False)
class Gradient:
    """`Xᵀ D` of a matrix that is read left to right (`x @ W`), of the loss summed over texts; tokens without padding."""

    name: str
    """`W_out.3`, or the path of a module that no family's row names."""
    X: Float[Tensor, "token d_in"]
    """What went in, at each token."""
    D: Float[Tensor, "token d_out"]
    """Derivative of the loss at what came out."""
    row: Int[Tensor, " token"]
    """The text of each token."""
    pos: Int[Tensor, " token"]
    """Its position among the text's own tokens."""

    def __repr__(self) -> str:
        n, d_in = self.X.shape
        return f"Gradient({self.name}, {n} tokens, [{d_in}, {self.D.shape[1]}], norm {self.norm():.3g})"

    def of_row(self, row: int) -> Gradient:
        """That of one text's loss alone."""
        own = self.row == row
        there = own.to(self.X.device)
        return replace(self, X=self.X[there], D=self.D[there], row=self.row[own], pos=self.pos[own])

    def dense(self) -> Float[Tensor, "d_in d_out"]:
        """The matrix itself, in the accumulation dtype. For small ones: nothing here needs it."""
        X, D = self._factors(accumulation_dtype(self.X))
        return X.T @ D

    def bias(self) -> Float[Tensor, " d_out"]:
        """The gradient of the bias that is added to the outputs."""
        return self.D.sum(0, dtype=accumulation_dtype(self.D))

    def singular_values(self) -> Float[Tensor, " rank"]:
        """All that can differ from 0, the largest first: those of `R_x R_dᵀ`, where Q_x R_x = Xᵀ and Q_d R_d = Dᵀ. float64."""
        X, D = self._factors(torch.float64)
        return torch.linalg.svdvals(torch.linalg.qr(X.T, mode="r").R @ torch.linalg.qr(D.T, mode="r").R.T)

    def svd(self) -> Decomposition:
        """Directions too, float64."""
        X, D = self._factors(torch.float64)
        (Q_x, R_x), (Q_d, R_d) = torch.linalg.qr(X.T), torch.linalg.qr(D.T)
        left, values, right = torch.linalg.svd(R_x @ R_d.T, full_matrices=False)
        return Decomposition(Q_x @ left, values, right @ Q_d.T)

    def rank(self) -> int:
        """How many singular values stand above rounding, by the rule of `torch.linalg.matrix_rank`: `max(d_in, d_out) · eps` of
        the largest. eps is that of the accumulation dtype, also where the factors themselves were rounded to half precision:
        it is the rank of the sum that they make."""
        return self.rank_of(self.singular_values())

    def rank_of(self, values: Float[Tensor, " rank"]) -> int:
        """`rank`, of singular values that are known."""
        allowed = max(self.X.shape[1], self.D.shape[1]) * torch.finfo(accumulation_dtype(self.X)).eps
        return int((values > allowed * values[0]).sum()) if values.numel() and values[0] > 0 else 0

    def norm(self) -> float:
        """Frobenius norm."""
        return max(self.inner(self), 0.0) ** 0.5

    def inner(self, other: Gradient) -> float:
        """Sum of the products of entries of two gradients of the same matrix: `sum((X₁ X₂ᵀ) ⊙ (D₁ D₂ᵀ))`.

        A step of size s on this one's loss changes the other's loss by `-s` times it, to first order.

        Raises:
            NotComparable: if they are of other matrices.
        """
        if self.name != other.name or self.X.shape[1:] != other.X.shape[1:] or self.D.shape[1:] != other.D.shape[1:]:
            raise NotComparable(
                f"{self!r} and {other!r} are of two matrices. Take the inner product of one matrix's gradients."
            )
        (X, D), (X_other, D_other) = self._factors(torch.float64), other._factors(torch.float64)
        return float(((X @ X_other.T) * (D @ D_other.T)).sum())

    def step_effect(self, step: float, x: Float[Tensor, "*batch d_in"] | None = None) -> Float[Tensor, "*batch d_out"]:
        """What one step of plain gradient descent, `W - step · gradient`, adds to the outputs for inputs x; exact.

        Args:
            step: The learning rate.
            x: The inputs of the loss's own tokens, if None: `-step (X Xᵀ) D`, the paper's imprint (Lemma 5.2) on the diagonal.
        """
        X, D = self._factors(accumulation_dtype(self.X))
        x = X if x is None else x.to(X)
        return -step * ((x @ X.T) @ D)

    def imprint(self) -> Float[Tensor, "token d_out"]:
        """What a step of size 1 adds to the outputs at a token for that token's own part alone: `-|x_i|² δ_i`."""
        X, D = self._factors(accumulation_dtype(self.X))
        return -X.square().sum(1, keepdim=True) * D

    def rows(self, inputs: Int[Tensor, " k"]) -> Float[Tensor, "k d_out"]:
        """Rows of the gradient: what is added for some inputs (neurons of `W_out`), as a sum over tokens."""
        X, D = self._factors(accumulation_dtype(self.X))
        return X[:, inputs].T @ D

    def columns(self, outputs: Int[Tensor, " k"]) -> Float[Tensor, "k d_in"]:
        """Columns of the gradient: what is read for some outputs (neurons of `W_in`), as a sum over tokens."""
        X, D = self._factors(accumulation_dtype(self.X))
        return D[:, outputs].T @ X

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.X.to(dtype), self.D.to(dtype)
