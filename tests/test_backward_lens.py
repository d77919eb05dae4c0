"""The backward lens: words of vectors against dense float64, what a step does against a step, and the paper's claims."""

import logging
import math

import pandas as pd
import pytest
import torch
from conftest import by_trait, tiny_model

import workbench as wb
from workbench.analyses.backward_lens_tables import stream_vectors
from workbench.errors import BadArtifact, MissingWeight, UnknownOption
from workbench.facts import shipped_facts
from workbench.gradients.targets import with_targets

PROMPT, TARGET = "The capital of France is", " Rome"


@pytest.fixture(scope="module")
def rome(smollm) -> wb.BackwardLens:
    return wb.backward_lens(smollm, PROMPT, TARGET)


@by_trait
def test_words_are_those_of_dense_float64(family):
    model = tiny_model(family, check=False)
    found = wb.backward_lens(model, ["hello there world", "one two"], [[7], [9, 11]], k=4)
    gradients, vocabulary = found.gradients, model.vocabulary
    assert gradients is not None
    U, gain = vocabulary.W_U.double(), 1.0 if vocabulary.gain is None else vocabulary.gain.double()
    row, pos = gradients.tokens_at
    seen = 0
    for one in stream_vectors(gradients):
        own = found.table[(found.table["layer"] == one.layer) & (found.table["matrix"] == one.matrix)]
        for i, vector in enumerate(one.rows.double()):
            here = own[(own["row"] == int(row[i])) & (own["pos"] == int(pos[i]))]
            if one.zero[i]:
                assert here.empty, "what is 0 has no words"
                continue
            scores = (gain * vector / vector.norm()) @ U
            for end, sign in (("up", -1), ("down", 1)):
                best = (sign * scores).argsort(stable=True)[:4]
                some = here[here["end"] == end].sort_values("rank")
                assert some["token_id"].tolist() == best.tolist()
                assert some["score"].tolist() == pytest.approx(scores[best].tolist(), rel=1e-4, abs=1e-5)
                seen += 1
    assert seen > 20
    post_normed = any(block.ln2_post for block in model.row.blocks) or any(b.residual_multiplier != 1 for b in model.row.blocks)
    assert ("mlp_out" in set(found.table["matrix"])) == bool(post_normed and any(b.down for b in model.row.blocks))


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "granite"])
def test_behind_a_norm_both_derivatives_are_given(family):
    """The one at the stream is that of a push of the stream itself, by autograd on the site."""
    model = tiny_model(family, check=False)
    found = wb.backward_lens(model, "hello there world", [7])
    wanted = with_targets(model, "hello there world", [7])
    acts = wb.capture(model, wanted.batch, ["resid_post.1", "mlp_out.1"], gradients=True)
    of_stream = acts.gradients(-wanted.log_probabilities(acts.logits[:, wanted.columns]).sum())
    assert found.gradients is not None
    own, at_matrix = found.gradients.stream["mlp_out.1"], found.gradients["W_out.1"].D
    torch.testing.assert_close(own, of_stream["mlp_out.1"][0], rtol=1e-4, atol=1e-6)
    assert float((own - at_matrix).norm()) > 1e-2 * float(own.norm())


def test_the_target_is_what_a_step_writes(rome):
    """Lemma 5.1: at the last block's last token the derivative is the head's way back from p - e_t."""
    last = rome.table[(rome.table["layer"] == 29) & (rome.table["matrix"] == "W_out")]
    written = last[(last["end"] == "down") & (last["rank"] == 0)]
    assert written["token"].tolist() == [" Rome"]
    assert written["score"].abs().item() > rome.settings["null_score"]["one_in_100"]
    assert last[(last["end"] == "up") & (last["rank"] == 0)]["token"].tolist() == [" Paris"], "its own answer is unwritten"
    vectors = rome.vectors[(rome.vectors["layer"] == 29) & (rome.vectors["matrix"] == "W_out")]
    assert vectors["zero"].tolist() == [True] * 4 + [False]
    assert vectors["target_rank"].tolist()[-1] == 49_151, "the lowest of all"
    assert "·Rome was foretold with 0.05%" in str(rome)
    assert "are 0 by construction" in str(rome)


def test_the_papers_mode_drowns_short_derivatives(rome, smollm):
    """The whole norm adds its epsilon to the square of vectors of 1e-3 and less: scores shrink, and so do a layer norm's."""
    paper = wb.backward_lens(smollm, PROMPT, TARGET, layers="29", matrices=["W_out"], paper=True)
    best = paper.table[(paper.table["end"] == "down") & (paper.table["rank"] == 0)]
    assert best["token"].tolist() == [" Rome"]
    model = tiny_model("gpt2", check=False)  # whose norm has a bias
    gradient = wb.backward_lens(model, "hello there", [7], layers="1", matrices=["W_out"]).gradients
    assert gradient is not None
    D = gradient["W_out.1"].D
    vocabulary, nothing = model.vocabulary, torch.zeros(1, model.d_model)
    drowned = vocabulary.project(D[-1:] * 1e-6, decoder="norm", k=5).top_ids
    assert torch.equal(drowned, vocabulary.project(nothing, decoder="norm", k=5).top_ids), "the bias alone speaks"
    own = vocabulary.project(D[-1:], decoder="gain", k=5).top_ids
    assert torch.equal(vocabulary.project(D[-1:] * 1e-6, decoder="gain", k=5).top_ids, own)


def test_gradients_have_the_rank_of_their_tokens(smollm):
    """Lemma 4.1 and the paper's figure: as many as tokens in over 98.5 % of cases, except the last layer, where it is 1."""
    facts = shipped_facts(n=8)
    prompts, objects = [one.prompt for one in facts], [f" {one.object}" for one in facts]
    found = wb.backward_lens(smollm, prompts, objects, matrices=["W_in", "W_out"])
    ranks = found.matrices
    earlier, last = ranks[ranks["layer"] < 29], ranks[ranks["layer"] == 29]
    assert (earlier["rank"] == earlier["tokens"]).mean() > 0.985
    single = found.targets.groupby("row").size() == 1
    assert (last[last["row"].map(single)]["rank"] == 1).all()
    first = wb.backward_lens(smollm, prompts[0], objects[0], layers="4:20", matrices=["W_Q"]).matrices
    assert (first["rank"] == first["tokens"] - 1).mean() > 0.9, "a first token can only look at itself"


def test_neurons_move_as_a_step_moves_them(rome, smollm):
    gradients = rome.gradients
    assert gradients is not None
    step, layer = 1e-3, 12
    batch = gradients.batch
    read = rome.neurons(layer, "W_in", k=5)
    edit = wb.WeightEdit.step(gradients[f"W_in.{layer}"], step)
    before = wb.capture(smollm, batch, [f"mlp_up.{layer}"])[f"mlp_up.{layer}"][0, -1]
    with wb.edit_weights(smollm, edit):
        after = wb.capture(smollm, batch, [f"mlp_up.{layer}"])[f"mlp_up.{layer}"][0, -1]
    moved = (after - before)[read["neuron"].tolist()] / step
    assert moved.tolist() == pytest.approx(read["change"].tolist(), rel=2e-2)
    written = rome.neurons(layer, "W_out", k=3)
    own = gradients[f"W_out.{layer}"]
    for one in written.to_dict("records"):
        by_hand = own.X[-1, one["neuron"]].abs() * own.dense()[one["neuron"]].norm()
        assert one["change"] == pytest.approx(float(by_hand), rel=1e-4)
        assert one["shift"] == pytest.approx(float(own.X[-1, one["neuron"]] ** 2 * own.D[-1].norm()), rel=1e-4)
    assert rome.neurons(layer - 30, "W_out", k=3).equals(written)
    with pytest.raises(UnknownOption, match="there are 1 texts"):
        rome.neurons(layer, row=1)
    with pytest.raises(MissingWeight, match="no gradients of neurons"):
        rome.neurons(layer, "W_Q")


def test_a_step_is_foretold(rome):
    texts = {
        "prompt": [(PROMPT, TARGET), (PROMPT, " Paris")],
        "paraphrases": [("France's capital city is called", TARGET)],
        "neighbours": [("The capital of Germany is", " Berlin"), ("Two plus two is", " four")],
    }
    gradients = rome.gradients
    small = wb.forecast_step(gradients, texts, step=1e-5).table
    assert small["correlation"].min() > 0.999
    assert small["error"].max() < 0.05
    assert small["foretold"].tolist() == pytest.approx(small["measured"].tolist(), rel=0.05, abs=2e-4)
    assert small["influence"].tolist() == pytest.approx(small["foretold"].tolist(), rel=0.1, abs=2e-3), "by another way"
    assert small["measured"][0] > 0.05, "the target gains"
    large = wb.forecast_step(gradients, texts, step=1e-2).table
    assert large["error"].median() > 0.5, "first order ends somewhere"
    one = wb.forecast_step(gradients, texts["prompt"], step=1e-3, layers="20", matrices=["W_out"])
    assert one.settings["matrices_moved"] == 1
    assert one.table["influence"][0] == pytest.approx(1e-3 * gradients["W_out.20"].norm() ** 2, rel=1e-4), "its own square"
    with pytest.raises(MissingWeight, match="the gradients here are of"):
        wb.forecast_step(
            wb.collect_gradients(rome.gradients.model, gradients.batch, lambda z, _: z[0, -1, 7], layers="1"),
            texts,
            step=1.0,
            layers="0",
        )
    with pytest.raises(UnknownOption, match="step=0"):
        wb.forecast_step(gradients, texts, step=0.0)


def test_half_precision_says_that_it_rounds(caplog):
    model = tiny_model("llama", check=False, dtype=torch.bfloat16)
    gradients = wb.backward_lens(model, "hello there", [7]).gradients
    with caplog.at_level(logging.WARNING, logger="workbench"):
        wb.forecast_step(gradients, [("hello there", [7])], step=1e-5)
    assert "is also its rounding" in caplog.text


def test_influence_of_one_text_on_another_is_the_inner_product_of_gradients(llama):
    one = wb.backward_lens(llama, "hello there", [7]).gradients
    other = wb.backward_lens(llama, "one two three", [9]).gradients
    assert one is not None
    assert other is not None
    found = one.influence(other)
    assert set(found) == set(one.matrices)
    for name, value in found.items():
        assert value == pytest.approx(-float((one[name].dense() * other[name].dense()).sum()), rel=1e-3, abs=1e-7)


def test_a_loss_of_ones_own(llama):
    found = wb.backward_lens(llama, "hello there world", loss=lambda logits, batch: logits[:, 0].logsumexp(-1).sum())
    assert found.targets.empty
    assert found.vectors["target_rank"].isna().all()
    late = found.vectors[(found.vectors["pos"] > 0)]
    assert late["zero"].all(), "a loss of the first token reads no later one"
    assert "loss" in str(found)


def test_saved_results_come_back_without_factors(rome, tmp_path):
    again = wb.BackwardLens.load(rome.save(tmp_path / "lens"))
    for name in ("table", "vectors", "matrices", "targets"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(rome, name), check_dtype=False)
    assert again.settings == rome.settings
    assert str(again).splitlines()[1:] == str(rome).splitlines()[1:]
    with pytest.raises(BadArtifact, match="holds no factors"):
        again.neurons(3)


def test_pictures_show_every_matrix_and_leave_out_what_is_zero(rome):
    whole, one = rome.plot(), rome.plot("W_out")
    assert [note.text for note in whole.layout.annotations] == ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"]
    (heat,) = one.data
    assert [math.isnan(z) for z in heat.z[-1]] == [True] * 4 + [False]
    assert heat.text[-1][-1] == "·Rome"
    assert heat.customdata[3][2].tolist() == [3, 2]
    with pytest.raises(UnknownOption, match="there are 1 texts"):
        rome.plot(row=1)


def test_mistakes_are_named(llama):
    with pytest.raises(UnknownOption, match="one of the two"):
        wb.backward_lens(llama, "hello")
    with pytest.raises(UnknownOption, match="k=0"):
        wb.backward_lens(llama, "hello", [3], k=0)
