"""All that is asked of float32 logits on a CPU, in one visit of each row (numba).

A row (200 KB for 49,152 tokens) fits the second-level cache of a core: it comes from memory once, and while it comes it is
exponentiated, added up, compared with the targets, and its groups' maxima are taken. Measured on two cores: all of that takes
0.13 to 0.17 of the time of the product of vectors of 576 numbers, passes of torch over the same logits 0.8; half of it is
the memory.

The compiled functions have no threads of their own and release the GIL: they are run in Python's threads, so that no second
pool of threads spins beside torch's.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float
from numba import njit
from torch import Tensor

from workbench.projection import Projection
from workbench.reductions import Asked

PART = 1024
"""Tokens that are worked on while they are in the first-level cache. Their sums are float32, those of all parts float64; and
token i of every part is of the group i whose maximum is taken."""
SAFE = np.float32(16)
"""Nats by which a logit may exceed the shift, which is the highest of the row's first `SAMPLE`; else the row is done again, as
an entropy of nearly 0 is a small difference of sums of that size."""
SAMPLE = 128
TASKS = 4
"""Parts of a block a thread, so that one that was held up does not hold up the others."""

_ADDED = {"reassoc", "contract", "nsz"}
"""A sum may be split over the lanes of a vector; NaN stays NaN."""
_ONE, _LEAST, _LOG2_E, _ROUNDER = (np.float32(c) for c in (1, -87, 1.4426950408889634, 1.5 * 2**23))
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # the first is exact in 10 bits
_C2, _C3, _C4, _C5, _C6 = (np.float32(c) for c in (0.49999994, 0.16666532, 0.041668388, 0.0083687454, 0.0013814540))


class InOneVisit:
    """A `Reduction` whose window holds all tokens."""

    def __init__(self, asked: Asked):
        self.asked = asked
        self._found: Projection | None = None

    def add(self, z: Tensor, start: int) -> None:
        """Waits for the rest of the rows."""

    def add_window(self, held: Tensor, start: int) -> None:
        self._found = reduced(held, self.asked)

    def projection(self) -> Projection:
        assert self._found is not None
        return self._found


def reduced(logits: Float[Tensor, "rows d_vocab"], asked: Asked) -> Projection:
    """Reduce all logits of some rows, in as many threads as torch has. They follow each other in memory; k is at least 1; there
    is no reference but the last of each group."""
    rows, together = len(logits), asked.last_of or 1
    targets = torch.empty(rows, 0, dtype=torch.long) if asked.targets is None else asked.targets.contiguous()
    top, bottom = (torch.empty(rows, min(width, logits.shape[1])) for width in (asked.k, asked.k_bottom))
    top_ids, bottom_ids = (torch.empty(values.shape, dtype=torch.long) for values in (top, bottom))
    sums, distances = torch.empty(rows, 3, dtype=torch.float64), torch.empty(rows, dtype=torch.float64)
    own, ranks = torch.empty(targets.shape), torch.empty(targets.shape, dtype=torch.long)
    arrays = [part.numpy() for part in (logits, top, top_ids, bottom, bottom_ids, sums, distances, targets, own, ranks)]
    threads = torch.get_num_threads()
    height = max(1, -(-rows // (together * threads * TASKS))) * together

    def reduce_from(start: int) -> None:
        block, *others = (array[start : start + height] for array in arrays)
        _reduce_rows(block, together, *others)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(reduce_from, range(0, rows, height)))
    shift, total, weighted = sums.unbind(1)
    normaliser = shift + total.log()
    by_group = normaliser.view(-1, together)
    kl = distances.view(-1, together) - by_group[:, -1:] + by_group
    return Projection(
        top_ids=top_ids.clamp_(max=logits.shape[1] - 1),  # where NaNs left a place empty
        top_logits=top,
        bottom_ids=bottom_ids.clamp_(max=logits.shape[1] - 1),
        bottom_logits=-bottom,
        log_normaliser=normaliser.float(),
        entropy_nats=(total.log() - weighted / total).clamp_min(0).float() if asked.entropy else None,
        target_logits=None if asked.targets is None else own,
        target_ranks=None if asked.targets is None else ranks,
        kl_nats=None if asked.last_of is None else kl.clamp_min(0).flatten().float(),
    )


def _kept(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled without the GIL, and for later processes too, unless numba finds no folder that it may write to."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@njit(fastmath={"contract"})  # reassociation would cancel the rounding to n
@no_type_check  # the tests' type checker must not wrap what numba compiles
def _exp(x):
    """exp of a number below 88, of operations that come as whole vectors: within 2 units of the last place (measured: 0.92),
    and e^-87 for all below. Minimax of e^r, where x = n ln 2 + r."""
    x = _LEAST if x < _LEAST else x
    rounded = x * _LOG2_E + _ROUNDER  # its last bits are n
    n = rounded - _ROUNDER
    r = x - n * _LN_2_HIGH
    r = r - n * _LN_2_LOW
    p = (((((_C6 * r + _C5) * r + _C4) * r + _C3) * r + _C2) * r + _ONE) * r + _ONE
    bits = np.float32(p).view(np.int32) + (np.float32(rounded).view(np.int32) << 23)
    return np.int32(bits).view(np.float32)


@njit(fastmath=_ADDED)
@no_type_check
def _mass(z, shift, maxima):
    """Σ exp(z - shift) and Σ exp(z - shift) · (z - shift); z goes into the groups' maxima."""
    total, weighted = np.float32(0), np.float32(0)
    for i in range(len(z)):
        maxima[i] = z[i] if z[i] > maxima[i] else maxima[i]
        x = z[i] - shift
        weight = _exp(x)
        total += weight
        weighted += weight * x
    return total, weighted


@njit
@no_type_check
def exponentiate(z, shift, out):
    """exp(z - shift)."""
    for i in range(len(z)):
        out[i] = _exp(z[i] - shift)


@njit(fastmath=_ADDED)
@no_type_check
def _distance(weights, reference, z):
    """Σ weights · (reference - z)."""
    total = np.float32(0)
    for i in range(len(z)):
        total += weights[i] * (reference[i] - z[i])
    return total


@njit
@no_type_check
def _before(z, own, token):
    """How many of z stand before a token: those above its logit, and its equals of a lower id."""
    count, token = np.int32(0), min(max(token, 0), len(z))
    lower, higher = z[:token], z[token:]
    for i in range(len(lower)):
        count = np.int32(count + np.int32(lower[i] >= own))  # int32, or the vectors are half empty
    for i in range(len(higher)):
        count = np.int32(count + np.int32(higher[i] > own))
    return count


@njit
@no_type_check
def _negated_minima(z, maxima):
    """-z into the groups' maxima."""
    for i in range(len(z)):
        maxima[i] = -z[i] if -z[i] > maxima[i] else maxima[i]


@njit
@no_type_check
def _keep(x, token, values, ids):
    """Put a token among the best so far, which are in order, ties by lowest id."""
    place = len(values)
    while place > 0 and (x > values[place - 1] or (x == values[place - 1] and token < ids[place - 1])):
        place -= 1
    for i in range(len(values) - 1, place, -1):
        values[i], ids[i] = values[i - 1], ids[i - 1]
    if place < len(values):
        values[place], ids[place] = x, token


@njit
@no_type_check
def _find_best(z, sign, maxima, values, ids):
    """The largest sign · z. The k best maxima are themselves logits, so no token below the k-th of them is among the k best."""
    values[:], ids[:] = -np.inf, len(z)
    for i in range(len(maxima)):
        if maxima[i] > values[-1]:
            _keep(maxima[i], i, values, ids)
    least = values[-1]
    values[:], ids[:] = -np.inf, len(z)
    for i in range(len(maxima)):
        if maxima[i] >= least:
            for token in range(i, len(z), PART):
                x = sign * z[token]
                if x >= least:
                    _keep(x, token, values, ids)


@_kept
@no_type_check
def _reduce_rows(logits, together, top, top_ids, bottom, bottom_ids, sums, distances, targets, own, ranks):
    """Rows of all logits, in groups of so many (1: of none), each of which has its last row as reference.

    `sums` of each row are a shift, Σ exp(z - shift) and Σ exp(z - shift) · (z - shift); `distances` are the means of
    reference - z under the reference.
    """
    rows, columns = logits.shape
    maxima = np.empty(min(PART, columns), np.float32)
    weights = np.empty(columns, np.float32)
    for row in range(rows - 1, -1, -1):
        z, last = logits[row], row // together * together + together - 1
        for t in range(targets.shape[1]):
            own[row, t] = z[targets[row, t]]
        shift = np.rint(z[:SAMPLE].max())  # whole, so that z - shift is exact where it counts
        while True:
            maxima[:], ranks[row] = -np.inf, 0
            total = weighted = apart = 0.0
            for a in range(0, columns, PART):
                b = min(a + PART, columns)
                sum_of_part, weighted_of_part = _mass(z[a:b], shift, maxima)
                total += sum_of_part
                weighted += weighted_of_part
                if row < last:
                    apart += _distance(weights[a:b], logits[last, a:b], z[a:b])
                for t in range(targets.shape[1]):
                    ranks[row, t] += _before(z[a:b], own[row, t], targets[row, t] - a)
            peak = maxima.max()
            if not peak - shift > SAFE:
                break
            shift = np.rint(peak)
        _find_best(z, np.float32(1), maxima, top[row], top_ids[row])
        if bottom.shape[1]:
            maxima[:] = -np.inf
            for a in range(0, columns, PART):
                _negated_minima(z[a : a + PART], maxima)
            _find_best(z, np.float32(-1), maxima, bottom[row], bottom_ids[row])
        if together > 1 and row == last:
            exponentiate(z, shift, weights)
        if np.isnan(weighted):  # there is a NaN, which `_exp` may have lost by adding to its bits
            total = weighted
        sums[row, 0], sums[row, 1], sums[row, 2] = shift, total, weighted
        distances[row] = apart / sums[last, 1]
