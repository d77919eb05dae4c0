"""What thousands of units do over a corpus, in one pass: moments, histogram, largest values, and a sample of tokens.

A unit is anything with one number a token: a neuron, a direction, a head's length. Pure tensor code; nothing is kept but what
is counted, so memory does not depend on how many tokens pass by.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_PER_OCTAVE, _SHIFT = 4, 21
"""A float32's bits from the 21st on are its exponent and two bits of its mantissa: four bins between powers of two."""
_LOWEST = (127 - 12) * _PER_OCTAVE - 1
SIDE = 26 * _PER_OCTAVE
"""Bins on each side of the middle one, from 2^-12 to 2^14; nearer to zero is the middle, farther the last on that side."""
N_BINS = 2 * SIDE + 1

_BLOCK = {"cpu": 512, "cuda": 8192}
"""Units at a time: on a CPU so that what is made of them stays in the cache, on a GPU so that it takes little memory."""


def bins_of(values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The histogram's bin of each value (int32); rising with the value."""
    raw = values.view(torch.int32)
    level = raw.bitwise_and(0x7FFF_FFFF).bitwise_right_shift_(_SHIFT).sub_(_LOWEST).clamp_(0, SIDE)
    return level.mul_(raw.bitwise_right_shift(31).bitwise_or_(1)).add_(SIDE)


def bin_edges() -> np.ndarray:
    """The `N_BINS + 1` edges between bins, the outer ones infinite."""
    octave = np.arange(SIDE + 1) // _PER_OCTAVE - 12
    positive = np.ldexp(1 + np.arange(SIDE + 1) % _PER_OCTAVE / _PER_OCTAVE, octave)[:SIDE]
    return np.concatenate([[-np.inf], -positive[::-1], positive, [np.inf]])


def count_bins(values: Float[Tensor, "unit token"]) -> Int[Tensor, "unit bin"]:
    """How many values each unit has in each bin."""
    n = len(values)
    flat = bins_of(values).add_(torch.arange(n, dtype=torch.int32, device=values.device).unsqueeze(1) * N_BINS)
    # In the order of memory. On a GPU that is token by token: neighbours then count for other units, not all for one.
    flat = flat if flat.is_contiguous() else flat.t()
    return torch.bincount(flat.reshape(-1), minlength=n * N_BINS).view(n, N_BINS)


class UnitStatistics:
    """Sums that go on as tokens come.

    Args:
        n: Units.
        k: Largest values that are kept of each.
        sample: Tokens, drawn at random and the same for all units, of which every unit's value is kept.
    """

    def __init__(self, n: int, k: int, device: torch.device, *, sample: int = 1024, seed: int = 0) -> None:
        self.n, self.k, self.tokens = n, k, 0
        self.histogram = torch.zeros(n, N_BINS, dtype=torch.int64, device=device)
        self.top = torch.full((n, k), -torch.inf, device=device)
        self.top_keys = torch.full((n, k), -1, dtype=torch.int64, device=device)
        self.positive = torch.zeros(n, dtype=torch.int64, device=device)
        """Tokens above zero."""
        self.lowest = torch.full((n,), torch.inf, device=device)
        self._mean = torch.zeros(n, dtype=torch.float64, device=device)
        self._squares = torch.zeros(n, dtype=torch.float64, device=device)
        """Of deviations from the mean."""
        self._sample, self._seed = sample, seed
        self._priorities = np.empty(0, np.uint64)
        self.sample = torch.empty(n, 0, device=device)
        self.sample_keys = torch.empty(0, dtype=torch.int64, device=device)

    def add(self, values: Float[Tensor, "token unit"], keys: Int[Tensor, " token"]) -> None:
        """
        Args:
            keys: Of the tokens, each its own; they decide which are drawn for the sample.
        """
        if not len(values):
            return
        step = _BLOCK.get(values.device.type, self.n)
        sums = [self._add_block(values[:, start : start + step], keys, start) for start in range(0, self.n, step)]
        mean, squares = (torch.cat(parts) for parts in zip(*sums, strict=True))
        # Chan, Golub & LeVeque 1979: two means and sums of squares into one, without subtracting large numbers.
        total = self.tokens + len(values)
        shift = mean - self._mean
        self._squares += squares + shift.square() * (self.tokens * len(values) / total)
        self._mean += shift * (len(values) / total)
        self.tokens = total
        self._draw(values, keys)

    def _add_block(self, values: Tensor, keys: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Mean and squared deviations of the batch, of units from `start` on; the rest is added here."""
        own = slice(start, start + values.shape[1])
        # On a CPU unit by unit in memory, so that what is counted for one stays in the cache.
        values = values.t().contiguous().float() if values.device.type == "cpu" else values.float().t()
        mean = values.mean(1, keepdim=True)
        squares = (values - mean).square_().sum(1).double()
        self.histogram[own] += count_bins(values)
        self.positive[own] += (values > 0).sum(1)
        torch.minimum(self.lowest[own], values.amin(1), out=self.lowest[own])
        rising = (values.amax(1) > self.top[own, -1]).nonzero().squeeze(1)
        if len(rising):
            found = values[rising].topk(min(self.k, values.shape[1]), dim=1)
            both = torch.cat([self.top[own][rising], found.values], 1)
            both_keys = torch.cat([self.top_keys[own][rising], keys[found.indices]], 1)
            chosen = both.topk(self.k, dim=1)
            self.top[start + rising] = chosen.values
            self.top_keys[start + rising] = both_keys.gather(1, chosen.indices)
        return mean.squeeze(1).double(), squares

    def _draw(self, values: Tensor, keys: Tensor) -> None:
        """Tokens with the smallest of fixed pseudo-random numbers stay, whichever order they come in."""
        priorities = np.concatenate([self._priorities, _mixed(keys.cpu().numpy(), self._seed)])
        stay = np.sort(np.argsort(priorities, kind="stable")[: self._sample])
        old, new = stay[stay < len(self._priorities)], stay[stay >= len(self._priorities)] - len(self._priorities)
        if not len(new):
            return
        index, old_index = (torch.from_numpy(i).to(values.device) for i in (new, old))
        self.sample = torch.cat([self.sample[:, old_index], values[index].t().float()], 1)
        self.sample_keys = torch.cat([self.sample_keys[old_index], keys[index]])
        self._priorities = priorities[stay]

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def std(self) -> Tensor:
        """Over tokens, of the population."""
        return (self._squares / max(self.tokens, 1)).sqrt()


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random number of each key (SplitMix64, Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
