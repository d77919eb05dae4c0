"""Transport operators: exact on linear nets, against scikit-learn and direct sums; planted directions found, shuffled not."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from test_transports import drawn, mixed

import workbench as wb
from workbench.analyses.held_out_loss import held_out_rows, losses
from workbench.analyses.rerun import Rerun
from workbench.analyses.transport_damage import WAYS
from workbench.analyses.transport_directions import Chosen, Thresholds, choose, direction_rows, random_rows
from workbench.analyses.transport_metrics import fisher, readers
from workbench.analyses.transport_pairs import held_out
from workbench.analyses.transport_routes import _elsewhere, _sources, route_rows
from workbench.analyses.transport_tokens import FEWEST, TokenScores
from workbench.corpus.corpus import EARLY_UNTIL, ORDINARY
from workbench.errors import BadArtifact, MissingWeight, ReadOnlySite, TooFewTokens, UnknownOption
from workbench.moments.joint import Joint
from workbench.moments.layout import Pair
from workbench.moments.moments import Spread
from workbench.streaming.batches import Tokens, first_rows
from workbench.substitution import substitute
from workbench.transports.canonical import Canonical, ceiling, correlations, participation
from workbench.transports.fit import Fitting, Recipe
from workbench.transports.prediction import Along, Prediction, errors_by_rank
from workbench.transports.solving import Metric, Spectrum, best_projections, singular_projections
from workbench.transports.transport import Transport

QUIET: dict[str, Any] = {"progress": False}
TEXTS = [" ".join(f"word{(i * 7 + j * j * (i + 3)) % 97}" for j in range(6)) for i in range(60)]


def linear_net(n: int = 2000, d: int = 32, seed: int = 0):
    """A deep linear net: its input with unequal variances, its output with more unequal ones."""
    x = drawn(n, d, seed=seed)[0] * torch.logspace(0, -1, d, dtype=torch.float64)
    a, b = drawn(d, d, d, seed=seed + 1)
    return x, x @ (a / d**0.5) @ (b / d**0.5) + 1


def curves(x, y):
    """Whitened and plain R² by rank on the rows of the fit, of both truncations, and the ceiling."""
    joint = Joint.of(x, y)
    fitted, white = Recipe("ols").fit(joint), Metric.whitening(Spectrum.of(joint.yy))
    found = {}
    for name, metric in (("plain", None), ("whitened", white)):
        root = None if metric is None else metric.root
        total = float(joint.total if root is None else (root * (joint.yy @ root)).sum())
        for way, own in (
            ("best", best_projections(fitted.matrix, joint, metric)),
            ("published", singular_projections(fitted.matrix)),
        ):
            found[name, way] = 1 - errors_by_rank(joint, fitted.matrix, own, root) / total
    found["ceiling"] = ceiling(correlations(joint, Spectrum.of(joint.xx), Spectrum.of(joint.yy)), 1 / y.shape[1])
    return found


def test_on_a_linear_net_the_best_truncation_meets_the_ceiling_and_the_published_one_fails():
    found = curves(*linear_net())
    torch.testing.assert_close(found["whitened", "best"], found["ceiling"], atol=1e-7, rtol=0)  # squares are solved
    efficiency = found["whitened", "published"][1:] / found["ceiling"][1:]
    assert efficiency[:-1].max() < 0.97
    assert efficiency[: len(efficiency) // 2].min() < -1, "worse than nothing, though the net is linear"
    assert efficiency[-1] == pytest.approx(1, abs=1e-7)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_no_truncation_beats_the_best_one_in_its_own_metric(seed):
    found = curves(*mixed(300, 7, 5, seed=seed))
    for name in ("plain", "whitened"):
        best, published = found[name, "best"], found[name, "published"]
        assert (best >= published - 1e-9).all()
        assert (best.diff() >= -1e-9).all(), "each further rank explains more of the rows of the fit"
        assert best[0] == pytest.approx(0, abs=1e-9)
        assert best[-1] == pytest.approx(float(published[-1]), abs=1e-9)


def test_errors_of_every_rank_are_those_of_the_rows_in_any_metric():
    x, y = mixed(400, 6, 5)
    test_x, test_y = mixed(200, 6, 5, seed=9)
    root = drawn(5, 3, seed=4)[0]
    inside, outside = Joint.of(x, y), Joint.of(test_x, test_y)
    fitted = Recipe("ridge").fit(inside)
    for own in (
        singular_projections(fitted.matrix),
        best_projections(fitted.matrix, inside, Metric.of(root @ root.T + torch.eye(5))),
    ):
        found = errors_by_rank(outside.about(inside.mean_x, inside.mean_y), fitted.matrix, own, root)
        for rank in range(6):
            matrix = fitted.matrix @ own.outof[:, :rank] @ own.into[:rank]
            missed = test_y - inside.mean_y - (test_x - inside.mean_x) @ matrix
            assert found[rank] == pytest.approx(float((missed @ root).square().sum()), rel=1e-9)


def test_identity_upstream_is_carried_whole():
    x = mixed(500, 6)[0]
    joint = Joint.of(x, x)
    fitted, spectrum = Recipe("ols").fit(joint), Spectrum.of(joint.xx)
    torch.testing.assert_close(fitted.matrix, torch.eye(6, dtype=torch.float64), atol=1e-10, rtol=0)
    assert fitted.bias.abs().max() < 1e-9
    own = Canonical.of(joint, spectrum, spectrum)
    torch.testing.assert_close(own.correlations, torch.ones(6, dtype=torch.float64), atol=1e-10, rtol=0)
    other = Joint.of(*[mixed(300, 6, seed=5)[0]] * 2)
    outside, squares = own.on(other)
    torch.testing.assert_close(outside, torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
    white = Metric.whitening(spectrum).root
    assert float(ceiling(outside, squares)[-1]) == pytest.approx(float((white * (other.yy @ white)).sum()))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_canonical_correlations_do_not_depend_on_how_things_are_measured(seed):
    x, y = mixed(300, 5, 4, seed=seed)
    a, b = drawn(5, 5, seed=seed)[0] + 3 * torch.eye(5), drawn(4, 4, seed=seed + 1)[0] + 3 * torch.eye(4)
    if max(float(torch.linalg.cond(a)), float(torch.linalg.cond(b))) > 1e4:
        return

    def of(x, y):
        joint = Joint.of(x, y)
        return correlations(joint, Spectrum.of(joint.xx), Spectrum.of(joint.yy))

    own = of(x, y)
    torch.testing.assert_close(of(x @ a + 2, y @ b - 5), own, atol=1e-7, rtol=1e-6)
    assert participation(of(x @ a, y)) == pytest.approx(participation(own), rel=1e-6)
    # the mean of their squares is the whitened R² of least squares
    assert float(own.square().mean()) == pytest.approx(float(curves(x, y)["whitened", "best"][-1]), abs=1e-8)


def test_canonical_correlations_are_scikit_learns():
    x, y = mixed(dx=6, dy=4)
    cca = CCA(n_components=4, max_iter=5000, tol=1e-12).fit(x.numpy(), y.numpy())
    u, v = cca.transform(x.numpy(), y.numpy())
    theirs = [np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(4)]
    joint = Joint.of(x, y)
    spectra = Spectrum.of(joint.xx), Spectrum.of(joint.yy)
    np.testing.assert_allclose(correlations(joint, *spectra), theirs, atol=1e-6)
    own = Canonical.of(joint, *spectra)
    inside, squares = own.on(joint)
    torch.testing.assert_close(inside, own.correlations, atol=1e-8, rtol=0)
    torch.testing.assert_close(squares, torch.ones_like(squares), atol=1e-8, rtol=0)


def test_scores_along_directions_are_scikit_learns_on_the_rows_themselves():
    x, y = mixed()
    test_x, test_y = mixed(seed=3)
    joint, directions = Joint.of(x, y), drawn(3, 9, seed=8)[0]
    fitted = Recipe("ridge", strength=50.0).fit(joint)
    predicted = Ridge(alpha=50.0).fit(x.numpy(), y.numpy()).predict(test_x.numpy())
    prediction = Prediction.of(Joint.of(test_x, test_y), fitted.matrix, fitted.bias)
    own = prediction.along(directions)
    assert prediction.r2() == pytest.approx(r2_score(test_y, predicted, multioutput="variance_weighted"), abs=1e-10)
    for i, row in enumerate(directions):
        a, b = (test_y @ row).numpy(), predicted @ row.numpy()
        assert float(own.r2[i]) == pytest.approx(r2_score(a, b), abs=1e-10)
        assert float(own.correlation[i]) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-10)
        assert float(own.slope[i]) == pytest.approx(np.polyfit(b, a, 1)[0], abs=1e-9)
        assert float(own.rms_ratio[i]) == pytest.approx(b.std() / a.std(), abs=1e-10)
    constant = Along.of_sums(torch.tensor([[[5.0, 5.0, 5.0, 5.0, 5.0, 5.0]]]))
    assert constant.r2.isnan().all(), "what does not vary has no score"


@pytest.fixture(scope="module")
def tiny64():
    """A tiny model in float64, its moments, and all its rows."""
    model = tiny_model("llama", check=False, dtype=torch.float64)
    moments = wb.collect_moments(model, TEXTS, [], ["1>2", "0>3"], null=True, detail="two", folds=2, **QUIET)
    return model, moments


def test_scores_of_a_direction_from_moments_are_those_from_activations(tiny64):
    model, moments = tiny64
    fitting, pair = Fitting(moments, "ordinary"), moments.pairs[0]
    held = held_out(fitting, Recipe(), pair)
    chosen = choose(model, pair.target, moments.spread(pair.target, "ordinary"), ["principal:6", "neurons:5", "random:4"], 0)
    tokens = TokenScores.of(fitting, pair, chosen, held.splits, {})
    a, b, fold, documents = [], [], [], []
    for batch in wb.stream(model, wb.Corpus(TEXTS), list(pair[:2]), **QUIET):
        tokens(batch)
        at = batch.tokens.stratum == ORDINARY
        own = batch.tokens.document[at]
        x, y = (batch[site][torch.from_numpy(at)] for site in pair[:2])
        predicted = torch.empty_like(y)
        for one in held.splits:
            mine = torch.from_numpy(own % 2 == one.fold)
            predicted[mine] = x[mine] @ one.fitted.matrix + one.fitted.bias
        a, b, fold, documents = [*a, y @ chosen.rows.T], [*b, predicted @ chosen.rows.T], [*fold, own % 2], [*documents, own]
    a, b, fold = torch.cat(a), torch.cat(b), np.concatenate(fold)
    total = sum((a[fold == one] - a[fold == one].mean(0)).square().sum(0) for one in (0, 1))
    direct = 1 - (a - b).square().sum(0) / total
    torch.testing.assert_close(held.prediction.along(chosen.rows).r2, direct, atol=1e-8, rtol=0)
    torch.testing.assert_close(Along.of_sums(tokens.sums[:, :, 0].sum(1)).r2, direct, atol=1e-8, rtol=0)
    columns = tokens.columns(seed=0)
    spread = moments.spread(pair.target, "ordinary")
    for i in range(len(direct)):
        middle, wide = float(a[:, i].mean()), float(a[:, i].std(correction=0))
        active = a[:, i] > middle + 2 * wide
        assert columns["active_n"][i] == int(active.sum())
        assert columns["low"][i] <= float(direct[i]) <= columns["high"][i]
        if int(active.sum()) >= FEWEST:
            explained = 1 - (a - b)[active, i].square().sum() / (a[active, i] - middle).square().sum()
            assert columns["active_explained"][i] == pytest.approx(float(explained), abs=1e-8)
            told = b[:, i] > middle + 2 * wide
            f1 = 2 * int((active & told).sum()) / int(active.sum() + told.sum())
            assert columns["f1"][i] == pytest.approx(f1)
        else:
            assert np.isnan(columns["active_r2"][i])
            assert f"{int(active.sum())} active tokens" in columns["note"][i]
    assert any(note for note in columns["note"])
    assert not all(note for note in columns["note"])
    white = Metric.whitening(fitting.spectrum(pair.target)).root
    for name, root in (("held_out", None), ("whitened_held_out", white)):
        low, high = tokens.intervals(seed=0)[name]
        assert low < held.prediction.r2(root) < high
        every = torch.ones(1, 2, tokens.sums.shape[1], dtype=torch.float64)
        assert float(tokens._whole_r2(name, every)) == pytest.approx(held.prediction.r2(root), abs=1e-8)
    assert spread.n == len(a)


def test_the_score_of_a_pair_is_that_of_fit_transports(tiny64):
    model, moments = tiny64
    result = wb.transport(model, TEXTS, ["1>2", "0>3"], fisher_tokens=200, seed=0, **QUIET)
    maps = wb.fit_transports(moments, **QUIET)
    for row in result.table.to_dict("records"):
        own = maps[f"{row['source']}>{row['target']}"].scores
        for name, theirs in (("held_out", "frobenius_held_out"), ("null", "frobenius_null_held_out"),
                             ("in_sample", "frobenius_in_sample"), ("whitened_held_out", "whitened_held_out")):  # fmt: skip
            assert row[name] == pytest.approx(own[theirs], abs=1e-9)
        assert row["null"] <= 0 < row["held_out"]
        assert row["low"] < row["held_out"] < row["high"]
        assert row["size"] <= row["correlations_above_null"] <= 32
        assert row["efficiency"] == pytest.approx(row["whitened_held_out"] / row["ceiling"])
    curves = result.curves
    assert curves is not None
    full = curves[curves["rank"] == 32].groupby(["source", "metric", "truncation"])["held_out"].first()
    for row in result.table.to_dict("records"):
        for metric, column in (("frobenius", "held_out"), ("whitened", "whitened_held_out"), ("fisher", "fisher")):
            for way in ("best", "published"):
                assert full[row["source"], metric, way] == pytest.approx(row[column], abs=1e-8)
    readers_there = result.table.set_index("target")["readers"]
    assert np.isnan(readers_there["resid_post.2"]), "no block reads the last state"
    assert readers_there["resid_post.1"] > 0


def planted(n: int = 6000, d: int = 40, rank: int = 5, seed: int = 0):
    """Of the target's first numbers `rank` are carried nearly whole, the others are made anew."""
    x, fresh = drawn(n, d, seed=seed)[0], drawn(n, d, seed=seed + 1)[0]
    y = fresh.clone()
    y[:, :rank] = x[:, :rank] + 0.2 * fresh[:, :rank]
    return x, y


def two_folds(x, y):
    half = len(x) // 2
    return Joint.of(x[:half], y[:half]), Joint.of(x[half:], y[half:])


def test_the_size_of_what_is_carried_is_found_and_of_noise_it_is_none():
    x, y = planted()
    for rows, wanted in ((y, 5), (drawn(len(x), 40, seed=9)[0], 0)):
        first, second = two_folds(x, rows)
        null_first, null_second = two_folds(x, rows.roll(1234, 0))
        spectra = Spectrum.of(first.xx), Spectrum.of(first.yy)
        edge = float(Canonical.of(null_first, *spectra).on(null_second)[0].max())
        own = Canonical.of(first, *spectra)
        outside = own.on(second)[0]
        # the largest of 40 null correlations is passed by chance now and then: by one or two
        assert int((outside[:10] > edge).sum()) == pytest.approx(wanted, abs=2)
        assert participation(own.correlations) > (10 if wanted else 20), "the published size counts noise"
        if wanted:
            assert participation(outside[:5]) == pytest.approx(5, abs=0.2)


def test_planted_directions_are_sorted_into_carried_mixed_and_made():
    x, y = planted()
    y = y @ torch.linalg.qr(drawn(40, 40, seed=3)[0])[0]  # no axis of its own
    basis = torch.linalg.qr(drawn(40, 40, seed=3)[0])[0]
    carried, made = basis[0], basis[20]
    chosen = Chosen(
        [{"kind": "planted", "name": name} for name in ("carried", "mixed", "made")],
        torch.stack([carried, (carried + 3 * made) / 10**0.5, made]),
    )

    def predicted(rows):
        first, second = two_folds(x, rows)
        fitted = Recipe().fit(first)
        return Prediction.of(second, fitted.matrix, fitted.bias)

    rows = direction_rows(chosen, predicted(y), predicted(y.roll(1234, 0)), seed=0)
    assert [row["verdict"] for row in rows] == ["carried", "mixed", "made"]
    assert rows[0]["r2"] > 0.9
    assert rows[1]["r2"] == pytest.approx(0.1, abs=0.05)
    assert 1 < rows[0]["slope"] < 1.2, "one strength for all directions shrinks those that need none"
    many = Chosen([{"kind": "random", "name": str(i)} for i in range(400)], random_rows(400, 40, seed=7))
    none = pd.DataFrame(direction_rows(many, predicted(y.roll(1234, 0)), predicted(y.roll(777, 0)), seed=0))
    verdicts = none["verdict"].value_counts()
    assert set(verdicts.index) == {"made", "mixed"}, "with shuffled documents nothing is carried"
    assert verdicts["mixed"] < 0.2 * len(none), (
        "of the null itself a twentieth lies above the threshold, of another more or less"
    )
    every = direction_rows(many, predicted(x @ drawn(40, 40, seed=5)[0]), predicted(y.roll(1234, 0)), seed=0)
    assert {row["verdict"] for row in every} == {"carried"}, "what is exactly linear is carried, all of it"
    assert Thresholds(0.0).verdict(float("nan")) == "constant"
    assert Thresholds.of(torch.full((3,), torch.nan)).made == 0


def test_the_exact_state_changes_nothing_and_rank_zero_is_mean_ablation(llama):
    corpus = wb.Corpus(TEXTS)
    result = wb.transport(llama, corpus, ["1>2"], damage=300, weigh=[], closely=False, **QUIET)
    damage = result.damage
    assert damage is not None
    own = damage.set_index("way")
    assert list(own.index) == list(WAYS)
    assert own.loc["exact", "change"] == 0.0
    assert own.loc["exact", "change_error"] == 0.0
    assert own.loc["transported", "change"] < own.loc["mean", "change"]
    assert own.loc["mean", "restored"] == 0
    moments = wb.collect_moments(llama, corpus, [], ["1>2"], null=True, detail="two", folds=2, **QUIET)
    fitted = Recipe("ridge", rank=0).fit(moments.joint(moments.pairs[0], "ordinary", [0]))
    nothing = Transport(
        "resid_post.0", "resid_post.1", fitted.left, fitted.right, fitted.bias,
        Transport.identity(llama, "resid_post.0", "resid_post.1").settings,
    )  # fmt: skip
    rows = held_out_rows(corpus, llama, 300)
    clean = losses(Rerun(llama, rows, None), nullcontext())
    change, _ = losses(Rerun(llama, rows, None), substitute(llama, nothing, skip=EARLY_UNTIL)).change(clean)
    assert change == pytest.approx(own.loc["mean", "change"], abs=1e-6)
    few = wb.transport(llama, corpus, ["1>2"], damage=300, one_in=4, weigh=[], closely=False, **QUIET).damage
    assert few is not None
    assert few.set_index("way").loc["exact", "change"] == 0.0
    with substitute(llama, nothing, skip=EARLY_UNTIL, one_in=4):
        changed = wb.capture(llama, TEXTS[:1], ["resid_post.1"])["resid_post.1"][0]
    whole = wb.capture(llama, TEXTS[:1], ["resid_post.1"])["resid_post.1"][0]
    assert (changed != whole).any(1).nonzero()[:, 0].tolist() == list(range(EARLY_UNTIL, len(whole), 4))


def test_the_fisher_matrix_is_the_expected_one(llama):
    """Of the last state, on which a token's own distribution alone depends: Jᵀ (diag p - p pᵀ) J, J of norm and head."""
    corpus = wb.Corpus(TEXTS[:8])
    own = sum(fisher(llama, corpus, ["resid_post.2"], seed=seed)["resid_post.2"] for seed in range(60)) / 60
    expected = torch.zeros(32, 32, dtype=torch.float64)
    for text in TEXTS[:8]:
        acts = wb.capture(llama, [text], ["resid_post.2"])
        for state in acts["resid_post.2"][0, EARLY_UNTIL:]:
            logits = lambda h: llama.vocabulary.logits(h[None])[0]  # noqa: E731
            with torch.enable_grad():
                jacobian = torch.func.jacrev(lambda h: llama.hf.lm_head(llama.vocabulary.ln_final(h)))(state).double().detach()
            p = torch.softmax(logits(state).double(), -1)
            expected += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    assert float((own - expected).norm() / expected.norm()) < 0.1
    assert float(own.trace()) == pytest.approx(float(expected.trace()), rel=0.03)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2", "gptj"])
def test_readers_weigh_what_the_next_block_reads(family):
    model = tiny_model(family, check=False)
    square = readers(model, "resid_post.0")
    assert square is not None
    assert float((square - square.T).norm()) < 1e-14 * float(square.norm()), "a product may round its halves otherwise"
    assert float(torch.linalg.eigvalsh(square)[0]) > -1e-9
    if family in ("gpt2", "gptj"):  # a layer norm takes the mean off: what is alike in all entries is not read
        even = torch.ones(32, dtype=torch.float64)
        assert float(even @ square @ even) < 1e-9 * float(square.trace())
    if family == "llama":
        delta, total = drawn(1, 32, seed=6)[0][0], 0.0
        for name, gain in (("W_Q", "ln1.w"), ("W_K", "ln1.w"), ("W_V", "ln1.w"), ("W_in", "ln2.w"), ("W_gate", "ln2.w")):
            weight = model.weight(name, 1).detach().double()
            weight = (weight.transpose(0, 1).flatten(1) if weight.dim() == 3 else weight) * model.weight(
                gain, 1
            ).detach().double()[:, None]
            total += float((delta @ weight).square().sum() / weight.square().sum())
        assert float(delta @ square @ delta) == pytest.approx(total, rel=1e-5)
    later = readers(model, "resid_post.0", 2)
    assert later is not None
    assert float((later - square).norm()) > 0.1 * float(square.norm())
    assert readers(model, "resid_post.2") is None, "no block reads the last state"
    assert readers(model, "resid_post.1", 1) is None, "the block before it does not read it"
    assert readers(model, "mlp_out.1") is None


def test_experts_are_no_reader_and_frozen_weights_are_followed(llama):
    assert readers(tiny_model("mixtral", check=False), "resid_post.0") is None
    frozen = tiny_model("llama", check=False)
    frozen.hf.requires_grad_(False)
    corpus = wb.Corpus(TEXTS[:4])
    own, expected = (fisher(one, corpus, ["resid_post.0"])["resid_post.0"] for one in (frozen, llama))
    torch.testing.assert_close(own, expected)
    assert all(parameter.grad is None for parameter in llama.hf.parameters())


def test_sources_of_a_token_come_before_it_in_its_own_document():
    n = 12
    known = Tokens(
        token_id=np.arange(n), document=np.array([0] * 7 + [1] * 5), offset=np.arange(n), row=np.zeros(n, int),
        pos=np.arange(n), stratum=np.full(n, ORDINARY),
    )  # fmt: skip
    ordinary = np.ones(n, bool)
    ordinary[[0, 4]] = False
    pattern = np.random.default_rng(0).random((1, n, n))
    pattern[0, :, 0] = 99.0  # a sink, which all attend to
    for top, expected in ((1, [2, 3, 5, 6, 8, 9, 10, 11]), (2, [3, 5, 6, 9, 10, 11])):
        at, sources = _sources(known, ordinary, [n], pattern, top, np.random.default_rng(1))
        assert at.tolist() == expected
        for i, token in enumerate(at):
            allowed = [i for i in range(token) if ordinary[i] and known.document[i] == known.document[token]]
            best = sorted(allowed, key=lambda j: -pattern[0, token, j])[:top]
            assert sources["attention"][i].tolist() == best
            assert sources["previous"][i].tolist() == allowed[::-1][:top]
            assert set(sources["random"][i]) <= set(allowed)
            assert len(set(sources["random"][i])) == top


def test_partners_are_of_another_document():
    random = np.random.default_rng(0)
    owners, document = np.array([3, 1, 1, 2, 1, 3]), np.array([1, 2, 3, 4])
    seen = {i: set() for i in range(4)}
    for _ in range(200):
        drawn, there = _elsewhere(owners, document, random)
        assert there.all()
        for i in range(4):
            seen[i].add(int(drawn[i]))
    assert seen == {0: {0, 3, 5}, 1: {0, 1, 2, 4, 5}, 2: {1, 2, 3, 4}, 3: {0, 1, 2, 3, 4, 5}}
    assert not _elsewhere(np.array([1, 1]), np.array([1]), random)[1].any()


def test_the_first_rows_are_those_of_the_corpus_in_order(llama):
    rows = list(wb.Corpus(TEXTS).rows(llama))
    some = list(first_rows(rows, 100))
    assert [row.index for row in some] == list(range(len(some)))
    assert sum(map(len, some[:-1])) < 100 <= sum(map(len, some))
    lopsided = [rows[0], rows[2], rows[4], rows[1], rows[3]]
    chosen = list(first_rows(lopsided, len(rows[0]) + 1, folds=2))
    assert [row.index for row in chosen] == [0, 1], "rows of a fold that has its share are left out"


def test_a_planted_route_is_found_and_controls_add_nothing(llama, monkeypatch):
    """The target is the token's own state and that of the one before."""
    generator = torch.Generator().manual_seed(0)

    def routed(*_):
        for document in range(40):
            values = {
                route: torch.randn(60, 32, generator=generator)
                for route in ("same", "attention", "previous", "random", "shuffled")
            }
            values["target"] = values["same"] + 0.5 * values["previous"] + 0.1 * torch.randn(60, 32, generator=generator)
            yield values, np.full(60, document)

    monkeypatch.setattr("workbench.analyses.transport_routes._routed", routed)
    rows = route_rows(
        llama, wb.Corpus(TEXTS), Pair("resid_post.0", "resid_post.1"), Recipe(), tokens=10_000, top=1, seed=0, progress=False
    )
    own = pd.DataFrame(rows).set_index("route")
    assert own.loc["same", "alone"] == pytest.approx(0.8, abs=0.02)
    assert own.loc["previous", "above_shuffled"] == pytest.approx(0.19, abs=0.03)
    for control in ("attention", "random", "shuffled"):
        assert abs(own.loc[control, "above_shuffled"]) < 0.01
        assert own.loc[control, "alone"] < 0.01


def test_routes_of_a_model_are_followed(llama):
    result = wb.transport(llama, TEXTS, ["0>2"], routes=800, sources=2, weigh=[], closely=False, **QUIET)
    assert result.routes is not None
    own = result.routes.set_index("route")
    assert own.loc["shuffled", "alone"] < 0.05
    assert own.loc["same", "alone"] > own.loc["random", "alone"]
    with pytest.raises(UnknownOption, match="from a state of the stream to a later one"):
        wb.transport(llama, TEXTS, ["resid_mid.0>mlp_out.1"], routes=100, weigh=[], closely=False, **QUIET)


def test_any_sites_can_be_paired_and_strata_stand_side_by_side(llama):
    result = wb.transport(
        llama, TEXTS, ["resid_mid.1>mlp_out.1", "z.0>resid_post.2", "1>2"], strata=["ordinary", "all"], closely=True,
        directions=["principal:3", "random:3"], fisher_tokens=100, **QUIET,
    )  # fmt: skip
    assert result.table.groupby("strata").size().to_dict() == {"all": 3, "ordinary": 3}
    ordinary, everything = (result.table[result.table["strata"] == one].set_index("source") for one in ("ordinary", "all"))
    assert (everything["n"] > ordinary["n"]).all()
    assert ordinary.loc["resid_mid.1", "held_out"] > 0
    assert ordinary["distance"].notna().sum() == 1
    assert ordinary.loc["resid_mid.1", "fisher"] != ordinary.loc["resid_mid.1", "fisher"], "of states alone"
    assert "Weighed by what the output depends on" in result.paragraph()
    assert set(result.figures()) == {"curves", "directions"}


@pytest.mark.parametrize("pair", ["k.1>resid_post.2", "0>3", "1>mlp_post.1", "1>2"])
def test_the_ceiling_is_one_whatever_the_widths(llama, pair):
    """In sample no map is above its ceiling; outside, predictions lie along the canonical directions: slopes of one's own are
    never better than the best."""
    row = wb.transport(llama, TEXTS, pair, weigh=[], closely=False, **QUIET).table.iloc[0]
    assert row["whitened_in_sample"] <= row["ceiling_in_sample"] + 1e-9
    assert row["whitened_held_out"] <= row["ceiling"] + 1e-9
    assert row["ceiling"] <= row["ceiling_in_sample"]
    assert row["efficiency"] == pytest.approx(row["whitened_held_out"] / row["ceiling"])
    assert row["efficiency"] > 0.5


def test_a_corpus_of_two_documents_has_no_null_and_says_so(llama):
    texts = [" ".join(TEXTS[i::2])[:600] for i in (0, 1)]
    result = wb.transport(llama, wb.Corpus(texts, length=40), "1>2", weigh=[], **QUIET)
    assert "size" not in result.table
    assert "There is no null" in result.paragraph()
    assert np.isnan(result.table["low"][0]), "two documents make no interval"


def test_rows_too_short_to_be_written_do_not_put_others_out_of_step(llama):
    corpus = wb.Corpus(["abc"] * 2200 + TEXTS)
    result = wb.transport(llama, corpus, "1>2", damage=50_000, weigh=[], closely=False, null=False, **QUIET)
    assert result.damage is not None
    assert result.damage.set_index("way").loc["exact", "change"] == 0.0


def test_results_are_saved_drawn_and_told(llama, tmp_path):
    result = wb.transport(llama, TEXTS, "all", closely=True, routes=400, damage=200, directions=["principal:4", "random:4"],
                          fisher_tokens=100, **QUIET)  # fmt: skip
    assert len(result.table) == 6
    loaded = wb.TransportScores.load(result.save(tmp_path / "out"))
    for name, own in result.tables().items():
        pd.testing.assert_frame_equal(loaded.tables()[name], own)
    assert loaded.paragraph() == result.paragraph()
    assert "6 pairs" in result.paragraph()
    figures = loaded.figures()
    assert set(figures) == {"transport", "decay", "curves", "directions"}
    heat = figures["transport"].data[0]
    assert heat.customdata[0][0][0] == "0>1", "a click tells the pair"
    assert float(heat.z[0][0]) == pytest.approx(result.matrix().loc[0, 1])
    decay = result.decay()
    assert decay["pairs"].tolist() == [3, 2, 1]
    assert decay["held_out"].iloc[0] == pytest.approx(result.table.loc[result.table["distance"] == 1, "held_out"].median())
    (tmp_path / "out" / "transport.parquet").write_bytes(b"torn")
    with pytest.raises(BadArtifact, match="damaged"):
        wb.TransportScores.load(tmp_path / "out")
    atlas = wb.transport(llama, TEXTS, "all", closely=False, weigh=[], **QUIET)
    with pytest.raises(UnknownOption, match="closely"):
        atlas.plot_curves()
    with pytest.raises(UnknownOption, match="no_such"):
        atlas.matrix("no_such")


def test_bad_requests_are_refused_by_name(llama, tmp_path):
    def run(pairs: Any = ("1>2",), texts: Any = TEXTS, **options: Any):
        return wb.transport(llama, texts, pairs, weigh=[], **QUIET, **options)

    with pytest.raises(UnknownOption, match=r"resid_post\.1>resid_post\.0 ends before it begins.*any_order"):
        run(["2>1"])
    assert run(["2>1"], any_order=True, closely=False).table["distance"].tolist() == [-1]
    with pytest.raises(UnknownOption, match="32 numbers"):
        run(directions=[torch.randn(2, 31)])
    with pytest.raises(UnknownOption, match="ends before it begins"):
        run("2>1")
    assert run(["1>mlp_post.1"], closely=True).directions["kind"].unique().tolist() == ["principal", "random"]
    assert run(directions=[]).directions is None
    assert run(directions="principal:3").directions["kind"].tolist() == ["principal"] * 3
    for options in ({"damage": 100, "any_order": True}, {"routes": 100, "any_order": True}):
        with pytest.raises(UnknownOption):
            run(["2>1"], **options)
    with pytest.raises(ReadOnlySite, match="can be read, but not written"):
        run(["1>resid_mid.1"], damage=100)
    with pytest.raises(UnknownOption, match=r"no MLP before it, or there is no such layer"):
        run(directions=["neurons@last:2"])
    with pytest.raises(MissingWeight):
        wb.transport(tiny_model("mixtral", check=False), TEXTS, "1>2", directions="neurons:2", weigh=[], **QUIET)
    with pytest.raises(UnknownOption, match="32 numbers, and mlp_post"):
        run(["1>mlp_post.1"], directions=["neurons:2"])
    with pytest.raises(UnknownOption, match="zero"):
        run(directions=[torch.zeros(1, 32)])
    with pytest.raises(UnknownOption, match="principal:32"):
        run(directions=["principal:many"])
    with pytest.raises(TooFewTokens, match="nothing to hold out"):
        run(texts=[" ".join(TEXTS)[:60]])
    with pytest.raises(UnknownOption, match="strata"):
        run(strata=[])
    with pytest.raises(UnknownOption, match="one_in"):
        run(one_in=0)


def test_directions_are_what_they_are_called(llama):
    rows = drawn(200, 32)[0] * torch.logspace(0, -1, 32, dtype=torch.float64)
    spread = Spread(200, rows.mean(0), rows.T @ rows)
    token = llama.tokenizer.convert_ids_to_tokens(5)
    found = choose(
        llama, "resid_post.1", spread, ["principal:2", "neurons@0:3", f"unembedding:{token}", "random:2", torch.eye(32)[:1]], 0
    )
    assert [label["kind"] for label in found.labels] == ["principal"] * 2 + ["neurons@0"] * 3 + ["unembedding"] + [
        "random"
    ] * 2 + ["vectors"]
    torch.testing.assert_close(found.rows.norm(dim=1), torch.ones(9, dtype=torch.float64))
    assert abs(float(found.rows[0] @ torch.linalg.eigh(spread.xx)[1][:, -1])) == pytest.approx(1)
    neuron = int(found.labels[2]["name"].rpartition(".")[2])
    written = llama.weight("W_out", 0)[neuron].detach().double()
    assert float(found.rows[2] @ written / written.norm()) == pytest.approx(1)
    column = llama.vocabulary.W_U[:, 5].detach().double() - llama.vocabulary.W_U.detach().double().mean(1)
    assert float(found.rows[5] @ column / column.norm()) == pytest.approx(1, abs=1e-6)
