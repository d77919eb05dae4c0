"""Sub-modules replaced by linear maps: exact where they are linear, scikit-learn's maps, the cost of a replacement by hand."""

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from families import FAMILIES, tiny_hf, tiny_tokenizer
from sklearn.linear_model import LinearRegression, Ridge
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import workbench as wb
from workbench.analyses.held_out_change import HeldOut
from workbench.analyses.held_out_loss import counted, held_out_rows, losses
from workbench.analyses.rerun import Rerun
from workbench.analyses.submodules import MODES, StandIns, pairs_of
from workbench.cli import app
from workbench.corpus.corpus import EARLY_UNTIL, ORDINARY
from workbench.errors import BadArtifact, LayerOutOfRange, TooFewTokens, UnknownOption, UnknownSite
from workbench.transports.fit import Recipe

QUIET: dict[str, Any] = {"progress": False}
TEXTS = [" ".join(f"word{(i * 7 + j * j * (i + 3)) % 97}" for j in range(10)) for i in range(20)]


def linear_mlps() -> wb.LanguageModel:
    """GPT-2 without its nonlinearity."""
    hf: Any = tiny_hf("gpt2")
    for block in hf.transformer.h:
        block.mlp.act = nn.Identity()
    return wb.load(hf, tokenizer=tiny_tokenizer(), check=False)


def linear_attention() -> wb.LanguageModel:
    """Mistral with a window of one token: each attends to itself alone."""
    name, config = FAMILIES["mistral"]
    FAMILIES["narrow"] = (name, config | {"sliding_window": 1})
    try:
        return tiny_model("narrow", check=False)
    finally:
        del FAMILIES["narrow"]


def linear_norms() -> wb.LanguageModel:
    """GPT-2 with matrices where its norms are."""
    hf: Any = tiny_hf("gpt2")
    for block in hf.transformer.h:
        block.ln_1, block.ln_2 = nn.Linear(32, 32), nn.Linear(32, 32)
        for norm in (block.ln_1, block.ln_2):
            nn.init.normal_(norm.weight, std=0.1)
    return wb.load(hf, tokenizer=tiny_tokenizer(), check=False)


@pytest.mark.parametrize(("mode", "made"), [("mlp", linear_mlps), ("attention", linear_attention), ("norms", linear_norms)])
@pytest.mark.parametrize("positions", ["later", pytest.param("all", marks=pytest.mark.slow)])
def test_exact_maps_of_linear_sub_modules_change_nothing(mode, made, positions):
    found = wb.shortcuts(made(), TEXTS, modes=[mode], kind="ols", positions=positions, loss_tokens=300, **QUIET)
    ways = {way: rows.set_index("layer") for way, rows in found.table.groupby("way")}
    assert list(ways["map"].index) == [0, 1, 2]
    assert ways["map"]["change"].abs().max() < 1e-5
    assert ways["map"]["kl_nats"].abs().max() < 1e-5
    assert (ways["map"]["agreement"] == 1).all()
    assert found.fits["held_out"].min() > 1 - 1e-6
    for null in set(ways) - {"map"}:
        assert (ways[null]["kl_nats"] > 1e-3).all(), null
        assert (ways[null]["change"].abs() > 1e-4).all(), null


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("strata", ["ordinary", "all"])
def test_maps_are_scikit_learns(llama, strata, affine):
    """Of what the model gives on the documents of the fit, and the mean with them."""
    pairs = [pair for mode in MODES for pair in pairs_of(llama, 1, mode)]
    assert [str(pair) for pair in pairs] == ["ln1.1>attn_out.1", "ln2.1>mlp_out.1", "resid_post.0>ln1.1", "resid_mid.1>ln2.1"]
    corpus = wb.Corpus(TEXTS)
    moments = wb.collect_moments(llama, corpus, [], [str(pair) for pair in pairs], detail="two", folds=2, **QUIET)
    sites = sorted({site for pair in pairs for site in pair[:2]})
    rows: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    for batch in wb.stream(llama, corpus, sites, **QUIET):
        at = batch.tokens.document % 2 == 0
        if strata == "ordinary":
            at &= batch.tokens.stratum == ORDINARY
        for site in sites:
            rows[site].append(batch[site][torch.from_numpy(at)].double().numpy())
    joined = {site: np.concatenate(own) for site, own in rows.items()}
    for recipe, theirs in (
        (Recipe("ols", affine=affine), LinearRegression(fit_intercept=affine)),
        (Recipe("ridge", affine=affine, strength=30.0), Ridge(30.0, fit_intercept=affine)),
    ):
        standing = StandIns(llama, moments, strata, recipe)
        for pair in pairs:
            x, y = joined[pair.source], joined[pair.target]
            own, row = standing.fitted(pair)
            expected = theirs.fit(x, y)
            assert row["n"] == len(x)
            assert row["in_sample"] == pytest.approx(
                1 - ((y - expected.predict(x)) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), abs=1e-5
            )
            predicted = own(torch.from_numpy(x)).numpy()
            np.testing.assert_allclose(predicted, expected.predict(x), rtol=1e-3, atol=1e-3 * np.abs(y).max())
            np.testing.assert_allclose(standing.constant(pair, "mean")(torch.from_numpy(x))[0], y.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["later", pytest.param("all", marks=pytest.mark.slow)])
def test_the_cost_is_that_of_a_replacement_by_hand(llama, positions):
    """At the last block and from the middle on: loss, KL and agreement from all logits."""
    corpus = wb.Corpus(TEXTS)
    found = wb.shortcuts(llama, corpus, layers="1,2", positions=positions, loss_tokens=200, **QUIET)
    skip, strata = (EARLY_UNTIL, "ordinary") if positions == "later" else (0, "all")
    pairs = {layer: [pair for mode in MODES for pair in pairs_of(llama, layer, mode)] for layer in (1, 2)}
    names = [str(pair) for own in pairs.values() for pair in own]
    standing = StandIns(
        llama, wb.collect_moments(llama, corpus, [], names, detail="two", folds=2, **QUIET), strata, Recipe("ridge")
    )
    rows = held_out_rows(corpus, llama, 200)
    clean = losses(Rerun(llama, rows, None), nullcontext())
    assert found.settings["clean_loss"] == pytest.approx(clean.nats.mean(), abs=1e-6)
    for row in found.table.to_dict("records"):
        chosen = [pair for layer in range(row["layer"], 3) for pair in pairs_of(llama, layer, row["mode"])]
        maps = [standing.fitted(pair)[0] if row["way"] == "map" else standing.constant(pair, row["way"]) for pair in chosen]
        change, error = losses(Rerun(llama, rows, None), wb.substitute(llama, *maps, skip=skip)).change(clean)
        assert row["change"] == pytest.approx(change, abs=2e-6), row
        assert row["change_error"] == pytest.approx(error, abs=2e-6), row
    row = found.table[(found.table["layer"] == 2) & (found.table["way"] == "map") & (found.table["mode"] == "mlp")].iloc[0]
    (own,) = pairs_of(llama, 2, "mlp")
    kl, agrees = [], []
    for one in rows:
        tokens, at = torch.from_numpy(one.tokens).long()[None], np.flatnonzero(counted(one))
        with torch.no_grad():
            p = llama.hf(tokens).logits[0, at].log_softmax(-1)
            with wb.substitute(llama, standing.fitted(own)[0], skip=skip):
                q = llama.hf(tokens).logits[0, at].log_softmax(-1)
        kl.append(F.kl_div(q, p, reduction="none", log_target=True).sum(1))
        agrees.append(p.argmax(1) == q.argmax(1))
    assert row["kl_nats"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert row["agreement"] == pytest.approx(float(torch.cat(agrees).double().mean()))


def test_removing_the_mlps_is_the_model_without_them():
    """Truth: Hugging Face's own model whose down projections are zero."""
    found = wb.shortcuts(tiny_model("llama", check=False), TEXTS, modes=["mlp"], positions="all", loss_tokens=200, **QUIET)
    model = tiny_model("llama", check=False)
    rows = held_out_rows(wb.Corpus(TEXTS), model, 200)
    clean = losses(Rerun(model, rows, None), nullcontext())
    with torch.no_grad():
        for layer in range(3):
            model.weight("W_out", layer).zero_()
    without = losses(Rerun(model, rows, None), nullcontext())
    row = found.table[(found.table["layer"] == 0) & (found.table["way"] == "zero")].iloc[0]
    assert row["change"] == pytest.approx(without.change(clean)[0], abs=1e-5)


def test_states_that_are_no_numbers_have_lost_all(llama):
    rows = held_out_rows(wb.Corpus(TEXTS), llama, 100)
    held_out = HeldOut(llama, rows, None)
    found = held_out.under(wb.intervene(llama, wb.clamp("resid_post.2", 3, torch.inf, positions=2)))
    assert found.change == found.kl_nats == torch.inf
    assert np.isnan(found.change_error)
    assert found.overflowed == pytest.approx(sum(len(row) > 3 for row in rows) / len(held_out.nats))
    assert found.agreement == pytest.approx(1 - found.overflowed)
    none = held_out.under(nullcontext())
    assert none.change == none.change_error == 0
    assert none.kl_nats < 1e-6
    assert none.agreement == 1
    assert none.overflowed == 0


@pytest.mark.parametrize(
    ("family", "pairs"),
    [
        ("gptj", {"attention": ["ln1.1>attn_out.1"], "mlp": ["ln1.1>mlp_out.1"], "norms": ["resid_post.0>ln1.1"]}),
        ("gpt_neox", {"attention": ["ln1.1>attn_out.1"], "mlp": ["ln2.1>mlp_out.1"],
                      "norms": ["resid_post.0>ln1.1", "resid_post.0>ln2.1"]}),
        ("olmo2", {"attention": ["resid_post.0>attn_out.1"], "mlp": ["resid_mid.1>mlp_out.1"]}),
        ("gemma2", {"attention": ["ln1.1>attn_out.1"], "mlp": ["ln2.1>mlp_out.1"],
                    "norms": ["resid_post.0>ln1.1", "resid_mid.1>ln2.1"]}),
        ("mixtral", {"attention": ["ln1.1>attn_out.1"], "mlp": ["ln2.1>mlp_out.1"],
                     "norms": ["resid_post.0>ln1.1", "resid_mid.1>ln2.1"]}),
    ],
)  # fmt: skip
def test_sub_modules_are_those_that_a_family_has(family, pairs):
    model = tiny_model(family, check=False)
    found = wb.shortcuts(model, TEXTS, layers="1", loss_tokens=100, nulls=False, **QUIET)
    assert list(pairs) == found.settings["modes"]
    own = found.fits[found.fits["layer"] == 1]
    assert {mode: [f"{row.source}>{row.target}" for row in own[own["mode"] == mode].itertuples()] for mode in pairs} == pairs
    assert set(found.table["way"]) == {"map"}
    assert found.table["restored"].isna().all()


def test_results_are_saved_read_shown_and_drawn(llama, tmp_path):
    found = wb.shortcuts(llama, TEXTS, stride=2, loss_tokens=100, **QUIET)
    assert found.settings["layers"] == [0, 2]
    again = wb.Shortcuts.load(found.save(tmp_path))
    assert again.table.equals(found.table)
    assert again.fits.equals(found.fits)
    assert str(again) == str(found)
    mean, by_map = (found.table[(found.table["mode"] == "mlp") & (found.table["way"] == way)] for way in ("mean", "map"))
    overview = found.overview()
    assert list(overview.columns) == [
        "layer", "attention", "attention_mean", "attention_zero", "mlp", "mlp_mean", "mlp_zero", "norms", "norms_mean",
    ]  # fmt: skip
    assert overview["mlp_mean"].tolist() == mean["change"].tolist()
    restored = 1 - by_map["change"].to_numpy() / mean["change"].to_numpy()
    np.testing.assert_allclose(by_map["restored"], np.where(mean["change"] > 0, restored, np.nan))
    assert f"mlp by linear maps {by_map['change'].iloc[0]:+.3f} ± " in found.paragraph()
    drawn = {trace.name: trace for trace in found.plot().data if trace.showlegend}
    assert list(drawn["mlp: mean output (null)"].y) == pytest.approx(mean["change"].clip(lower=1e-4).tolist())
    assert drawn["mlp: mean output (null)"].line.dash == "dash"
    assert drawn["mlp: linear maps"].line.dash == "solid"
    assert "<table" in found._repr_html_()
    grown = found.table.assign(change=np.where(found.table["mode"] == "norms", np.inf, found.table["change"]))
    told = replace(found, table=grown)
    assert "norms by linear maps all (the stream of 0% of tokens overflows)" in told.paragraph()
    assert told.paragraph().count("norms none") == 1
    crosses = [trace for trace in told.plot().data if trace.mode == "markers"]
    assert [trace.name for trace in crosses] == ["norms: linear maps", "norms: mean output (null)"]
    assert list(crosses[0].y) == [pytest.approx(2 * found.table.query("mode != 'norms'")["change"].max())] * 2
    (tmp_path / "shortcuts.parquet").write_bytes(b"half")
    with pytest.raises(BadArtifact, match="is damaged"):
        wb.Shortcuts.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "raised", "text"),
    [
        ({"modes": ["mlps"]}, UnknownOption, "modes='mlps' is not known. Use one of 'attention', 'mlp', 'norms'"),
        ({"modes": []}, UnknownOption, r"modes=\[\]: there is nothing to replace"),
        ({"layers": "3"}, LayerOutOfRange, "Layers '3' do not lie in this model of 3 layers"),
        ({"layers": "0", "stride": 2}, UnknownOption, "layers='0' and stride=2 both say which blocks to begin at"),
        ({"stride": 0}, UnknownOption, "stride=0: every so-manieth block is 1 or more"),
        ({"loss_tokens": 1}, UnknownOption, "loss_tokens=1: the loss is measured on 2 tokens or more"),
    ],
)
def test_bad_options_are_named(llama, options, raised, text):
    with pytest.raises(raised, match=text):
        wb.shortcuts(llama, TEXTS, **options, **QUIET)


def test_too_little_text_is_named(llama):
    with pytest.raises(TooFewTokens, match="No held-out document has two tokens"):
        wb.shortcuts(llama, TEXTS[:1], **QUIET)
    with pytest.raises(TooFewTokens, match="No held-out row has more than 4 tokens, so nothing would be replaced"):
        wb.shortcuts(llama, ["one", "two", "six"], **QUIET)
    with pytest.raises(TooFewTokens, match=r"needs 34 tokens or more .* Take more text, or kind='ridge'"):
        wb.shortcuts(llama, ["one two"] * 4, kind="ols", **QUIET)
    with pytest.raises(TooFewTokens, match="No token is left to fit a map on"):
        wb.shortcuts(llama, ["one", "one two"], **QUIET)


def test_a_mode_that_a_family_lacks_is_refused_by_name():
    with pytest.raises(UnknownSite, match=r"Site 'ln1.0' does not exist in 'olmo2': attention reads the stream as it is"):
        wb.shortcuts(tiny_model("olmo2", check=False), TEXTS, modes=["norms"], **QUIET)
    with pytest.raises(UnknownSite, match="without attention"):
        wb.shortcuts(tiny_model("lfm2", check=False), TEXTS, modes=["attention"], **QUIET)


def test_the_verb_writes_and_prints_the_same(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    arguments = ["shortcuts", "--model", tmp_path / "model", "--corpus", tmp_path / "texts.txt", "--out", tmp_path / "out"]
    arguments += ["--stride", 2, "--modes", "mlp,norms", "--loss-tokens", 100]
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    saved = wb.Shortcuts.load(tmp_path / "out")
    assert answer["settings"]["modes"] == ["mlp", "norms"]
    assert [row["change"] for row in answer["table"]] == saved.table["change"].tolist()
    assert len(answer["fits"]) == 9
    assert (tmp_path / "out" / "shortcuts.html").exists()
    shown = CliRunner().invoke(app, [*map(str, arguments), "--no-plot", "--no-nulls"])
    assert shown.exit_code == 0, shown.stderr
    assert "Nats a token more, from each block on" in shown.stdout
    refused = CliRunner().invoke(app, [*map(str, arguments), "--layers", "9"])
    assert refused.exit_code == 2
    assert "both say which blocks to begin at" in refused.stderr
