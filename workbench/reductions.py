"""What is made of a block's logits, in passes of torch over each tile while it is in cache: for any device and dtype.

Where there is numba, float32 logits on a CPU are reduced in a half to a tenth of the time (`fused_reduction`).
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from workbench.projection import Decoder, Head, Projection, accumulation_dtype
from workbench.selection import GROUP, group_extremes, merge, select
from workbench.softmax import RunningSoftmax


@dataclass(frozen=True)
class Asked:
    """What is wanted of rows."""

    k: int
    k_bottom: int
    entropy: bool
    targets: Tensor | None = None
    """`[rows, targets]`"""
    reference: Tensor | None = None
    """`[rows, d_model]`, or one row for all."""
    last_of: int | None = None

    def of(self, rows: slice) -> "Asked":
        """The same of some of the rows."""
        reference = self.reference
        if reference is not None and len(reference) > 1:
            reference = reference[rows]
        return replace(self, targets=None if self.targets is None else self.targets[rows], reference=reference)


class Reduction(Protocol):
    """Takes in the logits of a block of rows."""

    def add(self, z: Tensor, start: int) -> None:
        """A tile that begins at token `start`."""
        ...

    def add_window(self, held: Tensor, start: int) -> None:
        """The tiles since the last window side by side, the first of which begins at token `start`."""
        ...

    def projection(self) -> Projection:
        """What was asked, when all tokens were there."""
        ...


class InPasses:
    """A tile is reduced into the running normaliser, and to the extremes of its groups, from which the tokens are chosen when
    the window is full."""

    def __init__(self, asked: Asked, head: Head, decoder: Decoder, rows: Tensor, window: Tensor, scratch: Tensor):
        """
        Args:
            rows: The block, as the head decodes it.
            window: Where its logits will be.
            scratch: Room for one tile.
        """
        n, device, dtype = len(rows), window.device, window.dtype
        self.asked, self.scratch, self.tile = asked, scratch, scratch.shape[1]
        self.softmax = RunningSoftmax(n, entropy=asked.entropy, device=device, dtype=dtype)
        self.divergence = None
        if asked.reference is not None:
            self.divergence = _Divergence(head, asked.reference, decoder, n)
        elif asked.last_of is not None:
            self.divergence = _DivergenceFromLast(n, asked.last_of, device, dtype)
        self.top = self.bottom = _no_tokens(n, device, dtype)
        self.highs: list[Tensor] = []
        self.lows: list[Tensor] = []
        self.ranking = None if asked.targets is None else _Ranking(asked.targets, dtype)
        self.whole = window.shape[1] == head.d_vocab
        if self.ranking is not None and not self.whole:  # else they are found before the window is gone
            for a in range(0, head.d_vocab, self.tile):
                b = min(a + self.tile, head.d_vocab)
                if self.ranking.wants(a, b):
                    self.ranking.find(head.tile(rows, a, b, decoder), a)

    def add(self, z: Tensor, start: int) -> None:
        """A tile, while it is in cache."""
        scratch = self.scratch[:, : z.shape[1]]
        self.highs.append(group_extremes(z, largest=True))
        if self.asked.k_bottom:
            self.lows.append(group_extremes(z, largest=False))
        if self.ranking is not None:
            self.ranking.find(z, start) if self.whole else self.ranking.add(z, start, scratch)
        if self.divergence is not None:
            self.divergence.add(z, start, start + z.shape[1])
        self.softmax.add(z, _row_maxima(z, self.highs[-1]), scratch)

    def add_window(self, held: Tensor, start: int) -> None:
        """Choose among the tokens of the window."""
        if self.ranking is not None and self.whole:
            for a, z in zip(range(0, held.shape[1], self.tile), held.split(self.tile, 1), strict=True):
                self.ranking.add(z, a, self.scratch[:, : z.shape[1]])
        self.top = self._better(self.top, held, start, self.highs, largest=True)
        if self.asked.k_bottom:
            self.bottom = self._better(self.bottom, held, start, self.lows, largest=False)
        self.highs, self.lows = [], []

    def projection(self) -> Projection:
        dtype, divergence, ranking = self.scratch.dtype, self.divergence, self.ranking
        return Projection(
            top_ids=self.top[1],
            top_logits=self.top[0],
            bottom_ids=self.bottom[1],
            bottom_logits=self.bottom[0],
            log_normaliser=self.softmax.log_normaliser.to(dtype),
            entropy_nats=self.softmax.entropy_nats.to(dtype) if self.asked.entropy else None,
            target_logits=None if ranking is None else ranking.logits,
            target_ranks=None if ranking is None else ranking.ranks,
            kl_nats=None if divergence is None else divergence.from_reference(self.softmax).to(dtype),
        )

    def _better(
        self, best: tuple[Tensor, Tensor], held: Tensor, start: int, groups: list[Tensor], *, largest: bool
    ) -> tuple[Tensor, Tensor]:
        """The best tokens so far, joined by the best of a window that begins at token `start`."""
        k = self.asked.k if largest else self.asked.k_bottom
        values, columns = select(held, min(k, held.shape[1]), largest=largest, tile=self.tile, groups=torch.cat(groups, 1))
        return merge(best, (values, columns + start), k, largest=largest)


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


def _no_tokens(rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, 0, device=device, dtype=dtype), torch.empty(rows, 0, device=device, dtype=torch.long)


def _row_maxima(z: Tensor, groups: Tensor) -> Tensor:
    """The maximum of each row, from the maxima of its groups and the columns beyond the last whole group."""
    rest = z[:, groups.shape[1] * GROUP :]
    parts = [part.amax(1, keepdim=True) for part in (groups, rest) if part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.maximum(*parts)
