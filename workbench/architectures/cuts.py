"""How a head's queries, keys or values, or a gate's half, are cut out of one module's outputs.

The same cut serves activations, weights and biases: it acts on the last axis. A cut is a value that prints as the source
that makes it, so that a guessed row can be pasted.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Which = Literal["q", "k", "v"]


class Heads(NamedTuple):
    """Numbers that projections are cut by."""

    n_heads: int
    n_key_value_heads: int
    d_head: int
    """Of a query or key."""
    d_value: int
    """Of a value: `d_head` in all but multi-head latent attention."""


class Cut:
    """Everything: the module's outputs are the part's own. Base of the others."""

    def take(self, x: Tensor, heads: Heads) -> Tensor:
        """The part's own entries of `x [..., d_out]`."""
        return x

    def put(self, x: Tensor, heads: Heads, new: Tensor) -> None:
        """Write `new`, shaped as `take` gives it, into `x`."""
        self.take(x, heads).copy_(new)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


WHOLE = Cut()


@dataclass(frozen=True)
class ByHead(Cut):
    """Head after head: a projection of its own."""

    def take(self, x: Tensor, heads: Heads) -> Tensor:
        return x.unflatten(-1, (-1, heads.d_head))


@dataclass(frozen=True)
class Stacked(Cut):
    """All queries, then all keys, then all values: GPT-2, Phi-3, multi-query Falcon."""

    which: Which

    def take(self, x: Tensor, heads: Heads) -> Tensor:
        queries, keys = heads.n_heads * heads.d_head, heads.n_key_value_heads * heads.d_head
        start, size = {"q": (0, queries), "k": (queries, keys), "v": (queries + keys, keys)}[self.which]
        return x.narrow(-1, start, size).unflatten(-1, (-1, heads.d_head))


@dataclass(frozen=True)
class Grouped(Cut):
    """Group after group: its queries, its key, its value. GPT-NeoX, BLOOM (groups of one), the newer Falcon."""

    which: Which

    def take(self, x: Tensor, heads: Heads) -> Tensor:
        groups = self._groups(x, heads)
        return groups.flatten(-3, -2) if self.which == "q" else groups.squeeze(-2)

    def put(self, x: Tensor, heads: Heads, new: Tensor) -> None:
        groups = self._groups(x, heads)  # a view, where the flattened queries of several groups would be a copy
        groups.copy_(new.reshape(groups.shape))

    def _groups(self, x: Tensor, heads: Heads) -> Tensor:
        size = heads.n_heads // heads.n_key_value_heads
        start, length = {"q": (0, size), "k": (size, 1), "v": (size + 1, 1)}[self.which]
        return x.unflatten(-1, (heads.n_key_value_heads, size + 2, heads.d_head)).narrow(-2, start, length)


@dataclass(frozen=True)
class Half(Cut):
    """The first (0) or second (1) half: gate and up in one matrix."""

    index: int

    def take(self, x: Tensor, heads: Heads) -> Tensor:
        size = x.shape[-1] // 2
        return x.narrow(-1, self.index * size, size)  # chunk's views may not be written where gradients are kept


@dataclass(frozen=True)
class OfHead(Cut):
    """Entries `start:stop` of each head: multi-head latent attention packs several things into a head's outputs."""

    start: int
    stop: int | None = None

    def take(self, x: Tensor, heads: Heads) -> Tensor:
        x = x.squeeze(1) if x.dim() == 4 else x  # DeepSeek's compressed stream has an axis of one more
        return x.unflatten(-1, (heads.n_heads, -1))[..., self.start : self.stop]


@dataclass(frozen=True)
class Values(Cut):
    """Head after head, of the width of values."""

    def take(self, x: Tensor, heads: Heads) -> Tensor:
        return x.unflatten(-1, (-1, heads.d_value))


@dataclass(frozen=True)
class RotatedQueries(Cut):
    """`[batch, heads, pos, d_head]`, or the first two axes in one, as the attention function multiplies them."""

    def take(self, x: Tensor, heads: Heads) -> Tensor:
        return _four_axes(x, heads).transpose(1, 2)


@dataclass(frozen=True)
class RotatedKeys(Cut):
    """`[batch, heads, d_head, pos]`, each key repeated for the queries of its group."""

    def take(self, x: Tensor, heads: Heads) -> Tensor:
        x = _four_axes(x, heads)
        return x[:, :: x.shape[1] // heads.n_key_value_heads].permute(0, 3, 1, 2)

    def put(self, x: Tensor, heads: Heads, new: Tensor) -> None:
        x = _four_axes(x, heads)
        x.copy_(new.permute(0, 2, 3, 1).repeat_interleave(x.shape[1] // heads.n_key_value_heads, dim=1))


def _four_axes(x: Tensor, heads: Heads) -> Tensor:
    return x.unflatten(0, (-1, heads.n_heads)) if x.dim() == 3 else x


@dataclass(frozen=True)
class Pairs(Cut):
    """`[batch, heads, pos, key_pos]`, or the first two axes in one; without the last column where it is no token (GPT-OSS)."""

    sink: bool = False

    def take(self, x: Tensor, heads: Heads) -> Tensor:
        x = _four_axes(x, heads)
        return x[..., :-1] if self.sink else x


@dataclass(frozen=True, eq=False)
class ByHeadWritten(Cut):
    """What each head of `z` writes, through its own matrix of `W_O [heads, d_value, d_model]`."""

    W_O: Tensor

    def take(self, x: Tensor, heads: Heads) -> Tensor:
        return torch.einsum("...hd,hdm->...hm", x.unflatten(-1, (-1, heads.d_value)), self.W_O)
