import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.softmax import RunningSoftmax


def running(z, widths, entropy=True):
    softmax = RunningSoftmax(len(z), entropy=entropy, device=z.device, dtype=z.dtype)
    for tile in z.split(widths, 1):
        softmax.add(tile, tile.amax(1, keepdim=True), torch.empty_like(tile))
    return softmax


@settings(max_examples=100, deadline=None)
@given(
    cut=st.integers(1, 99),
    scale=st.sampled_from([0.1, 1.0, 30.0, 300.0]),
    shift=st.sampled_from([0.0, 39.0, 1000.0, -1000.0]),
    seed=st.integers(0, 2**31),
)
def test_tiles_give_the_normaliser_and_entropy_of_the_whole(cut, scale, shift, seed):
    z = torch.randn(5, 100, generator=torch.Generator().manual_seed(seed)) * scale + shift
    softmax = running(z, [cut, 100 - cut])
    whole = z.double()
    p = whole.softmax(1)
    torch.testing.assert_close(softmax.log_normaliser, whole.logsumexp(1), rtol=1e-6, atol=1e-6)
    entropy = -(p * whole.log_softmax(1)).nan_to_num().sum(1)
    # Logits of size 1000 carry an error of 6e-5 of their own in float32.
    torch.testing.assert_close(softmax.entropy_nats, entropy, rtol=1e-4, atol=1e-4)


def test_a_late_tile_may_raise_the_maximum_by_any_amount():
    z = torch.tensor([[-500.0, -400.0, 0.0, 300.0, 5000.0]])
    assert running(z, 1).log_normaliser.item() == 5000.0
    assert running(z.flip(1), 1).log_normaliser.item() == 5000.0


def test_entropy_must_be_asked_for():
    with pytest.raises(ValueError, match="not asked for its entropy"):
        _ = running(torch.zeros(1, 4), 2, entropy=False).entropy_nats
