"""Editing facts: the forward-pass shift against its own arithmetic, and edits of many facts against edits of one."""

import pytest
import torch
from conftest import tiny_model

import workbench as wb
from workbench.analyses.forward_shift import random_like
from workbench.analyses.known_facts import known_facts
from workbench.errors import MissingWeight, TooFewFacts, UnknownOption
from workbench.facts import Fact, Neighbour

PROMPT, TARGET = "The capital of France is", " Rome"


def test_a_shift_adds_what_it_says_to_the_target(smollm):
    """`η |x|² |e|²` to the target's score at the block's output, before the norm."""
    edit = wb.forward_shift(smollm, PROMPT, TARGET, 20, strength=0.5)
    sites = ["mlp_post.20", "mlp_out.20", "resid_post.20"]
    before = wb.capture(smollm, PROMPT, sites, positions="last")
    with wb.edit_weights(smollm, edit):
        after = wb.capture(smollm, PROMPT, sites, positions="last")
    x, e = before["mlp_post.20"][0, 0], smollm.vocabulary.direction(smollm.token_id(TARGET)).detach()
    eta = float(edit.right[0] @ e / (e @ e))
    gained = float((after["resid_post.20"] - before["resid_post.20"])[0, 0] @ e)
    assert gained == pytest.approx(eta * float(x @ x) * float(e @ e), rel=1e-3)
    written = (after["mlp_out.20"] - before["mlp_out.20"])[0, 0].norm()
    assert float(written) == pytest.approx(0.5 * float(before["resid_post.20"].norm()), rel=1e-3)
    by_step = wb.forward_shift(smollm, PROMPT, TARGET, 20, step=eta)
    torch.testing.assert_close(by_step.right, edit.right, rtol=1e-4, atol=1e-7)
    other = random_like(edit, 0)
    assert other.norm() == pytest.approx(edit.norm(), rel=1e-5)
    assert abs(float(torch.cosine_similarity(other.right, edit.right))) < 0.2


@pytest.mark.parametrize("family", ["llama", "granite", "olmo2", "gemma2", "gpt2"])
def test_strength_is_the_length_that_reaches_the_stream(family):
    """Behind a norm: the length of what the matrix writes, relative to what it gives."""
    model = tiny_model(family, check=False)
    edit = wb.forward_shift(model, "hello there", [7], 1, strength=0.5)
    own = model.row.path(model.row.block(1).down.path, 1)

    def seen():
        acts = wb.capture(model, "hello there", ["resid_post.1", "mlp_out.1"], modules=[own], positions="last")
        return acts["resid_post.1"][0, 0], acts["mlp_out.1"][0, 0], acts[own].reshape(-1, model.d_model)[-1]

    h, out, given = seen()
    with wb.edit_weights(model, edit):
        _, moved, given_then = seen()
    if model.row.block(1).ln2_post is None:
        assert float((moved - out).norm()) == pytest.approx(0.5 * float(h.norm()), rel=1e-4)
    else:
        assert float((given_then - given).norm()) == pytest.approx(0.5 * float(given.norm()), rel=1e-4)


def test_the_capital_moves_and_comes_back(smollm):
    def said() -> str:
        return str(smollm.generate(PROMPT, max_new_tokens=1))

    before = said()
    assert before.endswith(" Paris")
    with wb.edit_weights(smollm, wb.forward_shift(smollm, PROMPT, TARGET, 20, strength=1.0)):
        assert said().endswith(" Rome")
    assert said() == before


def test_where_there_is_no_such_matrix_it_is_said(llama):
    with pytest.raises(MissingWeight, match="mixture of 4 experts"):
        wb.forward_shift(tiny_model("mixtral", check=False), "hello", [3], 1, strength=1.0)
    with pytest.raises(UnknownOption, match="one of the two"):
        wb.forward_shift(llama, "hello", [3], 1)


@pytest.fixture(scope="module")
def two(smollm) -> wb.FactEdits:
    facts = [one for one in wb.shipped_facts(["capital"]) if one.subject in ("France", "Germany", "Spain")]
    return wb.edit_facts(smollm, facts, layers="20,29", strengths=(0.3, 1.0), progress=False)


def test_facts_are_edited_and_the_null_edits_none(two):
    best = two.by_setting().set_index(["layer", "strength", "method"])
    assert best.loc[(20, 1.0, "shift"), "efficacy"] > 0.5
    assert best.loc[(20, 1.0, "random"), "efficacy"] == 0.0
    norms = two.table.groupby(["fact", "layer", "strength"])["norm"].agg(lambda some: some.max() / some.min())
    assert norms.max() == pytest.approx(1.0, rel=1e-4), "all three ways are as long"
    gains = two.table[two.table["method"] != "random"].groupby("method")["target_log_probability"].mean()
    assert gains.min() > two.table[two.table["method"] == "random"]["target_log_probability"].mean()


def test_many_at_once_are_as_one_alone(two, smollm):
    """The same numbers by `forward_shift`, `edit_weights` and a pass of one text."""
    one = two.table[(two.table["method"] == "shift") & (two.table["layer"] == 20) & (two.table["strength"] == 0.3)].iloc[0]
    fact = next(own for own in wb.shipped_facts(["capital"]) if own.id == one["fact"])
    edit = wb.forward_shift(smollm, fact.prompt, f" {fact.false_object}", 20, strength=0.3)
    assert edit.norm() == pytest.approx(one["norm"], rel=1e-4)
    by_step = wb.forward_shift(smollm, fact.prompt, f" {fact.false_object}", 20, step=one["step"])
    torch.testing.assert_close(by_step.right, edit.right, rtol=1e-4, atol=1e-7)
    target = smollm.token_ids([f"{fact.prompt} {fact.false_object}"])[0][len(smollm.token_ids([fact.prompt])[0])]
    with torch.no_grad(), wb.edit_weights(smollm, edit):
        logits = [smollm.forward(smollm.tokenize(text))[0, -1] for text in (fact.prompt, *fact.paraphrases)]
    assert float(logits[0].log_softmax(-1)[target]) == pytest.approx(one["target_log_probability"], abs=1e-3)
    said = [int(own.argmax()) == target for own in logits]
    assert one["efficacy"] == said[0]
    assert one["paraphrase"] == pytest.approx(sum(said[1:]) / 3)


def test_a_fact_is_known_if_all_its_tokens_are_the_likeliest(smollm):
    right, wrong = (
        Fact("capital/x", "capital", "France", answer, "Oslo", PROMPT, ("a", "b", "c"), neighbours)
        for answer, neighbours in (
            ("Paris", (Neighbour("The capital of Germany is", "Berlin"), Neighbour("The capital of Germany is", "Bonn"))),
            ("Paris Hilton", ()),
        )
    )  # fmt: skip
    (found,) = known_facts(smollm, [right, wrong], progress=False)
    assert found.fact is right
    assert [one.object for one in found.neighbours] == ["Berlin"]


def test_results_come_back_and_show_themselves(two, tmp_path):
    again = wb.FactEdits.load(two.save(tmp_path / "edits"))
    assert again.table.equals(two.table)
    assert str(again) == str(two)
    assert "measured on the rest" in str(two)
    figure = two.plot()
    assert len(figure.data) == 3 * 3 * 2
    shift = next(line for line in figure.data if line.name == "forward-pass shift")
    assert list(shift.x) == [20, 29]


def test_mistakes_are_named(llama, smollm):
    facts = wb.shipped_facts(["capital"], 4)
    with pytest.raises(TooFewFacts, match="knows 0 of 4 facts"):
        wb.edit_facts(llama, facts, progress=False)
    with pytest.raises(UnknownOption, match="methods are shift, step, random"):
        wb.edit_facts(smollm, facts, methods=["rome"])
    with pytest.raises(UnknownOption, match="at least two facts"):
        wb.edit_facts(smollm, facts, n=1)
    with pytest.raises(MissingWeight, match="mixture of 4 experts"):
        wb.edit_facts(tiny_model("qwen2_moe", check=False), facts)
    with pytest.raises(UnknownOption, match="strengths are above 0"):
        wb.edit_facts(smollm, facts, strengths=[0.0])
