"""Edits of weights: added beside them is as added to them; foretold to first order, and written to a folder."""

import logging
import re

import pytest
import torch
from conftest import by_trait, tiny_model
from families import tiny_tokenizer
from transformers.pytorch_utils import Conv1D

import workbench as wb
from workbench.errors import CannotWrite, LengthMismatch, MissingWeight, UnreadableWeight
from workbench.gradients.matrices import matrices_of
from workbench.tracer import is_edited
from workbench.weight_edits import first_order


def random_edit(model: wb.LanguageModel, name: str, rank: int = 2) -> wb.WeightEdit:
    one = next(one for one in matrices_of(model) if one.name == name)
    module = model.module(one.path)
    shape = module.weight.shape if isinstance(module, Conv1D) else module.weight.T.shape
    d_out = shape[1]
    if one.part is not None:
        d_out = one.part.cut.take(torch.zeros(1, d_out), model.heads).numel()
    generator = torch.Generator().manual_seed(len(name))
    return wb.WeightEdit(
        name, *(torch.randn(rank, d, generator=generator, dtype=torch.float32) / 10 for d in (shape[0], d_out))
    )


def written(model: wb.LanguageModel, edit: wb.WeightEdit) -> None:
    """The edit made in the weights themselves, by the dense matrix, through the part's own view of them."""
    one = next(one for one in matrices_of(model) if one.name == edit.name)
    module = model.module(one.path)
    weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.T
    change = (edit.left.T @ edit.right).to(weight)
    if one.part is None:
        weight += change
    else:
        own = one.part.cut.take(weight, model.heads)
        one.part.cut.put(weight, model.heads, own + change.view(own.shape))


@by_trait
def test_beside_the_weights_is_as_in_them(family):
    model = tiny_model(family, check=False)
    batch = model.tokenize(["hello there world", "one two"])
    names = [one.name for one in matrices_of(model, "1") if not one.name.startswith("W_router")]
    before = model.forward(batch)
    edits = [random_edit(model, name) for name in names]
    with torch.no_grad():
        for edit in edits:
            with wb.edit_weights(model, edit):
                assert not torch.equal(model.forward(batch), before), edit.name
        with wb.edit_weights(model, *edits):
            beside = model.forward(batch)
        assert torch.equal(model.forward(batch), before), "nothing stays"
        for edit in edits:
            written(model, edit)
        inside = model.forward(batch)
    real = batch.mask
    assert float((beside - inside)[real].norm()) < 1e-5 * float(inside[real].norm())


@by_trait
def test_first_order_is_what_a_small_step_does(family):
    """Against the difference quotient of the dense model, and against autograd: the derivative along the edit is the inner
    product of gradient and edit."""
    model = tiny_model(family, check=False)
    batch = model.tokenize(["hello there world"])
    columns = torch.tensor([batch.tokens.shape[1] - 1])
    names = [one.name for one in matrices_of(model, "0") if not one.name.startswith("W_router")]
    edits = [random_edit(model, name) for name in names]
    found = first_order(model, batch, columns, edits)
    with torch.no_grad():
        small = 1e-2
        with wb.edit_weights(model, *(edit.times(small) for edit in edits)):
            up = model.forward(batch, columns)
        with wb.edit_weights(model, *(edit.times(-small) for edit in edits)):
            down = model.forward(batch, columns)
    quotient = (up - down) / (2 * small)
    assert float((found.change - quotient).norm()) < 2e-2 * float(quotient.norm()), "to the third order of the step"
    gradients = wb.collect_gradients(model, batch, lambda logits, _: logits[0, 0, 7], columns=columns, layers="0")
    along = sum(float((edit.left @ gradients[edit.name].dense() * edit.right).sum()) for edit in edits)
    assert float(found.change[0, 0, 7]) == pytest.approx(along, rel=1e-3, abs=1e-5)


def test_one_pass_tries_many_edits(llama):
    batch = llama.tokenize(["hello there", "one two", "three four"])
    edits = [random_edit(llama, "W_out.0"), random_edit(llama, "W_Q.1"), random_edit(llama, "W_out.0", 3)]
    acts_on = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()
    with torch.no_grad():
        with wb.edit_weights(llama, *edits, acts_on=acts_on):
            together = llama.forward(batch)
        for row, own in enumerate(acts_on):
            chosen = [edit for edit, acts in zip(edits, own, strict=True) if acts]
            with wb.edit_weights(llama, *chosen):
                alone = llama.forward(batch)
            torch.testing.assert_close(together[row], alone[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama tied", "gpt2", "phi3"])
def test_a_saved_copy_is_the_edited_model(family, tmp_path):
    model = tiny_model(family, check=False)
    before = {name: weight.clone() for name, weight in model.hf.named_parameters()}
    edits = [random_edit(model, "W_out.0"), random_edit(model, "W_Q.2")]
    folder = wb.save_edited(model, tmp_path / "edited", *edits)
    assert all(torch.equal(weight, before[name]) for name, weight in model.hf.named_parameters())
    batch = model.tokenize("hello there world")
    copy = wb.load(folder, tokenizer=tiny_tokenizer())
    with torch.no_grad(), wb.edit_weights(model, *edits):
        expected = model.forward(batch)
    torch.testing.assert_close(copy.forward(batch), expected, rtol=1e-4, atol=1e-5)
    assert copy.is_tied == model.is_tied
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_written_is_named(llama, tmp_path, caplog, monkeypatch):
    edit = random_edit(llama, "W_out.0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(CannotWrite, match="is not empty"):
        wb.save_edited(llama, tmp_path / "full", edit)
    with pytest.raises(MissingWeight, match=r"no matrix 'W_out\.9'"):
        wb.save_edited(llama, tmp_path / "new", wb.WeightEdit("W_out.9", edit.left, edit.right))

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(llama.hf), "save_pretrained", refuse)
    with pytest.raises(CannotWrite, match="No space left"):
        wb.save_edited(llama, tmp_path / "new", edit)
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".new*"))
    monkeypatch.undo()
    half = tiny_model("llama", check=False, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="workbench"):
        wb.save_edited(half, tmp_path / "half", edit.times(1e-3))
    lost = int(re.search(r"(\d+) % of the edit was rounded away in torch.bfloat16", caplog.text)[1])
    assert lost > 50
    with pytest.raises(CannotWrite, match="or no folder"):
        wb.save_edited(llama, tmp_path / "full" / "file", edit)


def test_an_edited_model_is_known_to_be_edited(llama):
    edit = random_edit(llama, "W_O.1")
    batch = llama.tokenize("hello there")
    assert not is_edited(llama)
    with wb.edit_weights(llama, edit):
        assert is_edited(llama)
        with pytest.raises(UnreadableWeight, match="would not add up"):
            wb.capture(llama, batch, ["result.1"])
        wb.capture(llama, batch, ["result.0", "attn_out.1"])
    with pytest.raises(LengthMismatch, match=r"give \[texts, 1\]"), wb.edit_weights(llama, edit, acts_on=torch.ones(1, 2) > 0):
        pass
    with wb.edit_weights(llama, edit, acts_on=torch.ones(2, 1) > 0), pytest.raises(LengthMismatch, match="has 2 texts"):
        llama.forward(batch)


def test_routers_are_left_alone():
    model = tiny_model("mixtral", check=False)
    gradients = wb.collect_gradients(model, model.tokenize("hello there"), lambda z, _: -z[0, -1].log_softmax(-1)[7])
    with (
        pytest.raises(MissingWeight, match="chooses its experts inside"),
        wb.edit_weights(model, wb.WeightEdit.step(gradients["W_router.0"], 1.0)),
    ):
        pass
    found = wb.forecast_step(gradients, [("hello there", [7])], step=1e-4)
    assert found.table["measured"][0] > 0
    assert found.table["influence"][0] == pytest.approx(found.table["measured"][0], rel=0.2)
