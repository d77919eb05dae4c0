"""Product, running top-k and log-sum-exp of a block of rows in one GPU kernel (Triton), for bfloat16 and float16 weights.

No logits are written. A tile of them is reduced while it is in registers: to the two largest and two smallest of every group
of columns, each with its column in its last bits, to its part of the softmax's sums, and to how many exceed what they are
compared with. A second kernel finds the few
columns of each row that can be among its best, and multiplies them again in float64. The tile is made for the memory of a
Hopper SM, where it was measured; other GPUs take the tiles of `workbench.tiles`.
"""

from functools import cached_property
from typing import NamedTuple, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor  # pyright: ignore[reportMissingImports]

from workbench.near_ties import GROWTH, SPARE

ROWS, COLUMNS, DEPTH = 128, 256, 64
"""A tile of the product."""
GROUP = 32
"""Neighbouring columns a group. A group that holds two of the best is multiplied again, all of it, as there may be a third:
the 10 best of 128,256 leave that to 1 % of the rows."""
BAND = 16
"""Tiles of rows that share their columns of `W_U` in the second-level cache."""
MOST = 32
"""Groups a row that the second kernel may choose; it takes the best one by one."""


class Best(NamedTuple):
    """The extreme logits of each row, best first, equal ones by lowest column."""

    values: Float[Tensor, "rows k"]
    columns: Int[Tensor, "rows k"]
    crowded: Bool[Tensor, " rows"]
    """Where more columns than were looked at lie within rounding of the last of these (`near_ties`): they are not settled."""


class Reduced(NamedTuple):
    """What one pass gives of some rows."""

    top: Best
    bottom: Best
    normaliser: Float[Tensor, " rows"]
    """log Σ exp(logit)"""
    entropy: Float[Tensor, " rows"]
    above: Int[Tensor, "rows bars"]
    """How many logits of the row are above each of its bars."""


def fits(rows: Tensor, W_U: Tensor, k: int) -> bool:
    """Whether the kernel takes these rows, this matrix and this many tokens a row."""
    return (
        torch.version.hip is None  # AMD's GPUs answer to the same name
        and torch.cuda.get_device_capability(rows.device)[0] == 9
        and rows.dtype == W_U.dtype
        and rows.dtype in (torch.bfloat16, torch.float16)
        and W_U.T.is_contiguous()
        and W_U.shape[0] % 8 == 0
        and W_U.data_ptr() % 16 == 0
        and k + SPARE <= min(MOST, W_U.shape[1] // GROUP)
    )


def _aligned(rows: Tensor) -> Tensor:
    """Rows that follow each other from an address that a tensor descriptor takes."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def bytes_a_row(d_vocab: int) -> int:
    """What the first kernel leaves of a row."""
    return 4 * (4 * -(-d_vocab // GROUP) + 2 * -(-d_vocab // COLUMNS))


class FusedProduct:
    """The kernels with their buffers, for many blocks of rows against one matrix."""

    def __init__(self, W_U: Float[Tensor, "d_model d_vocab"], height: int, k: int, k_bottom: int, entropy: bool, bars: int):
        """
        Args:
            height: Rows a block, at most.
            k, k_bottom: How many of the largest and of the smallest logits are wanted of each row.
            bars: With how many numbers of its own each row is compared.
        """
        self.entropy, self.bars = entropy, bars
        self.U, self.height, self.k, self.k_bottom = W_U.T, height, k, k_bottom
        groups, tiles = -(-W_U.shape[1] // GROUP), -(-W_U.shape[1] // COLUMNS)
        self._highs, self._lows = (
            torch.empty(2, height, groups if wanted else 0, device=W_U.device, dtype=torch.float32) for wanted in (k, k_bottom)
        )
        self._peaks, self._sums = torch.empty(2, height, tiles, device=W_U.device, dtype=torch.float32)
        self._weighted = torch.empty(height, tiles if entropy else 0, device=W_U.device, dtype=torch.float32)
        self._above = torch.empty(bars, height, tiles, device=W_U.device, dtype=torch.int32)

    def __call__(
        self, rows: Float[Tensor, "rows d_model"], error: Float[Tensor, " rows"], bars: Float[Tensor, "rows bars"]
    ) -> Reduced:
        """The best and the worst of each row, exactly, and sums over all of it (products are exact, and added up in float32).

        Args:
            error: By how much a logit of the row may err, beside what grows with the logit.
            bars: What its logits are compared with.
        """
        n, rows = len(rows), _aligned(rows)
        columns, depth = self.U.shape
        groups, tiles = -(-columns // GROUP), self._sums.shape[1]
        normaliser, entropy = torch.empty(2, n, device=rows.device, dtype=torch.float32)
        bars = bars.contiguous()
        a, b = TensorDescriptor.from_tensor(rows, [ROWS, DEPTH]), TensorDescriptor.from_tensor(self.U, [COLUMNS, DEPTH])
        with torch.cuda.device(rows.device):
            # Columns beyond the vocabulary are masked in a launch of their own: a branch for them in the loop over tiles
            # would keep the compiler from loading the next tile while one is reduced (a fifth slower).
            for start, stop, masked in ((0, columns // COLUMNS, False), (columns // COLUMNS, tiles, True)):
                if start < stop:
                    _product[(self._processors,)](  # pyright: ignore[reportIndexIssue]
                        a, b, self._highs, self._lows, self._peaks, self._sums, self._weighted, bars, self._above, n, columns,
                        depth, start, stop - start, self.height * groups, self.height * tiles, groups, tiles,
                        self._processors, MASKED=masked, HIGHS=self.k > 0, LOWS=self.k_bottom > 0, ENTROPY=self.entropy,
                        BARS=self.bars, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, GROUP=GROUP, BAND=BAND,
                        num_warps=8, num_stages=3,
                    )  # fmt: skip
            _normalisers[(n,)](  # pyright: ignore[reportIndexIssue]
                self._peaks, self._sums, self._weighted, normaliser, entropy, tiles, ENTROPY=self.entropy,
                TILES=triton.next_power_of_2(tiles), num_warps=1,
            )  # fmt: skip
            top = self._best(rows, error, self.k, self._highs, sign=1.0)
            bottom = self._best(rows, error, self.k_bottom, self._lows, sign=-1.0)
        return Reduced(top, bottom, normaliser, entropy, self._above[:, :n].sum(2).T)

    def _best(self, rows: Tensor, error: Tensor, k: int, extremes: Tensor, *, sign: float) -> Best:
        n, (columns, depth), groups = len(rows), self.U.shape, extremes.shape[2]
        values = torch.empty(n, k, device=rows.device, dtype=torch.float32)
        ids = torch.empty(n, k, device=rows.device, dtype=torch.long)
        crowded = torch.zeros(n, device=rows.device, dtype=torch.bool)
        if k:
            relative = GROWTH * depth + GROUP * 2.0**-23  # the last bits of an extreme hold its column
            _best_of_groups[(n,)](  # pyright: ignore[reportIndexIssue]
                extremes, rows, self.U, error, values, ids, crowded, extremes.stride(0), columns, groups, depth, sign,
                relative, K=k, CHOSEN=k + SPARE, SLOTS=2 * triton.next_power_of_2(k + SPARE),
                GROUPS=triton.next_power_of_2(groups), GROUP=GROUP, num_warps=4,
            )  # fmt: skip
        return Best(values, ids, crowded)

    @cached_property
    def _processors(self) -> int:
        return torch.cuda.get_device_properties(self.U.device).multi_processor_count


@triton.jit
@no_type_check  # the tests' type checker must not wrap what Triton compiles
def _two_largest(a, b, c, d):
    """Of two pairs, each with its larger number first."""
    return tl.maximum(a, c), tl.maximum(tl.minimum(a, c), tl.maximum(b, d))


@triton.jit
@no_type_check
def _two_smallest(a, b, c, d):
    return tl.minimum(a, c), tl.minimum(tl.maximum(a, c), tl.minimum(b, d))


@triton.jit
@no_type_check
def _reduced(x, above, below, ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, ENTROPY: tl.constexpr):
    """Extremes of the groups of a tile, its rows' peaks, Σ exp(x - peak), and Σ exp(x - peak) (x - peak).

    `above` and `below` are its numbers with their columns in them, where columns beyond the vocabulary lose.
    """
    above, below = tl.reshape(above, [ROWS, GROUPS, GROUP]), tl.reshape(below, [ROWS, GROUPS, GROUP])
    lost = tl.full([ROWS, GROUPS, GROUP], float("inf"), tl.float32)
    high, second_high = tl.reduce((above, -lost), 2, _two_largest)
    low, second_low = tl.reduce((below, lost), 2, _two_smallest)
    peak = tl.max(high, 1)
    weights = tl.exp2(x * 1.4426950408889634 - (peak * 1.4426950408889634)[:, None])
    weighted = tl.sum(weights * (x - peak[:, None]), 1) if ENTROPY else peak
    return high, second_high, low, second_low, peak, tl.sum(weights, 1), weighted


@triton.jit
@no_type_check
def _product(
    a, b, highs, lows, peaks, sums, weights, bars, counts, n_rows, n_columns, depth, start, wide, plane, counts_plane, n_groups,
    n_tiles, n_programs, MASKED: tl.constexpr, HIGHS: tl.constexpr, LOWS: tl.constexpr, ENTROPY: tl.constexpr,
    BARS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    """Each program works through tiles of `a @ b.T`, a band of rows after the other."""
    tall = tl.cdiv(n_rows, ROWS)
    groups_a_tile: tl.constexpr = COLUMNS // GROUP
    for tile in tl.range(tl.program_id(0), tall * wide, n_programs, flatten=True):
        first = tile // (BAND * wide) * BAND
        band = min(tall - first, BAND)
        i, j = first + (tile % (BAND * wide)) % band, start + (tile % (BAND * wide)) // band
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in range(tl.cdiv(depth, DEPTH)):
            x = tl.dot(a.load([i * ROWS, step * DEPTH]), b.load([j * COLUMNS, step * DEPTH]).T, x)
        column = tl.arange(0, COLUMNS)[None, :]
        marked = ((x.to(tl.int32, bitcast=True) & -GROUP) | (column % GROUP)).to(tl.float32, bitcast=True)
        above, below = marked, marked
        if MASKED:
            inside = j * COLUMNS + column < n_columns
            above, below = tl.where(inside, marked, float("-inf")), tl.where(inside, marked, float("inf"))
            x = tl.where(inside, x, -1e30)  # no weight, and no NaN when that is multiplied
        high, second_high, low, second_low, peak, total, weighted = _reduced(
            x, above, below, ROWS, groups_a_tile, GROUP, ENTROPY
        )
        row = i * ROWS + tl.arange(0, ROWS)
        group = j * groups_a_tile + tl.arange(0, groups_a_tile)
        here = row[:, None].to(tl.int64) * n_groups + group[None, :]
        there = (row[:, None] < n_rows) & (group[None, :] < n_groups)
        if HIGHS:
            tl.store(highs + here, high, mask=there)
            tl.store(highs + plane + here, second_high, mask=there)
        if LOWS:
            tl.store(lows + here, low, mask=there)
            tl.store(lows + plane + here, second_low, mask=there)
        tl.store(peaks + row.to(tl.int64) * n_tiles + j, peak, mask=row < n_rows)
        tl.store(sums + row.to(tl.int64) * n_tiles + j, total, mask=row < n_rows)
        if ENTROPY:
            tl.store(weights + row.to(tl.int64) * n_tiles + j, weighted, mask=row < n_rows)
        for bar in tl.static_range(BARS):
            least = tl.load(bars + row.to(tl.int64) * BARS + bar, mask=row < n_rows, other=0.0)
            count = tl.sum((x > least[:, None]).to(tl.int32), 1)
            tl.store(counts + bar * counts_plane + row.to(tl.int64) * n_tiles + j, count, mask=row < n_rows)


@triton.jit
@no_type_check
def _normalisers(
    peaks, sums, weights, normalisers, entropies, n_tiles, ENTROPY: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """log Σ exp over the tiles of a row, and the entropy, added up in float64."""
    row, tile = tl.program_id(0).to(tl.int64), tl.arange(0, TILES)
    peak = tl.load(peaks + row * n_tiles + tile, mask=tile < n_tiles, other=float("-inf"))
    total = tl.load(sums + row * n_tiles + tile, mask=tile < n_tiles, other=0.0)
    highest = tl.max(peak, 0)
    share = tl.exp(peak - highest)
    whole = tl.sum(total.to(tl.float64) * share, 0)
    tl.store(normalisers + row, (highest + tl.log(whole)).to(tl.float32))
    if ENTROPY:
        weighted = tl.load(weights + row * n_tiles + tile, mask=tile < n_tiles, other=0.0)
        shift = tl.where(tile < n_tiles, peak - highest, 0.0)
        mean = tl.sum((weighted.to(tl.float64) + total.to(tl.float64) * shift) * share, 0) / whole
        tl.store(entropies + row, tl.maximum(tl.log(whole) - mean, 0.0).to(tl.float32))


@triton.jit
@no_type_check
def _exactly(row, column, depth):
    """A row times a column: float32 holds the products of half-precision numbers, float64 their sum."""
    step = tl.arange(0, 1024)
    total = tl.zeros([1024], tl.float64)
    for start in range(0, depth, 1024):
        inside = start + step < depth
        left = tl.load(row + start + step, mask=inside, other=0.0).to(tl.float32)
        total += (left * tl.load(column + start + step, mask=inside, other=0.0).to(tl.float32)).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
@no_type_check
def _best_of_groups(
    extremes, rows, U, error, values, ids, crowded, plane, n_columns, n_groups, depth, sign, relative, K: tl.constexpr,
    CHOSEN: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The best of a row lie in the groups with the best extremes. Each chosen group has two slots, for its two best."""
    row = tl.program_id(0).to(tl.int64)
    slot, group = tl.arange(0, SLOTS), tl.arange(0, GROUPS)
    best = tl.load(extremes + row * n_groups + group, mask=group < n_groups, other=0.0) * sign
    best = tl.where(group < n_groups, best, float("-inf"))
    chosen = tl.zeros([SLOTS], tl.int32)
    last = float("inf")
    for i in range(CHOSEN):
        last = tl.max(best, 0)
        at = tl.min(tl.where(best == last, group, GROUPS - 1), 0)
        chosen = tl.where(slot // 2 == i, at, chosen)
        best = tl.where(group == at, float("-inf"), best)
    used = slot < 2 * CHOSEN
    marked = tl.load(extremes + (slot % 2) * plane + row * n_groups + chosen, mask=used, other=0.0)
    column = chosen * GROUP + (marked.to(tl.int32, bitcast=True) & (GROUP - 1))
    roughly = tl.where(used, marked * sign, float("-inf"))

    remaining, kth = roughly, float("inf")
    for _ in range(K):
        kth = tl.max(remaining, 0)
        at = tl.min(tl.where(remaining == kth, slot, SLOTS), 0)
        remaining = tl.where(slot == at, float("-inf"), remaining)
    largest = tl.maximum(tl.max(roughly, 0), -kth)
    floor = kth - 2 * (tl.load(error + row) + relative * largest)
    many = last >= floor  # a group that was not chosen may hold one

    exact = tl.full([SLOTS], float("-inf"), tl.float64)
    for i in range(2 * CHOSEN):
        if tl.max(tl.where(slot == i, roughly, float("-inf")), 0) >= floor:
            this = tl.max(tl.where(slot == i, column, 0), 0)
            if this < n_columns:  # a row of NaN has no columns, and is refused later
                value = _exactly(rows + row * depth, U + this.to(tl.int64) * depth, depth) * sign
                exact = tl.where(slot == i, value, exact)
    for i in range(CHOSEN):
        if tl.max(tl.where(slot == 2 * i + 1, roughly, float("-inf")), 0) >= floor:
            beginning = tl.max(tl.where(slot == 2 * i, chosen, 0), 0) * GROUP
            for this in range(beginning, min(beginning + GROUP, n_columns)):
                if tl.max(((column == this) & (roughly >= floor)).to(tl.int32), 0) == 0:
                    value = _exactly(rows + row * depth, U + this.to(tl.int64) * depth, depth) * sign
                    if value >= floor:
                        free = tl.min(tl.where(exact == float("-inf"), slot, SLOTS), 0)
                        many = many | (free == SLOTS)
                        exact, column = tl.where(slot == free, value, exact), tl.where(slot == free, this, column)
                        roughly = tl.where(slot == free, floor, roughly)
    tl.store(crowded + row, many)

    for i in range(K):
        most = tl.max(exact, 0)
        at = tl.min(tl.where(exact == most, column, 2147483647), 0)
        tl.store(values + row * K + i, (most * sign).to(tl.float32))
        tl.store(ids + row * K + i, at.to(tl.int64))
        exact = tl.where(column == at, float("-inf"), exact)
