"""Statistics of many units in one pass, against NumPy on all values at once."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.unit_statistics import N_BINS, UnitStatistics, bin_edges, bins_of

CPU = torch.device("cpu")


def values(seed: int, tokens: int, units: int) -> torch.Tensor:
    """Of scales from a millionth to a hundred thousand, some with a mean far from zero."""
    drawn = np.random.default_rng(seed)
    scales = 10 ** drawn.uniform(-6, 5, units)
    return torch.from_numpy(((drawn.normal(size=(tokens, units)) + drawn.choice([0, 30], units)) * scales).astype(np.float32))


def passed(all_values: torch.Tensor, cuts: list[int], k: int = 3, sample: int = 8) -> UnitStatistics:
    """The statistics after batches cut there."""
    running, keys = UnitStatistics(all_values.shape[1], k, CPU, sample=sample), torch.arange(len(all_values))
    bounds = [0, *sorted(min(cut, len(all_values)) for cut in cuts), len(all_values)]
    for start, stop in pairwise(bounds):
        running.add(all_values[start:stop], keys[start:stop])
    return running


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(1, 60), st.integers(1, 5), st.lists(st.integers(0, 60), max_size=4))
def test_whatever_the_batches_the_statistics_are_those_of_all_values(seed, tokens, units, cuts):
    given_values = values(seed, tokens, units)
    found, exact = passed(given_values, cuts), given_values.double()
    assert found.tokens == tokens
    # float32 sums of a batch, relative to the largest value
    size = exact.abs().amax(0)
    assert ((found.mean - exact.mean(0)).abs() <= 1e-6 * size).all()
    assert ((found.std - exact.std(0, correction=0)).abs() <= 1e-5 * size).all()
    assert torch.equal(found.positive, (given_values > 0).sum(0))
    assert torch.equal(found.lowest, given_values.amin(0))
    k = min(3, tokens)
    assert torch.equal(found.top[:, :k], given_values.topk(k, dim=0).values.T)
    assert torch.equal(given_values.T.gather(1, found.top_keys[:, :k]), found.top[:, :k])
    assert (found.top_keys[:, k:] == -1).all()
    assert torch.equal(found.sample, given_values[found.sample_keys].T)
    assert found.sample.shape[1] == min(8, tokens)


def test_the_histogram_is_numpys():
    given_values = values(3, 5000, 7)
    found, edges = passed(given_values, [100, 2000]).histogram, bin_edges()
    assert len(edges) == N_BINS + 1
    assert (np.diff(edges) > 0).all()
    for unit in range(7):
        expected, _ = np.histogram(given_values[:, unit].numpy(), bins=edges)
        # A value that is an edge itself falls on the side away from zero; numpy's falls upwards.
        on_edge = np.isin(given_values[:, unit].numpy(), -edges).sum()
        assert np.abs(expected - found[unit].numpy()).sum() <= 2 * on_edge
        assert found[unit].sum() == 5000


def test_bins_rise_with_the_value():
    given_values = torch.cat([-torch.logspace(20, -30, 999), torch.zeros(1), torch.logspace(-30, 20, 999)])
    bins = bins_of(given_values)
    assert (bins.diff() >= 0).all()
    assert bins[0] == 0
    assert bins[999] == N_BINS // 2
    assert bins[-1] == N_BINS - 1
    inner = (given_values.abs() > 2**-11) & (given_values.abs() < 2**13)
    edges = torch.from_numpy(bin_edges())[bins[inner].long()]
    widths = torch.from_numpy(np.diff(bin_edges()))[bins[inner].long()]
    assert ((given_values[inner] >= edges) & (given_values[inner] <= edges + widths)).all()
    assert (widths <= given_values[inner].abs() / 4 * 1.0001).all()  # a quarter of an octave


def test_the_sample_is_uniform_and_the_same_in_any_order():
    keys = torch.arange(20_000)
    rising = keys.float().unsqueeze(1)
    one, other = UnitStatistics(1, 1, CPU, sample=1000), UnitStatistics(1, 1, CPU, sample=1000)
    one.add(rising, keys)
    for part in keys.flip(0).split(777):
        other.add(rising[part], part)
    assert set(one.sample_keys.tolist()) == set(other.sample_keys.tolist())
    counts = np.histogram(one.sample_keys.numpy(), bins=10, range=(0, 20_000))[0]
    assert ((counts - 100) ** 2 / 100).sum() < 27.9  # chi-square of 9 degrees of freedom, once in a thousand
    assert not np.array_equal(one.sample_keys, sampled(keys, seed=1))


def sampled(keys, seed):
    found = UnitStatistics(1, 1, CPU, sample=1000, seed=seed)
    found.add(keys.float().unsqueeze(1), keys)
    return found.sample_keys
