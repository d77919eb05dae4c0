"""How a head's queries, keys or values, or a gate's half, are cut out of one module's outputs.

The same cut serves activations, weights and biases: it acts on the last axis. A cut is a value that prints as the source
that makes it, so that a guessed row can be pasted.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

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
