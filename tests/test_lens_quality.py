"""Lenses on held-out text: numbers are those of a dense computation, exits those of the rule, parts add up to readings."""

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_lens import MANY, TEXTS

import workbench as wb
from workbench.analyses import lens_quality
from workbench.analyses.early_exit import THRESHOLDS, early_exit, exits
from workbench.analyses.lens_quality import LensQuality
from workbench.corpus.corpus import Corpus
from workbench.errors import BadArtifact, BadCorpus, NotComparable, OtherJob, UnknownOption, UnknownToken
from workbench.lenses import shipped
from workbench.lenses.lens import Lens
from workbench.tokens import token_bytes

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def lenses(llama):
    return {"logit": Lens.logit(llama), "shortcut": wb.fit_shortcut(llama, MANY, **QUIET)}


@pytest.fixture(scope="module")
def quality(llama, lenses):
    return wb.lens_quality(llama, MANY, lenses, **QUIET)


def dense(model, lens, side="held_out"):
    """Log-probabilities of lens and model at every token of the held-out rows, next ids, and where tokens stand."""
    found = []
    for row in getattr(Corpus(MANY), side)().rows(model):
        acts = wb.capture(model, MANY[int(row.documents[0])], ["resid_pre.0", "resid_post"])
        assert acts.tokens[0].tolist() == row.tokens.tolist()
        sites = ["resid_pre.0", "resid_post.0", "resid_post.1", "resid_post.2"]
        q = [torch.log_softmax(model.vocabulary.logits(lens.read(acts[site][0], site)).double(), -1) for site in sites]
        found.append((torch.stack(q, 1), row))
    return found


@pytest.mark.parametrize("name", ["logit", "shortcut"])
def test_quality_is_that_of_a_dense_computation(llama, lenses, quality, name):
    own, sizes = dense(llama, lenses[name]), token_bytes(llama.tokenizer, llama.d_vocab)
    for strata in ("all", "ordinary"):
        kl, agrees, ranks, nats, size, surprisal = [], [], [], 0.0, 0, []
        for q, row in own:
            p, ids = q[:, -1], row.tokens
            special = torch.tensor([int(i) in llama.tokenizer.all_special_ids for i in ids])
            chosen = torch.ones(len(ids), dtype=torch.bool) if strata == "all" else (torch.arange(len(ids)) > 3) & ~special
            divergence = (p.exp()[:, None] * (p[:, None] - q)).sum(-1)
            best = p.argmax(-1)
            kl.append(divergence[chosen])
            agrees.append((q.argmax(-1) == best[:, None])[chosen])
            ranks.append((q > q.gather(-1, best[:, None, None].expand(-1, 4, 1))).sum(-1)[chosen])
            surprisal.append(-p.gather(1, q.argmax(-1))[chosen])
            followed = [t for t in range(len(ids) - 1) if chosen[t]]
            nats = nats - sum(q[t, :, ids[t + 1]] for t in followed)
            size += sum(sizes[ids[t + 1]] for t in followed)
        table = quality.table[(quality.table["tokens"] == strata) & (quality.table["lens"] == name)]
        assert table["layer"].tolist() == [-1, 0, 1, 2]
        assert (table["n"] == len(torch.cat(kl))).all()
        np.testing.assert_allclose(table["kl_to_final_nats"], torch.cat(kl).mean(0), atol=2e-5)
        np.testing.assert_allclose(table["agreement"], torch.cat(agrees).double().mean(0), atol=1e-6)
        np.testing.assert_allclose(table["surprisal_nats"], torch.cat(surprisal).mean(0), atol=2e-5)
        for k in (1, 5, 10):
            np.testing.assert_allclose(table[f"precision_{k}"], (torch.cat(ranks) < k).double().mean(0), atol=1e-6)
        np.testing.assert_allclose(table["bits_per_byte"], torch.as_tensor(nats) / (math.log(2) * size), rtol=1e-5)


def test_the_null_is_the_mean_output_of_documents_that_are_not_scored(llama, lenses, quality):
    p, others = (
        torch.cat([q[:, -1].exp() for q, _ in dense(llama, lenses["logit"], side)]) for side in ("held_out", "training")
    )
    constant = others.mean(0)
    divergence = (p * (p.log() - constant.log())).sum(-1)
    null = quality.null.set_index("tokens").loc["all"]
    assert null["kl_to_final_nats"] == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert null["agreement"] == pytest.approx(float((p.argmax(-1) == constant.argmax()).double().mean()))
    own = (p * (p.log() - p.mean(0).log())).sum(-1)
    assert float(own.mean()) < null["kl_to_final_nats"], "a mean of what is scored would flatter itself"
    row = quality.table.query("lens == 'shortcut' and tokens == 'all' and layer == 0").iloc[0]
    assert row["over_null_nats"] == pytest.approx(null["kl_to_final_nats"] - row["kl_to_final_nats"], abs=1e-5)
    assert row["over_null_error"] > 0


def test_a_lens_that_saw_the_held_out_documents_is_named(llama, lenses, quality):
    moments = wb.collect_moments(llama, MANY, "states", "last", detail="two", folds=2, **QUIET)
    fitted = wb.fit_transports(moments, held_out=False, **QUIET)
    given = {"logit": lenses["logit"], "leaky": Lens.of(fitted.values(), "shortcut", fitted.settings)}
    found = wb.lens_quality(llama, MANY, given, layers="0", **QUIET)
    assert found.settings["fitted_beside"] == {"logit": True, "leaky": False}
    assert "leaky: fitted on all documents" in str(found)
    assert quality.settings["fitted_beside"] == {"logit": True, "shortcut": True}


def test_other_sites_are_measured_and_drawn(llama, lenses):
    between = wb.fit_shortcut(llama, MANY, sites="resid_mid", **QUIET)
    found = wb.lens_quality(llama, MANY, {"logit": lenses["logit"], "between": between}, sites="resid_mid", **QUIET)
    assert found.table["site"].unique().tolist() == ["resid_mid.0", "resid_mid.1", "resid_mid.2", "resid_post.2"]
    assert "resid_mid.2" in str(found)
    view = wb.lens(llama, ["the", TEXTS[0]], between, sites="resid_mid")
    heat: Any = view.plot(row=1).data[0]
    assert list(heat.y) == ["resid_mid.0", "resid_mid.1", "resid_mid.2", "2"]
    own = view.positions[view.positions["row"] == 1]
    z = own.pivot(index="site", columns="pos", values="kl_to_final_nats").loc[view.settings["sites"]]
    np.testing.assert_allclose(np.array(heat.z), z)
    assert len(str(view).splitlines()) == 7, "the shorter text is shown whole"
    lines: Any = view.plot_trajectories(row=1).data
    assert list(lines[0].x) == ["resid_mid.0", "resid_mid.1", "resid_mid.2", "2"]
    view.plot_difference(wb.logit_lens(llama, ["the", TEXTS[0]], sites="resid_mid"))


def test_errors_are_over_documents_and_gains_over_the_first_lens(llama, lenses, quality):
    per_document = []
    for (q, _), (r, _) in zip(dense(llama, lenses["logit"]), dense(llama, lenses["shortcut"]), strict=True):
        p = q[:, -1]
        per_document.append((p.exp() * (r[:, 0] - q[:, 0])).sum(-1))
    gains = torch.cat(per_document)
    row = quality.table.query("lens == 'shortcut' and tokens == 'all' and layer == -1").iloc[0]
    assert row["gain_nats"] == pytest.approx(float(gains.mean()), abs=2e-5)
    sums = torch.stack([(one - gains.mean()).sum() for one in per_document])
    n = len(sums)
    assert row["gain_error"] == pytest.approx(float((sums.square().sum() * n / (n - 1)).sqrt() / len(gains)), rel=1e-3)
    itself = quality.table[quality.table["lens"] == "logit"]
    assert (itself["gain_nats"] == 0).all()
    assert set(quality.not_nearer()) == {"shortcut"}
    again = wb.lens_quality(llama, MANY, {"a": lenses["shortcut"], "b": lenses["shortcut"]}, **QUIET)
    assert again.not_nearer() == {"b": [-1, 0, 1]}, "what gains nothing is not nearer"


@given(
    st.integers(2, 6).flatmap(lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=1, max_size=12))
)
def test_exits_follow_the_rule(margins):
    margin = np.array(margins)
    pos = np.arange(len(margin))
    n = margin.shape[1]
    assert (exits(margin, pos, float(THRESHOLDS[-1])) == n).all(), "never before the end"
    assert (exits(margin, pos, -1.112) == 1).all(), "always after the first block"
    run = [exits(margin, pos, threshold) for threshold in np.linspace(-0.2, 1.112, 30)]
    assert all((a <= b).all() for a, b in itertools.pairwise(run)), "monotone in the threshold"
    for token, blocks in enumerate(exits(margin, pos, 0.5)):
        bar = 0.45 + 0.1 * math.exp(-4 * pos[token] / max(pos.mean(), 1))
        assert blocks == next((i + 1 for i in range(n) if margin[token, i] > bar), n)


def test_what_is_saved_is_measured_on_documents_that_did_not_choose():
    """A planted rule: sure means right, in the documents that choose; in the others it means nothing."""
    rng = np.random.default_rng(0)
    document, pos = np.repeat(np.arange(40), 25), np.tile(np.arange(25), 40)
    sure = rng.random((1000, 5)) < 0.5
    margin = np.where(sure, 0.99, 0.0)
    agrees = np.where((document % 2 == 0)[:, None], sure, rng.random((1000, 5)) < 0.3)
    margin[:, -1], agrees[:, -1] = 1.0, True
    curve, saved = early_exit(margin, agrees, pos, document)
    assert curve["blocks"].is_monotonic_increasing
    assert curve["agreement"].iloc[-1] == 1
    row = saved.set_index("wanted").loc[0.99]
    assert row["saved"] > 2
    assert row["agreement"] < 0.5, "chosen where it holds, measured where it does not"
    assert row["fixed_saved"] == 0
    _, alone = early_exit(margin, agrees, pos, np.zeros(1000, int))
    assert alone["saved"].isna().all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "olmo2"])
def test_contributions_add_up_to_what_the_lens_reads(family):
    """With RMS norms and LayerNorms, parallel blocks, head biases and post-norms; seen through a fitted lens too."""
    model = tiny_model(family, check=False)
    for lens in (None, wb.fit_tuned(model, MANY[:10], **QUIET)):
        found = wb.lens_contributions(model, TEXTS, lens, k=3, target=7)
        wide = found.targets.pivot(index=["row", "layer", "pos"], columns="part", values="contribution")
        total = wide[["resid_pre", "attn_out", "mlp_out", "constant"]].sum(axis=1)
        np.testing.assert_allclose(total, wide["logit"], atol=2e-4)
        view = wb.lens(model, TEXTS, lens, k=model.d_vocab)
        logit = view.table[(view.table["token_id"] == 7) & (view.table["layer"] >= 0)]
        read = logit.set_index(["row", "layer", "pos"])["logit"].sort_index()
        np.testing.assert_allclose(wide["logit"].sort_index(), read, atol=2e-4)
        assert wide["attn_out"].abs().max() > 0.001
        ends = found.table.groupby(["row", "layer", "part", "pos", "end"])["contribution"].first().unstack()
        assert (ends["up"] >= ends["down"]).all()


def test_contributions_are_refused_where_no_sum_goes(tmp_path, llama):
    with pytest.raises(UnknownOption, match="caps its logits"):
        wb.lens_contributions(tiny_model("gemma2", check=False), TEXTS)
    with pytest.raises(UnknownOption, match="k=0"):
        wb.lens_contributions(llama, TEXTS, k=0)
    with pytest.raises(UnknownToken):
        wb.lens_contributions(llama, TEXTS, target="no such token")
    found = wb.lens_contributions(llama, TEXTS[0], layers="1")
    again = type(found).load(found.save(tmp_path))
    pd.testing.assert_frame_equal(found.table, again.table)
    assert str(again) == str(found)
    assert "the logit of" in str(found)


def test_quality_is_saved_drawn_and_refused(llama, lenses, quality, tmp_path):
    again = LensQuality.load(quality.save(tmp_path))
    pd.testing.assert_frame_equal(again.table, quality.table)
    pd.testing.assert_frame_equal(again.null, quality.null)
    assert str(again) == str(quality)
    assert again.plot().layout.title.text == quality.plot().layout.title.text
    some = wb.lens_quality(llama, MANY, [lenses["logit"]], layers="0", **QUIET)
    assert some.saved is None
    drawn: Any = LensQuality.load(some.save(tmp_path)).plot("all").data
    assert len(drawn) == 3
    (tmp_path / "null.parquet").write_bytes(b"torn")
    with pytest.raises(BadArtifact):
        LensQuality.load(tmp_path)
    with pytest.raises(UnknownOption, match="2 lenses were given, of 1 kinds"):
        wb.lens_quality(llama, MANY, [lenses["logit"], lenses["logit"]])
    with pytest.raises(UnknownOption, match="0 lenses"):
        wb.lens_quality(llama, MANY, [])
    with pytest.raises(BadCorpus, match="held out"):
        wb.lens_quality(llama, MANY[:5], lenses, **QUIET)
    with pytest.raises(OtherJob):
        wb.lens_quality(tiny_model("gptj", check=False), MANY, lenses)


def test_pictures_of_lines_and_differences(llama, lenses):
    one, other = wb.logit_lens(llama, TEXTS[0]), wb.lens(llama, TEXTS[0], lenses["shortcut"])
    lines: Any = one.plot_trajectories("target_rank").data
    assert len(lines) == one.positions["pos"].nunique()
    first = one.positions[one.positions["pos"] == 0]
    assert list(lines[0].y) == (first["target_rank"] + 1).tolist()
    heat: Any = one.plot_difference(other).data[0]
    a, b = (x.positions.pivot(index="layer", columns="pos", values="kl_to_final_nats").to_numpy() for x in (one, other))
    np.testing.assert_allclose(np.array(heat.z), a - b)
    assert heat.zmid == 0
    with pytest.raises(NotComparable, match="cannot be laid over each other"):
        one.plot_difference(wb.logit_lens(llama, TEXTS[1]))
    with pytest.raises(UnknownOption, match="measure"):
        one.plot_trajectories("beauty")
    with pytest.raises(UnknownOption, match="row=3"):
        one.plot_trajectories(row=3)


def test_bytes_of_tokens_are_those_of_the_text(llama, smollm):
    for model in (llama, smollm):
        sizes = token_bytes(model.tokenizer, model.d_vocab)
        for text in ("the cat sat on it", "dogs in the rain"):
            assert sum(sizes[i] for i in model.token_ids([text], bos=False)[0]) == len(text.encode())
    sizes = token_bytes(smollm.tokenizer, smollm.d_vocab)
    for text in ("Zürich, 東京 and 🙂!", "a\n\n  b\t…"):
        assert sum(sizes[i] for i in smollm.token_ids([text], bos=False)[0]) == len(text.encode())


def test_shipped_lenses_are_nearer_to_the_embedded_models_output(smollm, monkeypatch):
    """On documents that none was fitted on. The tuned lens everywhere but in the last layers, where all are near."""
    monkeypatch.setattr(lens_quality, "NULL_TOKENS", 256)
    lenses = {"logit": Lens.logit(smollm)} | {kind: wb.shipped_lens(smollm, kind) for kind in ("tuned", "jacobian")}
    found = wb.lens_quality(smollm, Corpus("wikipedia", length=64), lenses, layers="0,15,27", max_tokens=128, **QUIET)
    kl = found.table[found.table["tokens"] == "all"].pivot(index="layer", columns="lens", values="kl_to_final_nats")
    assert (kl.loc[[0, 15, 27], "tuned"] < 0.5 * kl.loc[[0, 15, 27], "logit"]).all()
    assert (kl.loc[[0, 15], "jacobian"] < kl.loc[[0, 15], "logit"]).all()
    assert (kl.loc[29] == 0).all()
    for folder in (shipped.SHIPPED / smollm.name).iterdir():
        assert (folder / "transports.safetensors").stat().st_size < 21e6


def test_only_shipped_lenses_are_found_by_kind(llama):
    assert wb.shipped_lens(llama, "logit").kind == "logit"
    with pytest.raises(UnknownOption, match=r"There is none\. Fit one: workbench fit-lens --kind tuned"):
        wb.shipped_lens(llama, "tuned")
