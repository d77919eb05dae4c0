"""What the vocabulary says of rows, and what is asked of a head for it."""

from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import UnknownToken

Decoder = Literal["none", "gain", "norm"]


@dataclass(frozen=True)
class Projection:
    """What the vocabulary says of each row. Logits and everything in nats, for the decoder that was asked for."""

    top_ids: Int[Tensor, "rows k"]
    """Tokens with the highest logits, best first, ties by lowest id: those of exact arithmetic (see `near_ties`)."""
    top_logits: Float[Tensor, "rows k"]
    bottom_ids: Int[Tensor, "rows k_bottom"]
    """Tokens with the lowest logits, lowest first, ties by lowest id."""
    bottom_logits: Float[Tensor, "rows k_bottom"]
    log_normaliser: Float[Tensor, " rows"]
    """log of the sum over the vocabulary of exp(logit)."""
    entropy_nats: Float[Tensor, " rows"] | None = None
    target_logits: Float[Tensor, "rows targets"] | None = None
    target_ranks: Int[Tensor, "rows targets"] | None = None
    """0 for the best token of the row; equal logits are ranked by lowest id. By the products as they are rounded: where tokens
    lie closer than that can tell, the rank may differ from the place among the best."""
    kl_nats: Float[Tensor, " rows"] | None = None
    """KL(reference || row)."""

    @property
    def top_probabilities(self) -> Float[Tensor, "rows k"]:
        """Softmax over the whole vocabulary, of the best tokens."""
        return (self.top_logits - self.log_normaliser[:, None]).exp()

    @property
    def bottom_probabilities(self) -> Float[Tensor, "rows k_bottom"]:
        """Softmax over the whole vocabulary, of the worst tokens."""
        return (self.bottom_logits - self.log_normaliser[:, None]).exp()

    @property
    def target_log_probabilities(self) -> Float[Tensor, "rows targets"]:
        """Log-softmax of the tokens asked for, in nats."""
        if self.target_logits is None:
            raise ValueError("target_log_probabilities needs project(..., targets=...).")
        return self.target_logits - self.log_normaliser[:, None]


@runtime_checkable
class Head(Protocol):
    """What the pass asks of a vocabulary."""

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        ...

    def decoded(self, x: Tensor, decoder: Decoder) -> Tensor:
        """Rows as the matrix product takes them."""
        ...

    def tile(self, rows: Tensor, a: int, b: int, decoder: Decoder, out: Tensor | None = None) -> Tensor:
        """Logits of the tokens a to b, in the accumulation dtype; into `out`, if given."""
        ...

    def logits_at(self, rows: Tensor, ids: Tensor, decoder: Decoder) -> Tensor:
        """Logits of some tokens of each row's own, in the rows' dtype."""
        ...

    def scale(self, decoder: Decoder) -> float:
        """A bound of the logits of a row of norm 1: rounding errors are relative to it."""
        ...

    def matrix(self, decoder: Decoder) -> Tensor | None:
        """What rows are multiplied by, if logits are the product and nothing more."""
        ...


def stacked(blocks: list[Projection]) -> Projection:
    """One projection of blocks of rows."""
    if len(blocks) == 1:
        return blocks[0]
    parts = {f.name: [getattr(block, f.name) for block in blocks] for f in fields(Projection)}
    joined: dict[str, Any] = {name: None if part[0] is None else torch.cat(part) for name, part in parts.items()}
    return Projection(**joined)


def no_such_id(token: int, d_vocab: int) -> UnknownToken:
    """The error of a token id that the vocabulary does not have."""
    return UnknownToken(f"Token id {token} is outside the vocabulary; ids go from 0 to {d_vocab - 1}.")


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 rows."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
