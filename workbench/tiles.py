"""The pass of rows over tiles of the vocabulary, on any device.

A rows x vocabulary matrix is never stored: the logits of a block of rows are made in tiles, side by side in a window, and
reduced there before the next block (or, if memory is short, the next window) is written over them.
"""

from collections.abc import Iterator
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from workbench.projection import Decoder, Head, Projection, accumulation_dtype, stacked
from workbench.reductions import Asked, InPasses, Reduction

TILE = 8192
"""Tokens a matrix product. Narrower tiles cost more in calls than their logits' place in cache gains."""
HEIGHT = {"cpu": 768, "cuda": 16384}
"""Rows a block. Measured on two CPU cores: 512 rows cost 10 % more, as the matrix product re-reads `W_U` more often."""
MEMORY = {"cpu": 384 << 20, "cuda": 2 << 30}
"""Default bytes of logits in flight. On a CPU that is all logits of 768 rows of up to 131,072 tokens (SmolLM2's 49,152 take
144 MiB). Half of it would leave 384 rows of 128,256 tokens, whose products take 1.08 times as long (1.27 from bfloat16
weights), and 192 of 256,000: 1.19 times, where 384 rows take 1.09."""
LEAST = 256
"""Rows that the memory must hold for one visit: products of 186 rows take 1.2 to 1.3 times as long as those of 744, more than
the visit saves where vectors are long."""
FEW = 1 << 26
"""Logits of which passes are over in half a second, and the code of the one visit is not loaded yet (0.9 s)."""
MOST = 256
"""Tokens a row that the one visit puts in order one by one; passes choose more than twice as many faster."""


def memory_of(device: torch.device, asked: int | None) -> int:
    """Bytes of logits in flight on a device: as many as were asked for, or its default."""
    return asked or MEMORY.get(device.type, MEMORY["cpu"])


class Tiles:
    """The pass with its options fixed, for many calls: the buffers are kept from one call to the next.

    On a CPU fresh buffers cost 5 % of a layer of SmolLM2, all of it page faults.
    """

    def __init__(self, head: Head, decoder: Decoder, k: int, k_bottom: int, entropy: bool, memory: int | None):
        """
        Args:
            k, k_bottom: How many of the best and of the worst tokens to choose.
            memory: Bytes of logits in flight; the device's default, if not given.
        """
        self.head = head
        self.decoder: Decoder = decoder
        self.k, self.k_bottom, self.entropy, self.memory = k, k_bottom, entropy, memory
        self._buffer: Tensor | None = None

    def __call__(self, x: Tensor, targets: Tensor | None, reference: Tensor | None, last_of: int | None = None) -> Projection:
        """As `Projector`, in the order that rounding leaves tokens in."""
        asked = Asked(self.k, self.k_bottom, self.entropy, targets, reference, last_of)
        room, d_vocab = memory_of(x.device, self.memory) // accumulation_dtype(x).itemsize, self.head.d_vocab
        at_once = takes_one_visit(x, asked, d_vocab, room)
        height = min(HEIGHT.get(x.device.type, HEIGHT["cpu"]), room // (d_vocab if at_once else TILE))
        together = last_of or 1
        height = max(1, height // together) * together
        width = d_vocab if at_once else min(max(1, room // (TILE * max(min(height, len(x)), 1))) * TILE, d_vocab)
        blocks = []
        for start in range(0, max(len(x), 1), height):
            rows = slice(start, start + height)
            blocks.append(self._block(x[rows], asked.of(rows), width, at_once))
        return stacked(blocks)

    def _block(self, x: Tensor, asked: Asked, width: int, at_once: bool) -> Projection:
        """One block of rows through all tiles, in windows of so many tokens."""
        rows = self.head.decoded(x, self.decoder)
        window, scratch = self._space(x, width, 0 if at_once else min(TILE, width))
        reduction: Reduction
        if at_once:
            from workbench.fused_reduction import InOneVisit

            reduction = InOneVisit(asked)
        else:
            reduction = InPasses(asked, self.head, self.decoder, rows, window, scratch)
        for start, stop in spans(self.head.d_vocab, width):
            held = window[:, : stop - start]
            for a in range(start, stop, TILE):
                b = min(a + TILE, stop)
                reduction.add(self.head.tile(rows, a, b, self.decoder, out=held[:, a - start : b - start]), a)
            reduction.add_window(held, start)
        return reduction.projection()

    def _space(self, x: Tensor, *widths: int) -> list[Tensor]:
        """Matrices of as many rows as x and of these widths, in one piece of memory that is kept."""
        sizes, dtype = [len(x) * width for width in widths], accumulation_dtype(x)
        kept = self._buffer
        if kept is None or kept.device != x.device or kept.dtype != dtype or len(kept) < sum(sizes):
            self._buffer = None  # or both would be there for a moment
            self._buffer = kept = torch.empty(sum(sizes), device=x.device, dtype=dtype)
        parts = kept[: sum(sizes)].split(sizes)
        return [part.view(len(x), width) for part, width in zip(parts, widths, strict=True)]


def takes_one_visit(x: Tensor, asked: Asked, d_vocab: int, room: int) -> bool:
    """Whether these rows are reduced in one visit of all their logits (`fused_reduction`), of which so many may be in memory.
    All else is reduced in passes."""
    return (
        x.device.type == "cpu"
        and accumulation_dtype(x) == torch.float32
        and asked.reference is None
        and max(asked.k, asked.k_bottom) <= MOST
        and len(x) * d_vocab >= FEW
        and room // d_vocab >= max(LEAST, asked.last_of or 1)
        and has_numba()
    )


@cache
def has_numba() -> bool:
    """Whether there is a numba that can be imported, which it refuses beside a NumPy that it does not know."""
    try:
        import_module("numba")
    except ImportError:
        return False
    return True


def spans(d_vocab: int, width: int) -> Iterator[tuple[int, int]]:
    """Token ranges of this width that cover the vocabulary."""
    return ((a, min(a + width, d_vocab)) for a in range(0, d_vocab, width))
