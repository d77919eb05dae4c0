"""Sums of products that go on as tokens come: made in the precision that pays, kept in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from workbench.moments.layout import Layout
from workbench.moments.moments import Sums
from workbench.moments.products import HALF, add_square, product

TOKENS = {"cpu": 4096, "cuda": 32_768}
"""Tokens of a group and fold that wait to be multiplied at once, by the kind of device. Adding a product to its float64 sum
reads and writes five times the product's size: every 512 tokens that costs half a forward pass of the embedded model on two
cores, every 4,096 a fourteenth."""


def waiting_tokens(device: torch.device) -> int:
    """Of a buffer."""
    return TOKENS.get(device.type, TOKENS["cpu"])


class Accumulator:
    """Takes tokens in any order and at any number at once; `sums()` at the end.

    Tokens wait in buffers, one for each group of strata and cross fold. A full one is centred on a pilot mean, that of the
    first tokens of its group, which stays as it is: without it, float32 would lose the variance of a coordinate whose mean is
    large. Then it is multiplied: ordinary tokens in float32 (on a GPU, where they come in half precision, in that, with float32
    sums), all others, which are few and whose norms may be a thousand times as large, in float64; where all tokens are in one
    pile, it is multiplied as ordinary ones are. Every product is added to sums in float64.
    """

    def __init__(
        self, layout: Layout, device: torch.device, dtype: torch.dtype, *, tokens: int | None = None, seed: int = 0
    ) -> None:
        """
        Args:
            dtype: In which ordinary tokens are multiplied.
            tokens: How many wait at most in a buffer; the device's number, if None.
            seed: Of the shifts by which shuffled pairs are made.
        """
        self.layout, self.device, self.dtype = layout, device, dtype
        self.tokens = tokens or waiting_tokens(device)
        self._sums = Sums.zeros(layout, device)
        self._waiting: dict[tuple[int, int], _Buffer] = {}
        self._random = np.random.default_rng(seed)

    def add(self, tensors: Mapping[str, Tensor], stratum: np.ndarray, document: np.ndarray) -> None:
        """
        Args:
            tensors: `[token, width]` of each site.
            stratum, document: `[token]`: index into the corpus's `STRATA`, and ordinal in it.
        """
        fold = document % self.layout.folds
        group, cross = self.layout.group_of(stratum), self.layout.cross_fold(fold)
        for key in dict.fromkeys(zip(group.tolist(), cross.tolist(), strict=True)):
            mine = np.flatnonzero((group == key[0]) & (cross == key[1]))
            buffer = self._buffer(key)
            while len(mine):
                now, mine = np.split(mine, [buffer.room])
                buffer.put(tensors, now, stratum[now], fold[now], document[now])
                if not buffer.room:
                    self._flush(key, buffer)

    def sums(self) -> Sums:
        """All that was added. Nothing may be added after it."""
        for key, buffer in self._waiting.items():
            if buffer.n:
                self._flush(key, buffer)
        self._waiting.clear()
        return self._sums

    def _buffer(self, key: tuple[int, int]) -> _Buffer:
        if key not in self._waiting:
            ordinary = self.layout.groups[key[0]] != "rest"
            self._waiting[key] = _Buffer(self.layout, self.tokens, self.dtype if ordinary else torch.float64, self.device)
        return self._waiting[key]

    def _flush(self, key: tuple[int, int], buffer: _Buffer) -> None:
        group, cross = key
        rows, sums = buffer.rows[: buffer.n], self._sums
        if not sums.has_pilot[group]:
            for columns in self.layout.columns.values():  # not all at once: half precision is widened for it
                sums.pilot[group, columns] = _pilot(rows[:, columns])
            sums.has_pilot[group] = True
        rows -= sums.pilot[group].to(rows.dtype)
        self._sum_sites(rows, buffer)
        null = any(pair.shuffled for pair in self.layout.pairs)
        elsewhere = rows.index_select(0, self._partners(buffer, key)) if null else rows
        for source, runs in self.layout.runs.items():
            into = sums.cross[source][group, cross]
            for run in runs:
                into[:, run.out] += product(rows[:, run.source], (elsewhere if run.shuffled else rows)[:, run.targets])
        buffer.n = 0

    def _sum_sites(self, rows: Tensor, buffer: _Buffer) -> None:
        """Each site with itself, in the cells of its tokens."""
        sums = self._sums
        cells = self.layout.stratum_of(buffer.stratum[: buffer.n]) * self.layout.folds + buffer.fold[: buffer.n]
        order = torch.from_numpy(np.argsort(cells, kind="stable")).to(self.device)
        found, counts = np.unique(cells, return_counts=True)
        stops = np.cumsum(counts).tolist()
        parts = list(zip(found.tolist(), counts.tolist(), stops, strict=True))
        for cell, count, _ in parts:
            sums.n.view(-1)[cell] += count
        wide = torch.promote_types(rows.dtype, torch.float32)
        for site, columns in self.layout.columns.items():
            mine = rows[:, columns] if len(parts) == 1 else rows[:, columns].index_select(0, order)
            for cell, count, stop in parts:
                part = mine[stop - count : stop]
                add_square(sums.own[site].view(-1, *sums.own[site].shape[2:])[cell], part)
                sums.total[site].view(-1, part.shape[1])[cell] += part.sum(0, dtype=wide)

    def _partners(self, buffer: _Buffer, key: tuple[int, int]) -> Tensor:
        """For each token that of which the target is taken: of the same stratum, as sinks beside ordinary tokens would be
        another null, and of another document, as far as there is one. The tokens of a stratum are moved against each other; of
        16 shifts drawn, that one is taken which leaves the fewest beside their own document."""
        partner, document = np.arange(buffer.n), buffer.document[: buffer.n]
        for stratum in np.unique(buffer.stratum[: buffer.n]):
            at = np.flatnonzero(buffer.stratum[: buffer.n] == stratum)
            n, own = len(at), document[at]
            drawn = self._random.integers(max(1, n // 8), max(2, n - n // 8), 16)
            same = {int(shift): int((np.roll(own, -int(shift)) == own).sum()) for shift in drawn}
            shift = min(same, key=lambda one: (same[one], one))
            partner[at] = np.roll(at, -shift)
            self._sums.unshuffled[key] += same[shift]
        return torch.from_numpy(partner).to(self.device)


class _Buffer:
    """Rows that wait, and what is known of them."""

    def __init__(self, layout: Layout, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layout, self.n, self.size = layout, 0, tokens
        # On a CPU, pages are taken when they are filled.
        self.rows = torch.empty(tokens, layout.width, dtype=dtype, device=device)
        self.stratum, self.fold, self.document = (np.empty(tokens, np.int64) for _ in range(3))

    @property
    def room(self) -> int:
        return self.size - self.n

    def put(
        self, tensors: Mapping[str, Tensor], at: np.ndarray, stratum: np.ndarray, fold: np.ndarray, document: np.ndarray
    ) -> None:
        own = slice(self.n, self.n + len(at))
        side_by_side = bool(len(at)) and int(at[-1]) - int(at[0]) + 1 == len(at)
        index = None if side_by_side else torch.from_numpy(at).to(self.rows.device, non_blocking=True)
        for site, columns in self.layout.columns.items():
            given = tensors[site].to(self.rows.device)
            chosen = given[at[0] : at[-1] + 1] if index is None else given.index_select(0, index)
            _put(self.rows[own, columns], chosen)
        self.stratum[own], self.fold[own], self.document[own] = stratum, fold, document
        self.n += len(at)


def _pilot(rows: Tensor) -> Tensor:
    """What rows are counted from, as exact in their dtype.

    In half precision, x - pilot must be exact too, or every product would be of rounded numbers. It is where x lies between
    half the pilot and twice it (Sterbenz), so that only coordinates whose mean is more than twice their spread have one: the
    others lose at most a factor of five to it.
    """
    mean = rows.mean(0, dtype=torch.promote_types(rows.dtype, torch.float32))
    if rows.dtype in HALF:
        spread = (rows.float() - mean).square().mean(0).sqrt()
        mean = torch.where(mean.abs() > 2 * spread, mean, 0.0)
    return mean.to(rows.dtype).double()


def _put(into: Tensor, rows: Tensor) -> None:
    """Copy rows between columns; on a GPU numbers of half precision four at a time, as PyTorch copies them there one by one."""
    places = (rows.shape[1], into.stride(0), into.storage_offset(), rows.storage_offset())
    if (
        rows.is_cuda
        and rows.dtype in HALF
        and rows.dtype == into.dtype
        and rows.is_contiguous()
        and not any(place % 4 for place in places)
    ):
        into, rows = into.view(torch.int64), rows.view(torch.int64)
    into.copy_(rows)
