"""Ranks that float32 leaves open: the truth is float64."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.near_ties import SPARE, settle
from workbench.projector import Projector
from workbench.vocabulary import Vocabulary

D, V, K = 32, 2000, 5


def nearly_equal_columns(copies: int, seed: int = 0) -> torch.Tensor:
    """A float32 vocabulary, every column of which has copies that differ from it in a few last bits."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(D, V // copies, generator=generator)
    noise = torch.randn(D, V // copies, copies, generator=generator) * 3e-8
    return (base[..., None] * (1 + noise)).flatten(1)[:, torch.randperm(V // copies * copies, generator=generator)]


@pytest.mark.parametrize("copies", [2, 4, 20], ids=["pairs", "fours", "more than the spare ones"])
@pytest.mark.parametrize("decoder", ["none", "gain", "norm"])
def test_ids_are_those_of_float64_where_float32_cannot_tell(copies, decoder, generator):
    W_U = nearly_equal_columns(copies)
    norm = nn.RMSNorm(D)
    nn.init.uniform_(norm.weight, 0.5, 2)
    b_U = torch.zeros(W_U.shape[1])
    voc = Vocabulary(W_U, b_U, norm.weight.detach(), norm, softcap=30.0)
    x = torch.randn(50, D, generator=generator)
    rows = {"none": x, "gain": x.double() * norm.weight.detach().double(), "norm": norm(x)}[decoder].detach().double()
    z = rows @ W_U.double()
    top, bottom = z.sort(dim=1, descending=True, stable=True).indices, z.sort(dim=1, stable=True).indices
    in_float32 = (rows.float() @ W_U).sort(dim=1, descending=True, stable=True).indices
    assert not torch.equal(in_float32[:, :K], top[:, :K])
    found = voc.project(x, decoder=decoder, k=K, k_bottom=K)
    assert torch.equal(found.top_ids, top[:, :K])
    assert torch.equal(found.bottom_ids, bottom[:, :K])


def test_a_column_much_longer_than_the_others_errs_by_its_own_length():
    """Its rounded logit may fall below those of short columns, of which alone the candidates then are."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        U = nn.functional.normalize(torch.randn(V, D, generator=generator), dim=1)
        x = nn.functional.normalize(torch.randn(1, D, generator=generator), dim=1)
        across = torch.randn(D, generator=generator)
        U[966] = 1e7 * nn.functional.normalize(across - (across @ x[0]) * x[0], dim=0)
        found = Vocabulary(U.T, None, None, nn.Identity()).project(x, k=3, k_bottom=3)
        z = x.double() @ U.T.double()
        assert torch.equal(found.top_ids, z.topk(3).indices)
        assert torch.equal(found.bottom_ids, z.topk(3, largest=False).indices)


@given(st.integers(0, 10_000), st.sampled_from([1e-3, 0.05, 0.3]))
@settings(max_examples=50, deadline=None)
def test_settled_is_sorted_exactly_or_called_crowded(seed, error):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(20, 60, generator=generator, dtype=torch.float64)
    seen = truth + error * (2 * torch.rand(20, 60, generator=generator, dtype=torch.float64) - 1)
    values, ids = seen.topk(K + SPARE)
    asked = []

    def exact(rows, columns):
        asked.append(len(rows))
        return truth[rows].gather(1, columns)

    _, found, crowded = settle(values, ids, K, torch.full((20,), error), exact, largest=True)
    settled = torch.ones(20, dtype=torch.bool)
    settled[crowded] = False
    assert torch.equal(found[settled], truth.topk(K).indices[settled])
    if error == 0.3:
        assert len(crowded)
    if error == 1e-3:
        assert sum(asked) < 20


class _SomeRowsCrowded:
    """In the kernel's place on a machine without a GPU: dense, and wrong in the rows that it calls crowded."""

    def __init__(self, W_U, height, k, k_bottom, entropy, bars):
        self.W_U, self.height, self.k, self.k_bottom, self.bars = W_U, height, k, k_bottom, bars

    def __call__(self, rows, error, bars):
        assert len(rows) <= self.height
        assert (error > 0).all()
        z = rows @ self.W_U
        crowded = torch.arange(len(rows)) % 3 == 0
        best = []
        for k, largest in ((self.k, True), (self.k_bottom, False)):
            found = z.topk(k, largest=largest)
            found.indices[crowded] = 0
            best.append(SimpleNamespace(values=found.values, columns=found.indices, crowded=crowded))
        above = (z[..., None] > bars[:, None]).sum(1)
        return *best, z.logsumexp(1), torch.special.entr(z.softmax(1)).sum(1), above


def test_rows_that_the_kernel_leaves_open_are_done_again(monkeypatch, generator):
    kernel = ModuleType("workbench.fused_projection")
    kernel.__dict__.update(FusedProduct=_SomeRowsCrowded, bytes_a_row=lambda _: 4 * V)
    monkeypatch.setitem(sys.modules, "workbench.fused_projection", kernel)
    monkeypatch.setattr(Projector, "_takes_fused", lambda _, x: x.dtype == torch.float32)
    W_U, x = torch.randn(V, D, generator=generator).T, torch.randn(50, D, generator=generator)
    projector = Projector(Vocabulary(W_U, None, None, nn.Identity()), k=K, k_bottom=2, memory=4 * V * 17)
    monkeypatch.setattr(projector, "_tiles", lambda *_: pytest.fail("went through tiles"))
    targets = torch.randint(0, V, (50, 2), generator=generator)
    found, z = projector(x, targets), x.double() @ W_U.double()
    assert projector.engine == "fused"
    assert torch.equal(found.top_ids, z.topk(K).indices)
    assert torch.equal(found.bottom_ids, z.topk(2, largest=False).indices)
    torch.testing.assert_close(found.log_normaliser, z.logsumexp(1).float())
    ranks = (z[..., None] > z.gather(1, targets)[:, None]).sum(1)
    assert found.target_ranks is not None
    assert torch.equal(found.target_ranks, ranks)


def test_nothing_is_asked_where_nothing_is_open():
    values = torch.arange(20.0, 0, -1)[None]
    settled = settle(values, torch.arange(20)[None], K, torch.full((1,), 0.4), lambda *_: pytest.fail("asked"), largest=True)
    assert torch.equal(settled[1], torch.arange(K)[None])
    assert not len(settled[2])
