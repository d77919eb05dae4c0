"""Log-normaliser, entropy and weights of a softmax whose logits arrive tile by tile."""

import torch
from jaxtyping import Float
from torch import Tensor

SAFE = 40.0
"""Nats within which exp needs no shift: float32 holds e^±87, and e^40 leaves room for a sum over 10^20 tokens."""


class RunningSoftmax:
    """Sums of exp(logit - shift) over the tiles seen so far.

    The usual running maximum costs a subtraction for every logit. Here a row's shift starts at 0 and is moved only when a
    maximum leaves ±`SAFE`, so rows of modest logits (all neurons, most states) are exponentiated as they are. The sums
    are float64, as up to hundreds of tiles are added into one number.
    """

    def __init__(self, rows: int, *, entropy: bool = False, device: torch.device, dtype: torch.dtype):
        self._shift = torch.zeros(rows, 1, device=device, dtype=dtype)
        self._shifted = False
        self._seen = False
        self.total = torch.zeros(rows, device=device, dtype=torch.float64)
        self._weighted = torch.zeros_like(self.total) if entropy else None

    def add(
        self, z: Float[Tensor, "rows tile"], highest: Float[Tensor, "rows 1"], scratch: Float[Tensor, "rows tile"]
    ) -> tuple[Float[Tensor, "rows tile"], Float[Tensor, " rows"]]:
        """Take in a tile whose row maxima are `highest`.

        Returns:
            exp(z - shift), which is `scratch` overwritten, and the factor by which sums of older tiles shrink.
        """
        beyond = highest - self._shift
        move = beyond > SAFE if self._seen else beyond.abs() > SAFE
        shrink = torch.ones_like(self.total)
        if move.any():
            by = torch.where(move, beyond, 0.0)
            self._shift = self._shift + by
            self._shifted = True
            # Before the first tile there is nothing to shrink, and a downward move would overflow.
            if self._seen:
                by = by[:, 0].double()
                shrink = (-by).exp()
                if self._weighted is not None:
                    self._weighted = (self._weighted - by * self.total) * shrink
                self.total = self.total * shrink
        self._seen = True
        if self._shifted:
            z = torch.sub(z, self._shift, out=scratch)
            if self._weighted is not None:
                self._weighted = self._weighted + (z.exp() * z).sum(1)
        weights = torch.exp(z, out=scratch)
        if self._weighted is not None and not self._shifted:
            self._weighted = self._weighted + torch.linalg.vecdot(weights, z)
        self.total = self.total + weights.sum(1)
        return weights, shrink

    @property
    def log_normaliser(self) -> Float[Tensor, " rows"]:
        """log Σ exp(logit), float64."""
        return self.total.log() + self._shift[:, 0]

    @property
    def entropy_nats(self) -> Float[Tensor, " rows"]:
        """-Σ p log p, float64. Rounding can leave an entropy of 0 a hair below it; it is cut there."""
        if self._weighted is None:
            raise ValueError("This softmax was not asked for its entropy.")
        return (self.total.log() - self._weighted / self.total).clamp_min(0)
