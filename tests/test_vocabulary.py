import pytest
import torch
from torch import nn

import workbench.tiles as module
from workbench.errors import NotFinite, UnknownToken
from workbench.projection import Projection
from workbench.projector import Projector
from workbench.vocabulary import Vocabulary

D, V, ROWS, K = 16, 1000, 37, 7
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True, params=["in one visit", "in passes"])
def small_tiles(request, monkeypatch):
    """Tiles, windows and blocks of sizes that divide nothing, so that every boundary is crossed. In both ways: with numba
    installed, rows that are not float32 on a CPU go through passes nevertheless."""
    monkeypatch.setattr(module, "TILE", 192)
    monkeypatch.setattr(module, "HEIGHT", {"cpu": 10, "cuda": 10})
    monkeypatch.setattr(module, "LEAST", 10)
    monkeypatch.setattr(module, "FEW", 0)
    columns = V
    if request.param == "in passes":
        columns = 400
        monkeypatch.setattr(module, "has_numba", lambda: False)
    monkeypatch.setattr(module, "MEMORY", {"cpu": 4 * 10 * columns, "cuda": 4 * 10 * columns})


def vocabulary(dtype=torch.float32, device="cpu") -> Vocabulary:
    """A head with everything that a head can have."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(D, dtype=dtype)
    nn.init.normal_(norm.weight, 1, 0.3, generator=generator)
    nn.init.normal_(norm.bias, 0, 0.3, generator=generator)
    W_U = torch.randn(V, D, generator=generator).to(device, dtype).T
    b_U = torch.randn(V, generator=generator).to(device, dtype)
    norm.to(device)
    return Vocabulary(W_U, b_U, norm.weight.detach(), norm, logit_scale=0.5, softcap=3.0)


def dense(vocabulary: Vocabulary, x, decoder):
    """The definition, in float64."""
    W_U = vocabulary.W_U.double()
    if decoder == "none":
        return x.double() @ W_U
    if decoder == "gain":
        return (x.double() * vocabulary.gain.double()) @ W_U
    z = vocabulary.ln_final(x.to(vocabulary.gain.dtype)).double() @ W_U * vocabulary.logit_scale
    z = z if vocabulary.b_U is None else z + vocabulary.b_U.double()
    return z if vocabulary.softcap is None else vocabulary.softcap * (z / vocabulary.softcap).tanh()


def on_cpu(found: Projection) -> Projection:
    return Projection(**{name: None if part is None else part.cpu() for name, part in vars(found).items()})


@pytest.fixture
def x(generator):
    return torch.randn(ROWS, D, generator=generator)


@pytest.mark.parametrize("decoder", ["none", "gain", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_projection_equals_the_dense_reference(x, decoder, dtype, device):
    voc, x = vocabulary(dtype, device), x.to(device, dtype)
    with torch.no_grad():
        z = dense(voc, x, decoder).cpu()
    targets = torch.tensor([0, 3, V - 1])
    found = on_cpu(voc.project(x, decoder=decoder, k=K, k_bottom=K, entropy=True, targets=targets))
    expected = z.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.top_ids, expected.indices[:, :K])
    assert torch.equal(found.bottom_ids, z.sort(dim=1, stable=True).indices[:, :K])
    close = {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(found.top_logits.double(), expected.values[:, :K], **close)
    torch.testing.assert_close(found.bottom_logits.double(), z.sort(dim=1).values[:, :K], **close)
    torch.testing.assert_close(found.log_normaliser.double(), z.logsumexp(1), **close)
    torch.testing.assert_close(found.top_probabilities.double(), z.softmax(1).topk(K).values, rtol=1e-5, atol=0)
    lowest = (-(-z).topk(K).values - z.logsumexp(1, True)).exp()
    torch.testing.assert_close(found.bottom_probabilities.double(), lowest, rtol=1e-5, atol=0)
    # The entropy of a peaked row is a small difference of logits of size 20, which float32 holds to 1e-6 each.
    entropy = torch.distributions.Categorical(logits=z).entropy()
    torch.testing.assert_close(found.entropy_nats.double(), entropy, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(found.target_logits.double(), z[:, targets], **close)
    torch.testing.assert_close(found.target_log_probabilities.double(), z.log_softmax(1)[:, targets], **close)
    ranks = expected.indices.argsort(1)[:, targets]
    assert torch.equal(found.target_ranks, ranks)


@pytest.mark.parametrize("decoder", ["none", "norm"])
@pytest.mark.parametrize("single", [True, False])
def test_kl_against_a_reference(x, decoder, single, generator):
    voc = vocabulary()
    reference = torch.randn(1 if single else ROWS, D, generator=generator)
    with torch.no_grad():
        p, q = dense(voc, reference, decoder).log_softmax(1), dense(voc, x, decoder).log_softmax(1)
    expected = (p.exp() * (p - q)).sum(1)
    found = voc.project(x, decoder=decoder, reference=reference)
    torch.testing.assert_close(found.kl_nats.double(), expected, rtol=1e-5, atol=1e-6)


def test_kl_to_itself_is_zero_and_never_negative(x):
    kl = vocabulary().project(x, decoder="norm", reference=x).kl_nats
    assert (kl >= 0).all()
    assert kl.max() < 1e-6


def test_targets_may_differ_by_row(x):
    voc = vocabulary()
    targets = torch.arange(2 * ROWS).view(ROWS, 2) * 13 % V
    found = voc.project(x, targets=targets)
    torch.testing.assert_close(found.target_logits, dense(voc, x, "none").gather(1, targets).float())


def test_ties_go_to_the_lowest_id():
    W_U = torch.ones(D, V)
    voc = Vocabulary(W_U, None, torch.ones(D), nn.Identity())
    found = voc.project(torch.ones(3, D), k=5, k_bottom=5, targets=torch.tensor([0, 4, 900]))
    assert torch.equal(found.top_ids, torch.arange(5).expand(3, 5))
    assert torch.equal(found.bottom_ids, torch.arange(5).expand(3, 5))
    assert torch.equal(found.target_ranks, torch.tensor([0, 4, 900]).expand(3, 3))


def test_order_does_not_depend_on_the_scale_of_a_row(x):
    voc = vocabulary()
    assert torch.equal(voc.project(x * 1e-3, k=K).top_ids, voc.project(x * 64, k=K).top_ids)


def test_gain_and_norm_rank_alike_for_an_rms_norm(x):
    norm = nn.RMSNorm(D)
    nn.init.uniform_(norm.weight, 0.5, 2)
    voc = Vocabulary(vocabulary().W_U, None, norm.weight.detach(), norm)
    gain, normed = voc.project(x, decoder="gain", k=K), voc.project(x, decoder="norm", k=K)
    assert torch.equal(gain.top_ids, normed.top_ids)
    assert not torch.allclose(gain.top_probabilities, normed.top_probabilities)


def test_the_mean_direction_gives_the_mean_logit(x):
    for dtype in (torch.float32, torch.bfloat16):
        voc = vocabulary(dtype)
        torch.testing.assert_close(x @ voc.mean_direction(), dense(voc, x, "none").mean(1).float(), rtol=1e-4, atol=1e-5)


def test_a_planted_direction_has_the_closed_form_probability():
    voc = Vocabulary(torch.eye(D), None, torch.ones(D), nn.Identity())
    found = voc.project(3.0 * voc.direction(5)[None], k=1)
    assert found.top_ids.item() == 5
    torch.testing.assert_close(found.top_probabilities.item(), 1 / (1 + (D - 1) * torch.tensor(-3.0).exp().item()))


def test_dense_logits_are_the_definition(x):
    voc = vocabulary()
    torch.testing.assert_close(voc.logits(x[None]).double()[0], dense(voc, x, "norm"), rtol=1e-5, atol=1e-5)


def test_logit_moments_are_those_of_the_logits(x):
    voc, rows = vocabulary(), x.double()
    mean, deviation = voc.logit_moments(rows.mean(0), torch.cov(rows.T, correction=0))
    z = dense(voc, x, "none")
    torch.testing.assert_close(mean, z.mean(0))
    torch.testing.assert_close(deviation, z.std(0, correction=0))


def test_a_projector_gives_the_same_from_call_to_call(x):
    projector = Projector(vocabulary(), k=K)
    first = projector(x)
    projector(x[:5] * -1)  # a smaller block in the same buffers
    assert torch.equal(projector(x).top_ids, first.top_ids)
    assert torch.equal(projector(x).log_normaliser, first.log_normaliser)


def test_k_is_cut_to_the_vocabulary():
    voc = Vocabulary(torch.eye(4), None, torch.ones(4), nn.Identity())
    assert voc.project(torch.eye(4), k=10).top_ids.shape == (4, 4)


def test_no_rows_give_an_empty_projection():
    assert vocabulary().project(torch.empty(0, D), k=3).top_ids.shape == (0, 3)


def test_a_row_that_is_not_finite_is_named(x):
    x[23, 4] = torch.nan
    with pytest.raises(NotFinite, match=r"Row 23 of the 37 to project holds NaN or infinity"):
        vocabulary().project(x)


@pytest.mark.parametrize("token", [-1, V])
def test_a_token_outside_the_vocabulary_is_refused(x, token):
    with pytest.raises(UnknownToken, match=f"Token id {token} is outside the vocabulary; ids go from 0 to {V - 1}"):
        vocabulary().project(x, targets=torch.tensor([token]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("small", [False, True], ids=["one window", "several windows"])
def test_the_last_of_each_group_is_the_reference_of_all(x, dtype, small):
    """As a reference given by itself; also where blocks and windows cut the rows."""
    voc, rows = vocabulary(dtype), x.to(dtype)[: len(x) // 5 * 5]
    rows[7] *= 30  # logits far from the others'
    memory = 4 * 10 * 400 if small else None
    found = voc.project(rows, decoder="gain", k=3, last_of=5, memory=memory)
    last = rows[4::5].repeat_interleave(5, 0)
    expected = voc.project(rows, decoder="gain", k=3, reference=last, memory=memory)
    z, p = (torch.log_softmax(dense(voc, one, "gain"), 1) for one in (rows, last))
    divergence = (p.exp() * (p - z)).sum(1)
    torch.testing.assert_close(found.kl_nats.double(), divergence, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.kl_nats, expected.kl_nats, rtol=2e-5, atol=2e-5)
    assert (found.kl_nats[4::5] == 0).all(), "of the reference itself exactly"
    assert torch.equal(found.top_ids, expected.top_ids)
    with pytest.raises(ValueError, match="groups of one size"):
        voc.project(rows, last_of=7 if len(rows) % 7 else 9)
    with pytest.raises(ValueError, match="no other reference"):
        voc.project(rows, last_of=5, reference=last)


def test_ranks_of_equal_logits_go_by_the_lowest_id_wherever_tiles_end():
    W_U = torch.zeros(D, V)
    W_U[0] = torch.arange(V) % 7  # every logit is shared by a seventh of the tokens
    voc = Vocabulary(W_U, None, None, nn.Identity())
    row = torch.zeros(1, D)
    row[0, 0] = 1.0
    for memory in (None, 4 * 10):
        targets = torch.arange(V)[None]
        found = voc.project(row, targets=targets, memory=memory).target_ranks
        order = sorted(range(V), key=lambda token: (-(token % 7), token))
        assert found[0].tolist() == [order.index(token) for token in range(V)]
