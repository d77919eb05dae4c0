"""The GPU kernel, against float64. It is for Hopper GPUs and is not tried elsewhere."""

import pytest
import torch
from torch import nn

from workbench import tiles
from workbench.near_ties import GROWTH
from workbench.projector import Projector
from workbench.vocabulary import Vocabulary

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
K = 10


def head(d_model: int, d_vocab: int, dtype=torch.bfloat16, seed: int = 0) -> Vocabulary:
    torch.manual_seed(seed)
    U = torch.randn(d_vocab, d_model, device="cuda").to(dtype)
    return Vocabulary(U.T, None, torch.ones(d_model, device="cuda", dtype=dtype), nn.Identity())


def check(voc: Vocabulary, x: torch.Tensor, k: int, k_bottom: int):
    projector = Projector(voc, k=k, k_bottom=k_bottom)
    found = projector(x)
    assert projector.engine == "fused"
    for rows in torch.arange(len(x), device="cuda").split(1000):
        z = x[rows].double() @ voc.W_U.double()
        top, bottom = z.sort(dim=1, descending=True, stable=True), z.sort(dim=1, stable=True)
        assert torch.equal(found.top_ids[rows], top.indices[:, :k])
        assert torch.equal(found.bottom_ids[rows], bottom.indices[:, :k_bottom])
        torch.testing.assert_close(found.top_logits[rows], top.values[:, :k].float(), rtol=1e-7, atol=0)
        torch.testing.assert_close(found.bottom_logits[rows], bottom.values[:, :k_bottom].float(), rtol=1e-7, atol=0)
        error = float(x.float().norm(dim=1).max() * voc.scale("none")) * (1e-6 + x.shape[1] / 2**28)  # as near_ties has it
        torch.testing.assert_close(found.log_normaliser[rows].double(), z.logsumexp(1), rtol=1e-7, atol=error)


@pytest.mark.parametrize(
    ("d_model", "d_vocab", "rows", "k", "k_bottom", "dtype"),
    [
        (64, 4099, 1, K, K, torch.bfloat16),
        (72, 50_257, 129, 1, 0, torch.bfloat16),
        (576, 49_152, 1536, 1, K, torch.float16),
        (896, 151_936, 300, 26, 2, torch.bfloat16),
    ],
)
def test_every_boundary_against_float64(d_model, d_vocab, rows, k, k_bottom, dtype):
    x = torch.randn(rows, d_model, device="cuda").to(dtype) / d_model**0.5
    check(head(d_model, d_vocab, dtype), x, k, k_bottom)


def test_a_thousand_rows_of_the_shape_of_llama_8b_have_the_ids_of_float64():
    x = torch.randn(1000, 4096, device="cuda").bfloat16() / 64
    check(head(4096, 128_256), x, K, K)


def test_equal_columns_go_by_lowest_id():
    voc = head(64, 8192)
    voc.W_U.T[4000:4003] = voc.W_U.T[17]
    x = voc.W_U.T[17:18].clone()
    found = Projector(voc, k=5)(x)
    assert found.top_ids[0, :4].tolist() == [17, 4000, 4001, 4002]
    zeros = Projector(voc, k=5, k_bottom=5)(torch.zeros_like(x))
    assert zeros.top_ids.tolist() == zeros.bottom_ids.tolist() == [[0, 1, 2, 3, 4]]


def test_groups_that_hold_many_of_the_best():
    """Neighbouring tokens that are nearly the same direction: third and later ones of a group must be found."""
    voc = head(256, 16_384)
    U = voc.W_U.T
    for start, alike in ((320, 3), (4096, 7), (9999, 12), (16_380, 4)):
        U[start : start + alike] = (U[start].float() + 0.02 * torch.randn(alike, 256, device="cuda")).bfloat16()
    x = torch.cat([U[[320, 4096, 9999, 16_380]], -U[[320, 4096, 9999, 16_380]], U[320:321] + U[4096:4097]])
    check(voc, x.contiguous(), K, K)


def test_large_logits_do_not_overflow_the_softmax():
    voc = head(512, 32_000)
    check(voc, (torch.randn(200, 512, device="cuda") * 40).bfloat16(), K, K)


def test_blocks_are_as_many_as_the_memory_asks_for(monkeypatch):
    from workbench.fused_projection import bytes_a_row

    voc, x = head(128, 8192), torch.randn(1000, 128, device="cuda").bfloat16()
    whole = Projector(voc, k=K, k_bottom=K)(x)
    monkeypatch.setitem(tiles.MEMORY, "cuda", bytes_a_row(8192) * 300)
    parts = Projector(voc, k=K, k_bottom=K)(x)
    for name in ("top_ids", "bottom_ids", "top_logits", "log_normaliser"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize("why", ["float32", "soft cap", "reference"])
def test_what_the_kernel_does_not_do_goes_through_tiles(why):
    voc = head(64, 8192)
    x = torch.randn(10, 64, device="cuda").bfloat16()
    if why == "float32":
        voc, x = head(64, 8192, torch.float32), x.float()
    if why == "soft cap":
        voc = Vocabulary(voc.W_U, None, voc.gain, nn.Identity(), softcap=30.0)
    projector = Projector(voc, decoder="norm" if why == "soft cap" else "none", k=K)
    projector(x, reference=x if why == "reference" else None)
    assert projector.engine == "tiles"


@pytest.mark.parametrize(("d_model", "d_vocab", "rows", "targets"), [(72, 50_257, 33 * 5, 1), (4096, 128_256, 33 * 20, 2)])
def test_entropy_divergence_and_ranks_against_float64(d_model, d_vocab, rows, targets):
    voc, together = head(d_model, d_vocab), 33
    x = (3 * torch.randn(rows, d_model, device="cuda") / d_model**0.5).bfloat16()
    ids = torch.randint(0, d_vocab, (rows, targets), device="cuda")
    ids[:, 0] = (x.double() @ voc.W_U.double()).argmax(1)
    projector = Projector(voc, k=3, entropy=True)
    found = projector(x, ids, last_of=together)
    assert projector.engine == "fused"
    assert found.entropy_nats is not None
    assert found.kl_nats is not None
    assert found.target_ranks is not None
    assert found.target_logits is not None
    z = x.double() @ voc.W_U.double()
    p = torch.log_softmax(z, 1)
    last = p.unflatten(0, (-1, together))[:, -1:].expand(-1, together, -1).flatten(0, 1)
    margin = projector._error(x) + GROWTH * d_model * z.abs().amax(1)  # by which a logit may err
    error = 4 * float(margin.max())  # of means of logits about 3 wide, and of differences of two
    torch.testing.assert_close(found.entropy_nats.double(), -(p.exp() * p).sum(1), rtol=0, atol=error)
    torch.testing.assert_close(found.kl_nats.double(), (last.exp() * (last - p)).sum(1), rtol=0, atol=error)
    assert (found.kl_nats[together - 1 :: together] == 0).all()
    own = z.gather(1, ids)
    torch.testing.assert_close(found.target_logits.double(), own, rtol=1e-5, atol=1e-5)
    assert (found.target_ranks[:, 0] == 0).all()
    for i, one in enumerate(own.T):
        ranks = (z > one[:, None]).sum(1)
        surely = (z > (one + 2 * margin)[:, None]).sum(1)
        assert (found.target_ranks[:, i] <= ranks).all()
        assert (found.target_ranks[:, i] >= surely).all()


def test_one_group_may_be_longer_than_a_block():
    voc = head(64, 8192)
    x = torch.randn(66, 64, device="cuda").bfloat16()
    whole, parts = Projector(voc, k=3), Projector(voc, k=3, memory=40_000)
    a, b = whole(x, None, last_of=33), parts(x, None, last_of=33)
    assert parts.engine == "fused"
    assert a.kl_nats is not None
    assert b.kl_nats is not None
    torch.testing.assert_close(a.kl_nats, b.kl_nats)
