"""Fitted lenses: gradients are autograd's, Jacobians those of a brute force, training goes on where it stopped."""

import itertools

import pandas as pd
import pytest
import torch
from conftest import tiny_model
from families import tiny_hf, tiny_tokenizer
from test_lens import MANY, TEXTS, linear_net
from tqdm.auto import tqdm

import workbench as wb
from workbench.capturing import keeping
from workbench.corpus.corpus import Corpus
from workbench.errors import BadArtifact, BadCorpus, NotFinite, OtherJob, TooFewTokens, UnknownOption, UnknownSite
from workbench.lenses import jacobian, tuned
from workbench.lenses.divergence import Teacher, divergence
from workbench.lenses.lens import Lens
from workbench.lenses.unfinished import Unfinished
from workbench.model import Batch
from workbench.sites import Site, state
from workbench.streaming.stream import stream

QUIET = {"progress": False}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj", "cohere"])
def test_the_divergence_and_its_gradient_are_autograds(family):
    """Of a plain norm, a soft cap, a head with a bias, and scaled logits."""
    model = tiny_model(family, check=False)
    vocabulary = model.vocabulary
    acts = wb.capture(model, TEXTS, ["resid_post.0", "resid_post.-1"])
    last = f"resid_post.{model.n_layers - 1}"
    states, final = (acts[site][acts.mask] for site in ("resid_post.0", last))
    rows = vocabulary.decoded(states, "norm").double().detach().requires_grad_()
    z = vocabulary.logit_scale * (rows @ vocabulary.W_U.double())
    z = z if vocabulary.b_U is None else z + vocabulary.b_U.double()
    z = z if vocabulary.softcap is None else vocabulary.softcap * torch.tanh(z / vocabulary.softcap)
    p = torch.log_softmax(vocabulary.logits(final).double(), -1)
    kl = (p.exp() * (p - torch.log_softmax(z, -1))).sum(-1)
    kl.sum().backward()
    assert rows.grad is not None
    space = torch.empty(len(rows), model.d_vocab)
    found = divergence(vocabulary, rows.detach().float(), Teacher(vocabulary, final), space)
    # A small divergence is a difference of normalisers of some nats, in float32.
    torch.testing.assert_close(found.kl, kl.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.gradient.double(), rows.grad, rtol=1e-4, atol=1e-6 * float(rows.grad.abs().max()) + 1e-7)
    itself = vocabulary.decoded(final, "norm").float()
    same = divergence(vocabulary, itself, Teacher(vocabulary, final), space)
    assert float(same.kl.max()) < 1e-5
    assert float(same.gradient.abs().max()) < 1e-5


def test_gradients_of_the_translators_are_those_of_the_dense_computation(llama, monkeypatch):
    """In chunks of tokens, all layers at once."""
    monkeypatch.setitem(tuned.TOKENS_AT_ONCE, "cpu", 7)
    n, d = llama.n_layers, llama.d_model
    sites, last = [state(i, n) for i in range(n)], state(n, n)
    batch = next(iter(stream(llama, Corpus(MANY[:10]), [*sites, last], **QUIET)))
    torch.manual_seed(0)
    begin = torch.randn(n, d, d) / d**0.5, torch.randn(n, d) / 9, torch.randn(n, d), torch.rand(n, d) + 0.5
    translators = tuned.Translators(*begin)
    translators.A.data.normal_(std=0.1)
    kl = tuned.backward(llama.vocabulary, translators, batch, sites, last)
    got = {name: one.grad.clone() for name, one in translators.named_parameters()}
    assert all(parameter.grad is None for parameter in llama.hf.parameters()), "the model is left as it is"
    y = translators(torch.stack([batch[site] for site in sites]))
    q = torch.log_softmax(llama.hf.lm_head(llama.hf.model.norm(y)), -1)
    p = torch.log_softmax(llama.hf.lm_head(llama.hf.model.norm(batch[last])), -1)
    dense = (p.exp() * (p - q)).sum(-1).sum(1)
    expected = torch.autograd.grad(dense.sum(), list(translators.parameters()))
    torch.testing.assert_close(kl.float(), dense.detach(), rtol=1e-4, atol=1e-4)
    for found, own in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-6 * float(own.abs().max()))
    matrix, bias = translators.merged()
    states = torch.stack([batch[site] for site in sites])
    torch.testing.assert_close(states.double() @ matrix + bias[:, None], y.detach().double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_untrained_tuned_lens_is_the_logit_lens_bit_for_bit(family):
    model = tiny_model(family, check=False)
    lens = wb.fit_tuned(model, MANY, steps=0, start_tokens=0, **QUIET)
    ours, plain = wb.lens(model, TEXTS, lens), wb.logit_lens(model, TEXTS)
    pd.testing.assert_frame_equal(ours.table, plain.table, check_exact=True)
    pd.testing.assert_frame_equal(ours.positions, plain.positions, check_exact=True)


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gemma2", "olmo2"])
def test_training_lowers_the_divergence_below_its_start_on_text_it_did_not_see(family):
    """Also with a soft cap, and with post-norms alone."""
    model = tiny_model(family, check=False)
    start = wb.fit_tuned(model, MANY, steps=0, **QUIET)
    trained = wb.fit_tuned(model, MANY, epochs=5, step_tokens=128, **QUIET)
    unseen = [" ".join(text.split()[::-1]) for text in MANY[:12]]
    before, after = (wb.lens(model, unseen, one).by_layer()["kl_to_final_nats"][:-1] for one in (start, trained))
    assert (after < before).all()
    logit = wb.logit_lens(model, unseen).by_layer()["kl_to_final_nats"][:-1]
    assert (after < logit).all()


def test_where_blocks_do_nothing_no_translator_is_better_than_none():
    """The divergence is zero, and so is its slope; where they do something, neither is."""
    slopes, divergences = [], []
    for scale in (0.0, 0.3):
        model = linear_net(scale=scale)
        sites = [state(i, 3) for i in range(4)]
        batch = next(iter(stream(model, Corpus(MANY[:10]), sites, **QUIET)))
        one, zero = torch.eye(32).repeat(3, 1, 1), torch.zeros(3, 32)
        translators = tuned.Translators(one, zero, zero, torch.ones(3, 32))
        divergences.append(tuned.backward(model.vocabulary, translators, batch, sites[:-1], sites[-1]) / batch.tokens.n)
        assert translators.A.grad is not None
        slopes.append(float(translators.A.grad.abs().max()))
    assert float(divergences[0].max()) < 1e-6
    assert float(divergences[1].min()) > 0.01
    assert slopes[0] < 1e-3 * slopes[1]


@pytest.mark.parametrize("what", ["tuned", "jacobian"])
def test_a_fit_that_was_stopped_goes_on_and_ends_the_same(llama, tmp_path, monkeypatch, what):
    monkeypatch.setattr(tuned, "KEEP_EVERY", 2)

    def fit(folder, more=0):
        if what == "tuned":
            return wb.fit_tuned(llama, MANY, epochs=2 + more, step_tokens=96, folder=folder, **QUIET)
        return wb.fit_jacobian(llama, MANY[:8], skip=20 + more, batch_tokens=64, folder=folder, **QUIET)

    whole = fit(None)
    keep, kept = Unfinished.keep, []

    def stopped(self, tensors, done):
        keep(self, tensors, done)
        kept.append(done)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Unfinished, "keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path)
    monkeypatch.setattr(Unfinished, "keep", keep)
    with pytest.raises(OtherJob, match="unfinished fit with other settings"):
        fit(tmp_path, 1)
    again = fit(tmp_path)
    for site, one in whole.maps.items():
        torch.testing.assert_close(again.maps[site].left, one.left, rtol=0, atol=0)
        torch.testing.assert_close(again.maps[site].bias, one.bias, rtol=0, atol=0)
        assert again.maps[site].scores == one.scores
    (tmp_path / "unfinished.safetensors").write_bytes(b"torn")
    with pytest.raises(BadArtifact, match="Delete it, and begin anew"):
        fit(tmp_path)


def brute_force(model, row: list[int], site: str, skip: int, same: bool):
    """Mean over source positions of the summed derivative, [out, in], from the whole Jacobian of the last state."""
    n = len(row)
    tokens = torch.tensor([row])
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    at, end = Site.parse(site, model.n_layers), Site.parse(state(model.n_layers, model.n_layers), model.n_layers)
    with keeping(model, [at, end], gradients=True) as kept:
        model.forward(batch)
    own = range(skip, n - 1)
    total = torch.zeros(model.d_model, model.d_model)
    for to, i in itertools.product(own, range(model.d_model)):
        gradient = torch.autograd.grad(kept[end][0, to, i], kept[at], retain_graph=True)[0][0]
        total[i] += gradient[to] if same else gradient[skip : to + 1].sum(0)
    return total / len(own)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
def test_the_jacobian_is_the_published_mean(family):
    """Sum over targets from the source on, mean over sources and then over prompts, the first positions and the last apart;
    rows of unlike length padded to one another."""
    model = tiny_model(family, check=False)
    texts = ["the cat", "dogs in it"]
    between = [] if family == "gptj" else ["resid_mid.1"]  # parallel blocks have nothing between
    lens = wb.fit_jacobian(model, texts, sites=["resid_post.0", *between], skip=2, **QUIET)
    rows = [row.tokens.tolist() for row in Corpus(texts).rows(model)]
    assert len({len(row) for row in rows}) == 2
    for site, one in lens.maps.items():
        at = site.replace("resid_mid", "attn_out")  # which is added there
        expected = torch.stack([brute_force(model, row, at, 2, False) for row in rows]).mean(0)
        torch.testing.assert_close(one.left.T.float(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert not one.bias.any()
    assert lens.settings["prompts"] == 2


def test_what_was_summed_otherwise_is_not_gone_on_with(llama, tmp_path, monkeypatch):
    """Other batches, or other texts of the same shape."""
    options: dict = {"skip": 20, "folder": tmp_path, **QUIET}
    monkeypatch.setattr(jacobian, "_add_derivatives", stop_after(2, jacobian._add_derivatives))
    with pytest.raises(KeyboardInterrupt):
        wb.fit_jacobian(llama, MANY[:8], batch_tokens=64, **options)
    with pytest.raises(OtherJob, match="batch_tokens"):
        wb.fit_jacobian(llama, MANY[:8], batch_tokens=128, **options)
    with pytest.raises(OtherJob, match="tokens_hash"):
        wb.fit_jacobian(llama, [" ".join(text.split()[::-1]) for text in MANY[:8]], batch_tokens=64, **options)


def stop_after(calls, function):
    left = [calls]

    def stopping(*given):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return function(*given)

    return stopping


def test_a_batch_that_was_halved_is_one_step(llama, monkeypatch):
    """Where memory runs out: the same tokens are seen, and the maps are those of whole batches."""
    from workbench.streaming.stream import Stream

    whole, tried = wb.fit_tuned(llama, MANY[:20], start_tokens=300, step_tokens=200, **QUIET), Stream._tried

    def short_of_memory(self, index, rows):
        return None if len(rows) > 2 and self.massive_at is None else tried(self, index, rows)

    monkeypatch.setattr(Stream, "_tried", short_of_memory)
    halved = wb.fit_tuned(llama, MANY[:20], start_tokens=300, step_tokens=200, **QUIET)
    for site, one in whole.maps.items():
        torch.testing.assert_close(halved.maps[site].left, one.left, rtol=1e-3, atol=1e-4)


def test_a_finished_fit_leaves_nothing_unfinished(llama, tmp_path):
    wb.fit_jacobian(llama, MANY[:8], skip=30, folder=tmp_path, **QUIET).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "transports.safetensors"]


def test_over_all_signs_the_same_position_estimate_is_exact(llama):
    texts = Corpus(["the cat sat"])
    (row,) = texts.rows(llama)
    n, d = len(row), llama.d_model
    free = 4
    skip = n - 1 - free
    total = torch.zeros(1, d, d, dtype=torch.float64)
    for signs in itertools.product([1.0, -1.0], repeat=free):
        whole = torch.ones(1, n)
        whole[0, skip : n - 1] = torch.tensor(signs)
        jacobian._add_derivatives(
            llama, [row], ["resid_post.0"], state(3, 3), skip, whole, total, tqdm(disable=True)
        )  # fmt: skip
    expected = brute_force(llama, row.tokens.tolist(), "resid_post.0", skip, True)
    torch.testing.assert_close(total[0].float() / 2**free, expected, rtol=1e-4, atol=1e-5)
    far = brute_force(llama, row.tokens.tolist(), "resid_post.0", skip, False)
    assert (far - expected).abs().max() > 0.01


def test_on_a_linear_net_every_fitted_lens_finds_the_map():
    model = linear_net()
    blocks = [one.forward.__self__.weight for one in model.hf.model.layers]
    exact = torch.eye(32)
    for weight in reversed(blocks):
        exact = (torch.eye(32) + weight) @ exact
    for lens in (
        wb.fit_jacobian(model, MANY[:6], skip=1, **QUIET),
        wb.fit_jacobian(model, MANY[:6], skip=1, same_position=True, **QUIET),
        wb.fit_shortcut(model, MANY, kind="ols", affine=False, **QUIET),
    ):
        if lens.kind != "shortcut":  # few tokens span no more than they span: what is fitted on them may be any map beside
            torch.testing.assert_close(lens.maps["resid_pre.0"].left.float(), exact, rtol=1e-3, atol=1e-4)
        assert (wb.lens(model, MANY[:2], lens).by_layer()["kl_to_final_nats"] < 1e-4).all()


def test_maps_lead_to_other_states_and_begin_between(llama):
    lens = wb.fit_shortcut(llama, MANY, to=2, **QUIET)
    assert list(lens.maps) == ["resid_pre.0", "resid_post.0"]
    assert lens.target == "resid_post.1"
    view, plain = wb.lens(llama, TEXTS, lens), wb.logit_lens(llama, TEXTS)
    same = view.positions["layer"] >= 1
    pd.testing.assert_frame_equal(view.positions[same], plain.positions[same])
    assert not view.positions[~same]["entropy_nats"].equals(plain.positions[~same]["entropy_nats"])
    acts = wb.capture(llama, MANY[:3], ["resid_post.0", "resid_post.1"])
    mapped = lens.read(acts["resid_post.0"], "resid_post.0")
    wrong = (mapped - acts["resid_post.1"])[acts.mask].square().mean()
    assert wrong < (acts["resid_post.0"] - acts["resid_post.1"])[acts.mask].square().mean()
    between = wb.fit_shortcut(llama, MANY, sites="resid_mid", **QUIET)
    view = wb.lens(llama, TEXTS, between, sites="resid_mid")
    assert view.settings["sites"] == ["resid_mid.0", "resid_mid.1", "resid_mid.2", "resid_post.2"]
    assert view.by_layer()["site"].tolist() == view.settings["sites"]


def test_documents_that_are_held_out_are_not_trained_on(llama):
    """Texts of the tenth document change nothing, those of another do."""
    changed = [*MANY[:9], "a b c d e f", *MANY[10:]]
    other = ["a b c d e f", *MANY[1:]]
    for fit in (
        lambda texts: wb.fit_shortcut(llama, texts, held_out=False, **QUIET),
        lambda texts: wb.fit_tuned(llama, texts, **QUIET),
        lambda texts: wb.fit_jacobian(llama, texts[:12], skip=30, **QUIET),
    ):
        one, same, not_same = (fit(texts).maps["resid_pre.0"].left for texts in (MANY, changed, other))
        assert torch.equal(one, same)
        assert not torch.equal(one, not_same)
    sides = [[int(row.documents[0]) for row in side.rows(llama)] for side in (Corpus(MANY).training(), Corpus(MANY).held_out())]
    assert sides[1] == [9, 19, 29, 39, 49, 59]
    assert sorted(sides[0] + sides[1]) == list(range(60))


def test_bad_requests_are_named(llama):
    with pytest.raises(UnknownOption, match="epochs=0"):
        wb.fit_tuned(llama, MANY, epochs=0)
    with pytest.raises(UnknownSite, match="resid_mid"):
        wb.fit_jacobian(tiny_model("gptj", check=False), MANY, sites="resid_mid.0")
    with pytest.raises(UnknownOption, match="skip=-1"):
        wb.fit_jacobian(llama, MANY, skip=-1)
    with pytest.raises(TooFewTokens, match="No row has more than 41 tokens"):
        wb.fit_jacobian(llama, MANY, skip=40)
    with pytest.raises(UnknownSite, match="no site of the stream before"):
        wb.fit_shortcut(llama, MANY, sites="mlp_out.0")
    with pytest.raises(UnknownSite, match="No state comes before state 0"):
        wb.fit_shortcut(llama, MANY, to=0)
    with pytest.raises(UnknownSite, match="before resid_post"):
        wb.fit_jacobian(llama, MANY, sites="resid_post.2")
    with pytest.raises(BadCorpus, match="every 10th document is held out"):
        list(Corpus(MANY[:5]).held_out().rows(llama))
    with pytest.raises(NotFinite, match="went astray"):
        wb.fit_tuned(llama, MANY, epochs=30, learning_rate=1e38, **QUIET)


def test_lenses_of_low_precision_are_read_in_float32(llama, tmp_path):
    lens = wb.fit_tuned(llama, MANY, **QUIET)
    loaded = Lens.load(lens.rounded(torch.bfloat16).save(tmp_path), model=llama)
    assert loaded.kind == "tuned"
    assert loaded.maps["resid_post.0"].left.dtype == torch.bfloat16
    x = torch.randn(4, 32)
    rounded = lens.maps["resid_post.0"].left.bfloat16().float()
    bias = lens.maps["resid_post.0"].bias.bfloat16().float()
    torch.testing.assert_close(loaded.read(x, "resid_post.0"), x @ rounded + bias, rtol=0, atol=0)
    other = wb.load(tiny_hf("llama", seed=1), tokenizer=tiny_tokenizer(), check=False)
    with pytest.raises(OtherJob):
        Lens.load(tmp_path, model=other)
