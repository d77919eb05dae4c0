import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.selection import GROUP, group_extremes, merge, select


def dense(x, k, largest):
    values, columns = x.sort(dim=1, descending=largest, stable=True)
    return values[:, :k], columns[:, :k]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 40 * GROUP),
    k=st.integers(1, 12),
    tile=st.sampled_from([GROUP, 4 * GROUP, 10 * GROUP + 7, 10_000]),
    values=st.sampled_from([2, 7, 1_000_000]),
    largest=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_selection_is_a_stable_sort_whatever_the_tiles_and_ties(rows, columns, k, tile, values, largest, seed):
    # Few distinct values make ties at every boundary; many make none.
    x = torch.randint(values, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    k = min(k, columns)
    found = select(x, k, largest=largest, tile=tile)
    expected = dense(x, k, largest)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_all_equal_values_give_the_first_columns():
    found = select(torch.zeros(2, 5000), 10, tile=1024)
    assert torch.equal(found[1], torch.arange(10).expand(2, 10))


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(1, 399), k=st.integers(1, 10), largest=st.booleans(), seed=st.integers(0, 2**31))
def test_merging_two_halves_equals_selecting_from_the_whole(cut, k, largest, seed):
    x = torch.randint(9, (3, 400), generator=torch.Generator().manual_seed(seed)).float()
    first = select(x[:, :cut], min(k, cut), largest=largest)
    values, columns = select(x[:, cut:], min(k, 400 - cut), largest=largest)
    found = merge(first, (values, columns + cut), k, largest=largest)
    expected = dense(x, k, largest)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_group_extremes_leave_out_only_the_rest():
    x = torch.arange(3 * GROUP + 5.0)[None]
    assert group_extremes(x, largest=True).max() == 3 * GROUP - 1
    assert group_extremes(x, largest=False).min() == 0
