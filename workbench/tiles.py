"""The pass of rows over tiles of the vocabulary, on any device.

A rows x vocabulary matrix is never stored: a tile of logits is reduced while it is in cache, and a window of tiles is kept
only until the best tokens of it are chosen.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.projection import Decoder, Head, Projection, accumulation_dtype, stacked
from workbench.selection import GROUP, group_extremes, merge, select
from workbench.softmax import RunningSoftmax

TILE = 8192
"""Tokens a matrix product. Narrower tiles cost more in calls than their logits' place in cache gains."""
HEIGHT = {"cpu": 768, "cuda": 16384}
"""Rows a block. Measured on two CPU cores: 512 rows cost 10 % more, as the matrix product re-reads `W_U` more often."""
MEMORY = {"cpu": 192 << 20, "cuda": 2 << 30}
"""Default bytes of logits in flight; on a CPU that is more than all 49,152 logits of a block of SmolLM2."""


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
        self._buffers: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, targets: Tensor | None, reference: Tensor | None, last_of: int | None = None) -> Projection:
        """As `Projector`, in the order that rounding leaves tokens in."""
        tile, together = TILE * accumulation_dtype(x).itemsize, last_of or 1
        height = max(1, min(HEIGHT.get(x.device.type, HEIGHT["cpu"]), memory_of(x.device, self.memory) // tile))
        height = max(1, height // together) * together
        blocks = []
        for start in range(0, max(len(x), 1), height):
            rows = slice(start, start + height)
            target = None if targets is None else targets[rows]
            other = reference if reference is None or len(reference) == 1 else reference[rows]
            blocks.append(self._block(x[rows], target, other, last_of))
        return stacked(blocks)

    def _block(self, x: Tensor, targets: Tensor | None, reference: Tensor | None, last_of: int | None) -> Projection:
        """One block of rows through all tiles. A tile is reduced while it is in cache: into the running normaliser, and to
        the extremes of its groups, from which the tokens are chosen when a window of tiles is full."""
        head, decoder = self.head, self.decoder
        rows = head.decoded(x, decoder)
        dtype = accumulation_dtype(x)
        window, scratch = self._space(len(x), x.device, dtype)
        softmax = RunningSoftmax(len(x), entropy=self.entropy, device=x.device, dtype=dtype)
        divergence = None
        if reference is not None:
            divergence = _Divergence(head, reference, decoder, len(x))
        elif last_of is not None:
            divergence = _DivergenceFromLast(len(x), last_of, x.device, dtype)
        ranking = None if targets is None else _Ranking(targets, dtype)
        top = bottom = _no_tokens(len(x), x.device, dtype)
        whole = window.shape[1] == head.d_vocab
        if ranking is not None and not whole:
            for a, b in spans(head.d_vocab, TILE):
                if ranking.wants(a, b):
                    ranking.find(head.tile(rows, a, b, decoder), a)
        for start, stop in spans(head.d_vocab, window.shape[1]):
            highs, lows = [], []
            for a in range(start, stop, TILE):
                b = min(a + TILE, stop)
                z = head.tile(rows, a, b, decoder, out=window[:, a - start : b - start])
                highs.append(group_extremes(z, largest=True))
                if self.k_bottom:
                    lows.append(group_extremes(z, largest=False))
                if ranking is not None:
                    ranking.find(z, a) if whole else ranking.add(z, a, scratch[:, : b - a])
                if divergence is not None:
                    divergence.add(z, a, b)
                softmax.add(z, _row_maxima(z, highs[-1]), scratch[:, : b - a])
            held = window[:, : stop - start]
            if ranking is not None and whole:
                for a, b in spans(head.d_vocab, TILE):
                    ranking.add(held[:, a:b], a, scratch[:, : b - a])
            top = _better(top, held, start, self.k, torch.cat(highs, 1), largest=True)
            if self.k_bottom:
                bottom = _better(bottom, held, start, self.k_bottom, torch.cat(lows, 1), largest=False)
        return Projection(
            top_ids=top[1],
            top_logits=top[0],
            bottom_ids=bottom[1],
            bottom_logits=bottom[0],
            log_normaliser=softmax.log_normaliser.to(dtype),
            entropy_nats=softmax.entropy_nats.to(dtype) if self.entropy else None,
            target_logits=None if ranking is None else ranking.logits,
            target_ranks=None if ranking is None else ranking.ranks,
            kl_nats=None if divergence is None else divergence.from_reference(softmax).to(dtype),
        )

    def _space(self, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A window of logits, as many tiles wide as the memory allows, and one tile of scratch."""
        if self._buffers is not None:
            window, scratch = self._buffers
            if window.device == device and window.dtype == dtype and len(window) >= rows:
                return window[:rows], scratch[:rows]
        tiles = max(1, memory_of(device, self.memory) // (dtype.itemsize * TILE * max(rows, 1)))
        width = min(tiles * TILE, self.head.d_vocab)
        window = torch.empty(rows, width, device=device, dtype=dtype)
        self._buffers = window, torch.empty(rows, min(TILE, width), device=device, dtype=dtype)
        return self._buffers


class _Ranking:
    """How many tokens stand before each target: those of a higher logit, or of an equal one and a lower id.

    Comparisons are written as float32 and added up: on a CPU that is ten times as fast as adding up booleans, and exact, as a
    tile has fewer than 2^24 tokens.
    """

    def __init__(self, targets: Tensor, dtype: torch.dtype):
        self.targets = targets
        self.ranks = torch.zeros_like(targets)
        self.logits = torch.zeros(targets.shape, device=targets.device, dtype=dtype)

    def wants(self, start: int, stop: int) -> bool:
        """Whether some target is among these tokens."""
        return bool(((self.targets >= start) & (self.targets < stop)).any())

    def find(self, z: Tensor, start: int) -> None:
        """Take the logits of targets among these tokens. They must be the very products that `add` is given: a logit computed
        otherwise would differ in its last bit and beat itself."""
        inside = (self.targets >= start) & (self.targets < start + z.shape[1])
        own = z.gather(1, (self.targets - start).clamp(0, z.shape[1] - 1))
        self.logits = torch.where(inside, own, self.logits)

    def add(self, z: Tensor, start: int, scratch: Tensor) -> None:
        stop = start + z.shape[1]
        for i in range(self.targets.shape[1]):
            own, target = self.logits[:, i], self.targets[:, i]
            # Equal logits count where all ids are lower than the target's: there the next smaller number is exceeded.
            least = torch.where(target >= stop, own.nextafter(own.new_full((), -torch.inf)), own)
            self.ranks[:, i] += torch.gt(z, least[:, None], out=scratch).sum(1).long()
            inside = ((target >= start) & (target < stop)).nonzero()[:, 0]
            near = z[inside]
            equal = torch.eq(near, own[inside, None], out=torch.empty_like(near))
            if int(equal.sum()) > len(inside):  # others than the targets themselves
                ids = torch.arange(start, stop, device=z.device)
                self.ranks[inside, i] += (equal.bool() & (ids < target[inside, None])).sum(1)


class _Divergence:
    """KL(reference || rows) = Σ p (log p - log q), from the sums of p·(logit_p - logit_q) and the two normalisers."""

    def __init__(self, head: Head, reference: Tensor, decoder: Decoder, rows: int):
        self.head = head
        self.decoder: Decoder = decoder
        self.rows = head.decoded(reference, decoder)
        dtype = accumulation_dtype(reference)
        self.softmax = RunningSoftmax(len(reference), device=reference.device, dtype=dtype)
        self.difference = torch.zeros(rows, device=reference.device, dtype=torch.float64)

    def add(self, z: Tensor, a: int, b: int) -> None:
        p = self.head.tile(self.rows, a, b, self.decoder)
        weights, shrink = self.softmax.add(p, p.amax(1, keepdim=True), torch.empty_like(p))
        self.difference = self.difference * shrink + (weights * (p - z)).sum(1)

    def from_reference(self, softmax: RunningSoftmax) -> Tensor:
        """Rounding can leave a KL of 0 a hair below it; it is cut there."""
        mean = self.difference / self.softmax.total
        return (mean - self.softmax.log_normaliser + softmax.log_normaliser).clamp_min(0)


class _DivergenceFromLast:
    """KL(last || row) for rows in groups of so many, whose last is the reference: its logits are among the rows' own, so that
    no product is made for it."""

    def __init__(self, rows: int, together: int, device: torch.device, dtype: torch.dtype):
        self.together = together
        self.softmax = RunningSoftmax(rows // together, device=device, dtype=dtype)
        self.difference = torch.zeros(rows // together, together, device=device, dtype=torch.float64)

    def add(self, z: Tensor, a: int, b: int) -> None:
        """The mean of p · (logit_p - logit_q) as a product of p with each group's logits, of which the last is logit_p."""
        groups = z.unflatten(0, (-1, self.together))
        last = groups[:, -1]
        weights, shrink = self.softmax.add(last, last.amax(1, keepdim=True), torch.empty_like(last))
        means = torch.bmm(groups, weights[..., None])[..., 0].double()
        self.difference = self.difference * shrink[:, None] + (means[:, -1:] - means)

    def from_reference(self, softmax: RunningSoftmax) -> Tensor:
        """As `_Divergence`; of the last rows themselves exactly 0."""
        normaliser = softmax.log_normaliser.unflatten(0, (-1, self.together))
        mean = self.difference / self.softmax.total[:, None]
        return (mean - normaliser[:, -1:] + normaliser).clamp_min(0).flatten()


def spans(d_vocab: int, width: int) -> Iterator[tuple[int, int]]:
    """Token ranges of this width that cover the vocabulary."""
    return ((a, min(a + width, d_vocab)) for a in range(0, d_vocab, width))


def _better(
    best: tuple[Tensor, Tensor], held: Tensor, start: int, k: int, groups: Tensor, *, largest: bool
) -> tuple[Tensor, Tensor]:
    """The best tokens so far, joined by the best of a window that begins at token `start`."""
    values, columns = select(held, min(k, held.shape[1]), largest=largest, tile=TILE, groups=groups)
    return merge(best, (values, columns + start), k, largest=largest)


def _no_tokens(rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, 0, device=device, dtype=dtype), torch.empty(rows, 0, device=device, dtype=torch.long)


def _row_maxima(z: Tensor, groups: Tensor) -> Tensor:
    """The maximum of each row, from the maxima of its groups and the columns beyond the last whole group."""
    rest = z[:, groups.shape[1] * GROUP :]
    parts = [part.amax(1, keepdim=True) for part in (groups, rest) if part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.maximum(*parts)
