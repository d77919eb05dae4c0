"""Layer linearity: against direct least squares on a real model, on models whose answer is known, and what replacing costs."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score
from torch.nn import functional as F

import workbench as wb
from workbench.analyses.held_out_loss import counted, held_out_rows
from workbench.analyses.layer_moments import LayerMoments, LayerSites
from workbench.corpus.corpus import ORDINARY
from workbench.errors import BadArtifact, TooFewTokens, UnknownOption, UnknownSite
from workbench.moments.layout import Pair
from workbench.transports.fit import Fitting, Recipe
from workbench.transports.transport import Transport

QUIET: dict[str, Any] = {"progress": False}
SHORT = ["the cat sat on the mat"]
TEXTS = [" ".join(f"word{(i * 7 + j * j * (i + 3)) % 97}" for j in range(12)) for i in range(40)]


def explained(x, y, train=slice(None), test=slice(None)) -> float:
    model = LinearRegression().fit(x[train], y[train])
    return float(r2_score(y[test], model.predict(x[test]), multioutput="variance_weighted"))


def held_out(x, y, fold) -> float:
    error = total = 0.0
    for test in (fold == 0, fold == 1):
        missed = y[test] - LinearRegression().fit(x[~test], y[~test]).predict(x[test])
        error, total = error + (missed**2).sum(), total + ((y[test] - y[test].mean(0)) ** 2).sum()
    return float(1 - error / total)


@pytest.fixture(scope="module")
def real(smollm):
    """A layer of the embedded model, and the very activations, in float64."""
    corpus = wb.Corpus("wikipedia", max_tokens=2600)
    result = wb.linearity(smollm, corpus, layers="14", damage=False, **QUIET)
    sites = ["resid_post.13", "attn_out.14", "mlp_out.14"]
    values, stratum, document = {site: [] for site in sites}, [], []
    for batch in wb.stream(smollm, corpus, sites, **QUIET):
        for site in sites:
            values[site].append(batch[site].double().numpy())
        stratum.append(batch.tokens.stratum)
        document.append(batch.tokens.document)
    joined = [np.concatenate(values[site]) for site in sites]
    return result, *joined, np.concatenate(stratum), np.concatenate(document)


def row(result, layer, part, strata, residual):
    table = result.table
    chosen = (table["layer"] == layer) & (table["part"] == part) & (table["strata"] == strata) & (table["residual"] == residual)
    return table[chosen].iloc[0]


@pytest.mark.parametrize("strata", [pytest.param("all", marks=pytest.mark.slow), "ordinary"])
def test_scores_of_the_real_model_are_those_of_a_direct_script(real, strata):
    result, x, a, m, stratum, document = real
    at = np.ones(len(x), bool) if strata == "all" else stratum == ORDINARY
    x, a, m, fold = x[at], a[at], m[at], document[at] % 2
    for part, reads, adds in (("block", x, a + m), ("attn", x, a), ("mlp", x + a, m)):
        for residual, y in ((True, reads + adds), (False, adds)):
            own = row(result, 14, part, strata, residual)
            assert own["n"] == at.sum()
            # Of all tokens 578 numbers are solved whose variances differ 1e9-fold, from sums made in float32: 1e-6 of R²
            assert own["in_sample"] == pytest.approx(explained(reads, y), abs=1e-6)
            assert own["held_out"] == pytest.approx(held_out(reads, y, fold), abs=2e-6 if strata == "ordinary" else 2e-4)
    block = row(result, 14, "block", strata, True)
    cosine = F.cosine_similarity(torch.from_numpy(x), torch.from_numpy(x + a + m)).mean()
    growth = (np.linalg.norm(x + a + m, axis=1) / np.linalg.norm(x, axis=1)).mean()
    assert block["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    assert block["growth"] == pytest.approx(float(growth), rel=1e-5)
    centred = [part - part.mean(0) for part in (x, x + a + m)]
    sizes = np.linalg.svd(centred[0].T @ centred[1], compute_uv=False).sum()
    assert block["procrustes"] == pytest.approx(sizes**2 / np.prod([(part**2).sum() for part in centred]), abs=1e-6)


def test_ridge_of_the_real_model_is_scikit_learns(smollm, real):
    _, x, a, _, stratum, _ = real
    at = stratum == ORDINARY
    moments = wb.collect_moments(smollm, wb.Corpus("wikipedia", max_tokens=2600), [], ["14>attn_out.14"], **QUIET)
    for alpha in (10.0, 1e4):
        own = wb.fit_transports(moments, kind="ridge", strength=alpha, **QUIET)["14>attn_out.14"]
        theirs = Ridge(alpha=alpha).fit(x[at], a[at])
        expected = r2_score(a[at], theirs.predict(x[at]), multioutput="variance_weighted")
        assert own.scores["frobenius_in_sample"] == pytest.approx(expected, abs=1e-6)
        assert np.linalg.norm(own.matrix.T.numpy() - theirs.coef_) < 1e-4 * np.linalg.norm(theirs.coef_)


def test_the_published_number_is_sinks_residual_and_fit(real):
    """0.99 and above as published; without sinks, without the residual and on other documents a fraction of it is left."""
    result = real[0]
    published, ordinary, added = (
        row(result, 14, "block", *which) for which in (("all", True), ("ordinary", True), ("ordinary", False))
    )
    assert published["in_sample"] > 0.995
    assert published["sinks"] > 0.9
    assert ordinary["in_sample"] < 0.98
    assert ordinary["held_out"] < ordinary["adjusted"] < ordinary["in_sample"]
    assert added["held_out"] < 0.5 * added["in_sample"]
    assert 0.15 < added["null_in_sample"] < 0.35, "noise alone scores d / (n - 1) = 0.23"
    assert added["null_held_out"] < 0
    assert ordinary["unrelated_held_out"] > 0.5, "the residual alone gives most of the score"


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma2", "bloom", "granitemoe", "falcon 7b"])
def test_what_is_added_and_the_states_give_the_same_score(family):
    model = tiny_model(family, check=False)
    result = wb.linearity(model, TEXTS, damage=False, null=False, **QUIET)
    pairs = [f"{layer}>{layer + 1}" for layer in range(model.n_layers)]
    states = Fitting(wb.collect_moments(model, TEXTS, pairs=pairs, folds=2, **QUIET), "ordinary")
    for pair, layer in zip(states.moments.pairs, range(model.n_layers), strict=True):
        own = row(result, layer, "block", "ordinary", True)
        assert own["in_sample"] == pytest.approx(states.in_sample(states.fit(Recipe("ols"), pair), pair).frobenius, abs=1e-5)
        assert own["held_out"] == pytest.approx(states.held_out(Recipe("ols"), pair).frobenius, abs=1e-4)


def test_a_shuffled_target_is_the_other_documents_stream(llama):
    """The null of parts put together from sites is that of the states themselves, shuffled in the same way."""
    sites = LayerSites.of(llama, 1)
    states = [sites.x, sites.a, sites.m, "resid_post.1"]
    moments = wb.collect_moments(
        llama, TEXTS, states, sites.pairs, null=[*sites.null_pairs, f"{sites.x}>resid_post.1"], detail="two", folds=2, **QUIET
    )
    own = LayerMoments(moments, sites, "ordinary").joint("block", residual=True, elsewhere=(sites.x, sites.a, sites.m))
    direct = moments.joint(Pair(sites.x, "resid_post.1"), "ordinary", shuffled=True)
    torch.testing.assert_close(own.xy, direct.xy, rtol=1e-4, atol=1e-4 * float(direct.xy.abs().max()))
    torch.testing.assert_close(own.yy, direct.yy, rtol=1e-4, atol=1e-4 * float(direct.yy.abs().max()))


def constant(layer: int = 1):
    """A model whose block adds the same to every token."""
    model = tiny_model("gpt2", check=False)
    with torch.no_grad():
        model.weight("W_O", layer).zero_()
        model.weight("W_out", layer).zero_()
        model.weight("b_out", layer).mul_(50)
    return model


def test_a_linear_block_scores_one_and_its_map_costs_nothing():
    found = wb.linearity(constant(), TEXTS, loss_tokens=300, together=2, on_policy=True, **QUIET)
    for strata in ("all", "ordinary"):
        assert row(found, 1, "block", strata, True)["held_out"] == pytest.approx(1, abs=1e-6)
    damage = found.damage.set_index("layer")
    assert abs(damage.loc[1, "replaced"]) < 1e-5
    assert abs(damage.loc[1, "replaced_later"]) < 1e-5
    assert abs(damage.loc[1, "removed"]) > 1e-3
    assert abs(damage.loc[0, "replaced"]) > 1e-3
    assert 1 in found.settings["blocks_together"], "the most linear blocks are taken"
    ways = found.together.set_index(["way", "on_policy"])["change"]
    assert set(ways.index) == {("removed", False), ("replaced", False), ("replaced", True), ("replaced_later", False),
                               ("replaced_later", True)}  # fmt: skip


def test_on_policy_maps_are_fitted_to_what_replaced_blocks_give(llama):
    """The second map's source is the stream below it with the first in place, not the model's own."""
    from workbench.analyses.linearity_damage import _on_policy, _stand_in

    corpus = wb.Corpus(TEXTS)
    sites = {layer: LayerSites.of(llama, layer) for layer in (0, 2)}
    common = {"batch_tokens": None, "massive_at": None, "seed": 0, "progress": False}
    own = wb.collect_moments(
        llama, corpus, [], [pair for one in sites.values() for pair in one.pairs], detail="two", folds=2, **common
    )
    (first, second), skip = _on_policy(llama, corpus, own, sites, [0, 2], Recipe("ols"), "replaced", common)
    off = [_stand_in(llama, own, sites[layer], layer, Recipe("ols"), "replaced")[0] for layer in (0, 2)]
    assert skip == 0
    torch.testing.assert_close(first.matrix, off[0].matrix, rtol=1e-3, atol=1e-4)
    assert (second.matrix - off[1].matrix).norm() > 0.01 * off[1].matrix.norm()
    with wb.substitute(llama, first):
        x, y = [], []
        for batch in wb.stream(llama, corpus, ["resid_post.1", "resid_post.2"], massive_at=None, **QUIET):
            fitted = torch.from_numpy(batch.tokens.document % 2 == 0)
            x.append(batch["resid_post.1"][fitted].double().numpy())
            y.append(batch["resid_post.2"][fitted].double().numpy())
    direct = LinearRegression().fit(np.concatenate(x), np.concatenate(y))
    np.testing.assert_allclose(second.matrix.T, direct.coef_, rtol=1e-3, atol=1e-4)


def test_removing_a_block_is_the_model_without_it(llama):
    """Truth: Hugging Face's own model with one block fewer."""
    model = tiny_model("llama", check=False)
    batch = model.tokenize(SHORT)
    identity = Transport.identity(model, "resid_post.0", "resid_post.1")
    clean = model.forward(batch)
    with wb.substitute(model, identity):
        removed = model.forward(batch)
    assert torch.equal(model.forward(batch), clean), "nothing is left behind"
    del model.hf.model.layers[1]
    torch.testing.assert_close(removed, model.hf(**model.inputs(batch)).logits)
    assert not torch.allclose(removed, clean, atol=1e-3)


def test_a_map_stands_in_from_where_it_begins_to_where_it_ends(llama):
    acts = wb.capture(llama, SHORT, ["resid_pre.0", "resid_post.0", "resid_post.1"])
    low, high = (
        Transport(
            source, target, torch.randn(32, 32, dtype=torch.float64), None, torch.randn(32, dtype=torch.float64), own.settings
        )
        for source, target in (("resid_pre.0", "resid_post.0"), ("resid_post.0", "resid_post.1"))
        for own in [Transport.identity(llama, source, target)]
    )
    with wb.substitute(llama, high, low):  # in any order
        changed = wb.capture(llama, SHORT, ["resid_pre.0", "resid_post.0", "resid_post.1"])
    torch.testing.assert_close(changed["resid_pre.0"], acts["resid_pre.0"])
    torch.testing.assert_close(changed["resid_post.0"], low(acts["resid_pre.0"]))
    torch.testing.assert_close(changed["resid_post.1"], high(low(acts["resid_pre.0"])), rtol=1e-4, atol=1e-3)
    with wb.substitute(llama, low, skip=4):
        part = wb.capture(llama, SHORT, "resid_post.0")
    assert torch.equal(part["resid_post.0"][:, :4], acts["resid_post.0"][:, :4])
    torch.testing.assert_close(part["resid_post.0"][:, 4:], low(acts["resid_pre.0"])[:, 4:])
    with (
        pytest.raises(UnknownOption, match="ends before it begins"),
        wb.substitute(llama, Transport.identity(llama, "resid_post.1", "resid_post.0")),
    ):
        pass


def test_a_map_stands_in_while_text_is_generated(llama):
    identity = Transport.identity(llama, "resid_post.0", "resid_post.1")
    tokens = llama.tokenize(SHORT[0]).tokens
    with wb.substitute(llama, identity):
        cached = llama.hf.generate(tokens, max_new_tokens=6, do_sample=False)
        for _ in range(6):
            tokens = torch.cat([tokens, llama.hf(tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, tokens)


def test_the_loss_is_that_of_held_out_documents_alone(llama):
    corpus = wb.Corpus(TEXTS, length=64)
    found = wb.linearity(llama, corpus, loss_tokens=200, layers="0", parts=["block"], null=False, **QUIET)
    rows = held_out_rows(corpus, llama, 200)
    nats = []
    for one in rows:
        tokens = torch.from_numpy(one.tokens).long()[None]
        logits = llama.hf(tokens).logits[0].log_softmax(-1)
        nats += [-logits[i, tokens[0, i + 1]].item() for i in np.flatnonzero(counted(one))]
        assert (one.documents % 2 == 1).all()
    assert found.settings["clean_loss"] == pytest.approx(np.mean(nats), abs=1e-5)
    assert found.settings["held_out_tokens"] == len(nats) >= 200


def test_results_are_saved_read_shown_and_drawn(llama, tmp_path):
    found = wb.linearity(llama, TEXTS, loss_tokens=100, together=1, **QUIET)
    again = wb.Linearity.load(found.save(tmp_path))
    for name in ("table", "damage", "together"):
        assert getattr(again, name).equals(getattr(found, name))
    assert again.paragraph() == found.paragraph()
    published = found.table.query("part == 'block' and strata == 'all' and residual")["in_sample"]
    assert f"{published.median():.3f} ({published.min():.3f} to {published.max():.3f})" in found.paragraph()
    assert f"One block removed adds {found.damage['removed'].median():+.3f}" in found.paragraph()
    overview = found.overview()
    assert list(overview["layer"]) == [0, 1, 2]
    assert overview["removed"].tolist() == found.damage["removed"].tolist()
    figure = found.plot()
    drawn = {trace.name: trace for trace in figure.data}
    assert list(drawn["as published: all tokens, residual, in sample"].y) == pytest.approx(
        found.table.query("part == 'mlp' and strata == 'all' and residual")["in_sample"].tolist()
    )
    assert "<table" in found._repr_html_()
    (tmp_path / "linearity.parquet").write_bytes(b"half")
    with pytest.raises(BadArtifact, match="is damaged"):
        wb.Linearity.load(tmp_path)


def test_agreement_is_spearmans(llama):
    from scipy.stats import spearmanr

    found = wb.linearity(tiny_model("gpt2", check=False), TEXTS, loss_tokens=100, null=False, **QUIET)
    score = found.table.query("part == 'block' and strata == 'ordinary' and not residual")["held_out"]
    own = found.agreement().set_index(["score", "strata", "residual"]).loc[("held_out", "ordinary", False)]
    assert own["removed"] == pytest.approx(spearmanr(-score, found.damage["removed"]).statistic)
    ranks = found.ranking().set_index("layer")
    assert ranks["removed"].idxmin() == found.damage.set_index("layer")["removed"].idxmax(), "1 is the dearest"
    assert ranks["added"].idxmin() == score.to_numpy().argmin(), "1 is the least linear"
    with pytest.raises(UnknownOption, match="Pass damage=True"):
        wb.linearity(llama, TEXTS, damage=False, null=False, **QUIET).agreement()


def test_bad_input_is_named(llama):
    with pytest.raises(TooFewTokens, match=r"needs 34 tokens or more .* there are \d+. Take more text, or kind='ridge'"):
        wb.linearity(llama, ["one two three"] * 4, **QUIET, damage=False)
    assert wb.linearity(llama, TEXTS[:2], kind="ridge", damage=False, **QUIET).table["in_sample"].notna().all()
    with pytest.raises(TooFewTokens, match="of a single document, or of every other one"):
        wb.linearity(llama, TEXTS[:1], kind="ridge", **QUIET)
    with pytest.raises(UnknownOption, match="together=4, loss_tokens=2048: at most 3 layers"):
        wb.linearity(llama, TEXTS, together=4, **QUIET)
    with pytest.raises(UnknownOption, match="on_policy= needs together="):
        wb.linearity(llama, TEXTS, on_policy=True, **QUIET)
    with pytest.raises(UnknownSite, match="without attention"):
        wb.linearity(tiny_model("lfm2", check=False), TEXTS, **QUIET)
