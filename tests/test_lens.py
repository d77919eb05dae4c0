"""Lenses: the last layer is the model's output, numbers are those of a dense computation, maps do what they are for."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import by_trait, tiny_model
from families import tiny_hf, tiny_tokenizer

import workbench as wb
from workbench.errors import BadArtifact, NotComparable, OtherJob, TextTooLong, UnknownOption, UnknownSite, UnknownToken
from workbench.lenses.lens import Lens

TEXTS = ["the cat sat on", "dogs in the rain and more"]
MANY = [" ".join(f"word{(i * 7 + j * j * (i + 3)) % 97}" for j in range(6)) for i in range(60)]


@by_trait
def test_the_last_layer_of_the_logit_lens_is_the_models_output(tiny):
    view = wb.logit_lens(tiny, TEXTS, k=3)
    batch = tiny.tokenize(TEXTS)
    logits = tiny.forward(batch).detach()
    last = view.table[view.table["layer"] == tiny.n_layers - 1]
    for row in range(2):
        real = int(batch.mask[row].sum())
        for pos in range(real):
            cell = last[(last["row"] == row) & (last["pos"] == pos)].sort_values("rank")
            own = logits[row, pos].float()
            size = float(own.abs().max())
            assert np.abs(own[cell["token_id"].tolist()].numpy() - cell["logit"].to_numpy()).max() < 1e-5 * max(size, 1)
            assert abs(float(own.max()) - cell["logit"].iloc[0]) < 1e-5 * max(size, 1)
            assert float(torch.softmax(own, 0)[cell["token_id"].iloc[0]]) == pytest.approx(
                cell["probability"].iloc[0], rel=1e-4
            )
    ending = view.positions[view.positions["layer"] == tiny.n_layers - 1]
    assert (ending["kl_to_final_nats"] == 0).all()
    assert ending["agrees"].all()
    assert (ending["final_rank"] == 0).all()
    assert len(view.positions) == int(batch.mask.sum()) * (tiny.n_layers + 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
def test_numbers_are_those_of_a_dense_computation(family):
    model = tiny_model(family, check=False)
    view = wb.logit_lens(model, TEXTS, k=4)
    acts = wb.capture(model, TEXTS, ["resid_pre.0", "resid_post"], logits=True)
    final = torch.log_softmax(acts.logits.double(), -1)
    strings = model.token_strings
    for layer, site in ((-1, "resid_pre.0"), (0, "resid_post.0"), (1, "resid_post.1")):
        lens = torch.log_softmax(model.vocabulary.logits(acts[site]).double(), -1)
        for row in range(2):
            tokens = acts.tokens[row, acts.mask[row]]
            for pos in range(len(tokens)):
                own = view.positions.query(f"row == {row} and layer == {layer} and pos == {pos}").iloc[0]
                q, p = lens[row, pos], final[row, pos]
                target = int(tokens[pos + 1]) if pos + 1 < len(tokens) else int(p.argmax())
                assert own["kl_to_final_nats"] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=2e-5)
                assert own["entropy_nats"] == pytest.approx(float(-(q.exp() * q).sum()), abs=2e-5)
                assert own["target"] == strings[target]
                assert own["target_rank"] == int((q > q[target]).sum())
                assert own["target_log_probability"] == pytest.approx(float(q[target]), abs=2e-5)
                assert own["final_rank"] == int((q > q[p.argmax()]).sum())
                assert own["surprisal_nats"] == pytest.approx(float(-p[q.argmax()]), abs=2e-5)
                best = view.table.query(f"row == {row} and layer == {layer} and pos == {pos}").sort_values("rank")
                assert best["token_id"].tolist() == q.topk(4).indices.tolist()


def test_padding_and_company_change_nothing(llama):
    both = wb.logit_lens(llama, TEXTS)
    for row, text in enumerate(TEXTS):
        alone = wb.logit_lens(llama, text)
        own = both.positions[both.positions["row"] == row].drop(columns="row").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, alone.positions.drop(columns="row"), rtol=1e-4, atol=1e-5)


def test_precision_grows_with_k_and_layers_can_be_chosen(llama):
    view = wb.logit_lens(llama, TEXTS, layers="0:2", k=1)
    assert view.settings["sites"] == ["resid_post.0", "resid_post.1", "resid_post.2"], "the model's own output is always there"
    means = view.by_layer().set_index("layer")
    assert (means["precision_1"] <= means["precision_5"]).all()
    assert (means["precision_5"] <= means["precision_10"]).all()
    assert means.loc[2, "precision_1"] == 1
    assert means["agreement"].tolist() == pytest.approx(means["precision_1"].tolist())
    whole = wb.logit_lens(llama, TEXTS)
    pd.testing.assert_frame_equal(
        whole.positions[whole.positions["layer"].isin([0, 1, 2])].reset_index(drop=True), view.positions, rtol=1e-5, atol=1e-6
    )


def test_a_target_is_followed_everywhere(llama):
    view = wb.logit_lens(llama, TEXTS[0], target=7)
    assert (view.positions["target_id"] == 7).all()
    acts = wb.capture(llama, TEXTS[0], ["resid_post.1"])
    q = torch.log_softmax(llama.vocabulary.logits(acts["resid_post.1"])[0].double(), -1)
    own = view.positions[view.positions["layer"] == 1]["target_log_probability"]
    np.testing.assert_allclose(own, q[:, 7], atol=2e-5)


def _lens(transports):
    return Lens.of(transports.values(), "shortcut", transports.settings)


def linear_net(scale: float = 0.3):
    """A model whose every block adds a fixed linear map of what enters it, and whose last state is all that is read."""
    model = tiny_model("llama", check=False)
    generator = torch.Generator().manual_seed(0)

    class Linear(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, scale * torch.randn(32, 32, generator=generator) / 32**0.5

        def forward(self, x, *args, **kwargs):
            return x + x @ self.weight

    for i, block in enumerate(model.hf.model.layers):
        model.hf.model.layers[i].forward = Linear(block).forward
    return model


def test_on_a_linear_net_the_shortcut_lens_is_exact_and_the_logit_lens_is_not():
    model = linear_net()
    for kind in ("ols", "ridge"):
        lens = wb.fit_shortcut(model, MANY, kind=kind, progress=False)
        assert [one.scores["frobenius_held_out"] for one in lens.maps.values()] == pytest.approx([1.0] * 3, abs=1e-6)
        fitted, logit = (
            view.by_layer().set_index("layer") for view in (wb.lens(model, MANY[:2], lens), wb.logit_lens(model, MANY[:2]))
        )
        assert (fitted["kl_to_final_nats"] < 1e-4).all()
        assert (fitted["agreement"] == 1).all()
        assert (logit["kl_to_final_nats"][:-1] > 0.01).all()


def test_lenses_are_saved_and_refused_for_another_model(llama, tmp_path):
    lens = wb.fit_shortcut(llama, MANY, held_out=False, progress=False)
    view = wb.lens(llama, TEXTS, lens)
    loaded = Lens.load(lens.save(tmp_path / "lens"), model=llama)
    assert loaded.kind == "shortcut"
    pd.testing.assert_frame_equal(wb.lens(llama, TEXTS, loaded).table, view.table)
    again = wb.LensView.load(view.save(tmp_path / "view"))
    pd.testing.assert_frame_equal(again.positions, view.positions)
    pd.testing.assert_frame_equal(again.table, view.table)
    assert str(again) == str(view)
    other = wb.load(tiny_hf("llama", seed=1), tokenizer=tiny_tokenizer(), check=False)
    with pytest.raises(OtherJob):
        wb.lens(other, TEXTS, lens)
    with pytest.raises(OtherJob):
        Lens.load(tmp_path / "lens", model=other)
    (tmp_path / "view" / "lens.parquet").write_bytes(b"torn")
    with pytest.raises(BadArtifact):
        wb.LensView.load(tmp_path / "view")


def test_bad_requests_are_named(llama):
    with pytest.raises(UnknownOption, match="k=0"):
        wb.logit_lens(llama, TEXTS, k=0)
    with pytest.raises(UnknownToken):
        wb.logit_lens(llama, TEXTS, target="no such token")
    with pytest.raises(TextTooLong):
        wb.logit_lens(llama, "word " * 100)
    with pytest.raises(UnknownOption, match="row=2"):
        wb.logit_lens(llama, TEXTS).plot(row=2)
    moments = wb.collect_moments(llama, MANY, [], ["0>1", "1>3"], detail="two", folds=2, progress=False)
    with pytest.raises(NotComparable, match="none of the maps of a lens"):
        _lens(wb.fit_transports(moments, held_out=False, progress=False))
    some = _lens(wb.fit_transports(moments, ["1>3"], held_out=False, progress=False))
    with pytest.raises(NotComparable, match=r"no map from resid_pre\.0; it has resid_post\.0"):
        wb.lens(llama, TEXTS, some)
    assert wb.lens(llama, TEXTS, some, layers="0").settings["sites"] == ["resid_post.0", "resid_post.2"]
    with pytest.raises(NotComparable, match="there is none"):
        Lens.of([], "shortcut", some.settings)
    with pytest.raises(UnknownOption, match="Give one of the two"):
        wb.logit_lens(llama, TEXTS, layers="0", sites="resid_mid")
    with pytest.raises(UnknownSite, match="lens_contributions"):
        wb.logit_lens(llama, TEXTS, sites="attn_out")


def test_the_picture_shows_layers_up_to_the_output(llama):
    view = wb.logit_lens(llama, TEXTS)
    heat: Any = view.plot().data[0]
    assert list(heat.y) == ["-1", "0", "1", "2"]
    assert heat.z[-1] == pytest.approx([0.0] * len(heat.x))
    assert heat.customdata[1][2] == (0, 2) or list(heat.customdata[1][2]) == [0, 2]
    strided: Any = view.plot(stride=3).data[0]
    assert list(strided.y) == ["-1", "2"], "a stride keeps the last layer"
