"""All logits of a row in one visit, against float64 and against passes over the same rows."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from workbench import tiles
from workbench.errors import NotFinite
from workbench.fused_reduction import exponentiate, reduced
from workbench.projection import Projection
from workbench.projector import Projector
from workbench.reductions import Asked
from workbench.vocabulary import Vocabulary

K = 16
SHAPES = [(62, 1000, 1.0), (31, 4999, 3.0), (93, 20_001, 3.0), (31, 2048, 30.0), (31, 700, 0.01)]
"""Rows, tokens and spread: whole parts of the vocabulary and others, flat rows and peaked ones."""


def check(found: Projection, z: torch.Tensor, targets: torch.Tensor) -> None:
    """Ids and ranks exactly; what is in nats to the rounding of float32 logits."""
    best, worst = z.sort(dim=1, descending=True, stable=True), z.sort(dim=1, stable=True)
    k, k_bottom = found.top_ids.shape[1], found.bottom_ids.shape[1]
    assert torch.equal(found.top_ids, best.indices[:, :k])
    assert torch.equal(found.top_logits, best.values[:, :k])
    assert torch.equal(found.bottom_ids, worst.indices[:, :k_bottom])
    assert torch.equal(found.bottom_logits, worst.values[:, :k_bottom])
    assert found.target_ranks is not None
    assert torch.equal(found.target_ranks, best.indices.argsort(1).gather(1, targets))
    assert torch.equal(found.target_logits, z.gather(1, targets))
    q = z.double().log_softmax(1)
    torch.testing.assert_close(found.log_normaliser.double(), z.double().logsumexp(1), rtol=4e-7, atol=4e-7)
    assert found.entropy_nats is not None
    torch.testing.assert_close(found.entropy_nats.double(), -(q.exp() * q).sum(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shift", [0.0, 500.0, pytest.param(-500.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("last_of", [None, 31])
def test_everything_equals_float64(shape, shift, last_of, generator):
    rows, d_vocab, spread = shape
    z = torch.randn(rows, d_vocab, generator=generator) * spread + shift
    targets = torch.randint(0, d_vocab, (rows, 2), generator=generator)
    found = reduced(z, Asked(K, K, True, targets, last_of=last_of))
    check(found, z, targets)
    if last_of is None:
        assert found.kl_nats is None
        return
    q = z.double().log_softmax(1)
    p = q[30::31].repeat_interleave(31, 0)
    assert found.kl_nats is not None
    torch.testing.assert_close(found.kl_nats.double(), (p.exp() * (p - q)).sum(1), rtol=1e-6, atol=5e-6)
    assert (found.kl_nats[30::31] == 0).all(), "of the last rows themselves exactly"


@pytest.mark.parametrize(("rows", "d_vocab", "k"), [(1, 1, 1), (1, 5, 5), (3, 1500, 1500), (2, 3000, 1100), (1, 1024, 1)])
def test_every_size(rows, d_vocab, k, generator):
    """One row, one token; all tokens wanted; more than there are groups."""
    z = torch.randn(rows, d_vocab, generator=generator)
    targets = torch.full((rows, 1), d_vocab - 1)
    check(reduced(z, Asked(k, k, True, targets)), z, targets)


@pytest.mark.parametrize("period", [1, 7])
@pytest.mark.parametrize("d_vocab", [5, 5000])
def test_equal_logits_go_by_lowest_id(period, d_vocab):
    z = (torch.arange(d_vocab) % period).float().expand(3, -1).contiguous()
    targets = torch.arange(d_vocab).expand(3, -1)
    check(reduced(z, Asked(10, 10, True, targets)), z, targets)


def test_no_rows_and_nothing_else_asked():
    found = reduced(torch.empty(0, 100), Asked(5, 0, False))
    assert found.top_ids.shape == (0, 5)
    assert found.entropy_nats is found.target_ranks is found.kl_nats is None


def test_a_logit_far_above_the_first_does_not_overflow(generator):
    z = torch.randn(31, 5000, generator=generator)
    z[:, 4000] = 300
    z[5, :100] = -1000
    z[7] = -3e4
    z[7, 3] = 3e4
    z[9] -= 3e4
    targets = torch.zeros(31, 1, dtype=torch.long)
    found = reduced(z, Asked(K, K, True, targets, last_of=31))
    q = z.double().log_softmax(1)
    torch.testing.assert_close(found.log_normaliser.double(), z.double().logsumexp(1), rtol=4e-7, atol=4e-7)
    torch.testing.assert_close(found.entropy_nats.double(), -(q.exp() * q).sum(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.kl_nats.double(), (q[30:].exp() * (q[30:] - q)).sum(1), rtol=1e-6, atol=1e-5)


def test_exp_errs_by_less_than_2_units_of_the_last_place():
    x = np.linspace(-87, 80, 500_001, dtype=np.float32)
    found = np.empty_like(x)
    exponentiate(x, np.float32(0), found)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(found - exact) / np.spacing(exact.astype(np.float32))).max() < 2
    special = np.array([0, np.nan, -np.inf, -1e4], np.float32)
    exponentiate(special.copy(), np.float32(0), special)
    assert special[0] == 1
    assert np.isnan(special[1])
    assert (special[2:] < 1e-37).all()


NAN_WITH_LOW_BITS = np.array([0x7FC00001], np.int32).view(np.float32)[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, NAN_WITH_LOW_BITS], ids=["nan", "inf", "nan with a payload"])
def test_what_is_not_finite_is_seen_in_the_normaliser(bad, generator):
    z = torch.randn(5, 3000, generator=generator)
    z.numpy()[2, 1234], z.numpy()[3], z.numpy()[4, 0] = bad, bad, bad
    found = reduced(z, Asked(K, K, True))
    assert found.log_normaliser.isfinite().tolist() == [True, True, False, False, False]


@pytest.fixture
def at_once(monkeypatch):
    """Also rows so few that they would be reduced in passes."""
    monkeypatch.setattr(tiles, "FEW", 0)


def without_numba(monkeypatch):
    monkeypatch.setattr(tiles, "has_numba", lambda: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_passes_find_the_same(at_once, dtype, monkeypatch, generator):
    """A block that is not full, and a window of more than one tile."""
    W_U = (torch.randn(9000, 64, generator=generator).T / 4).to(dtype)
    x, targets = torch.randn(806, 64, generator=generator) * 3, torch.randint(0, 9000, (806, 2), generator=generator)
    projector = Projector(Vocabulary(W_U, None, None, nn.Identity()), k=10, k_bottom=10, entropy=True)
    found = projector(x, targets, last_of=31)
    without_numba(monkeypatch)
    expected = projector(x, targets, last_of=31)
    for name in ("top_ids", "bottom_ids", "target_ranks", "top_logits", "bottom_logits", "target_logits"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("log_normaliser", "entropy_nats", "kl_nats"):  # that of passes is the less exact
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-5, atol=2e-5)


def test_a_row_that_is_not_finite_is_named(at_once, generator):
    x = torch.randn(37, 16, generator=generator)
    x[23, 4] = torch.nan
    with pytest.raises(NotFinite, match="Row 23 of the 37 to project holds NaN or infinity"):
        Vocabulary(torch.ones(16, 1000), None, None, nn.Identity()).project(x)


def test_what_is_reduced_in_one_visit(monkeypatch):
    x, asked, room = torch.empty(2000, 8), Asked(10, 0, False), 768 * 49_152

    def takes(x=x, asked=asked, d_vocab=49_152, room=room) -> bool:
        return tiles.takes_one_visit(x, asked, d_vocab, room)

    assert takes()
    assert takes(x.bfloat16())
    assert not takes(x.double())
    assert not takes(x[:100]), "passes are over before the code is loaded"
    assert not takes(asked=Asked(10, 0, False, reference=x))
    assert not takes(asked=Asked(1000, 0, False))
    assert not takes(room=255 * 49_152)
    assert not takes(asked=Asked(10, 0, False, last_of=1000))
    without_numba(monkeypatch)
    assert not takes()


def test_a_numba_that_refuses_to_be_imported_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not tiles.has_numba.__wrapped__()


@pytest.mark.slow
def test_two_processes_may_compile_at_once_and_a_third_loads(tmp_path):
    """In a folder of their own, as after a fresh installation."""
    code = (
        "import torch; from workbench.reductions import Asked; from workbench import fused_reduction as f;"
        "found = f.reduced(torch.arange(9.)[None], Asked(2, 0, False)).top_ids.tolist();"
        "print(found, sum(f._reduce_rows.stats.cache_hits.values()))"
    )

    def run(_) -> str:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"NUMBA_CACHE_DIR": str(tmp_path)}
        ).stdout.strip()

    with ThreadPoolExecutor(2) as pool:
        assert all(said.startswith("[[8, 7]]") for said in pool.map(run, range(2)))
    assert run(2) == "[[8, 7]] 1"
