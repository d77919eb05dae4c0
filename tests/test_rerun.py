"""Runs that begin at a layer, against runs of the whole model; blocks that are left out must not run."""

from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from conftest import tiny_model
from families import FAMILIES, LAYERS, randomised, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import workbench as wb
from workbench.analyses import activation_patching, rerun
from workbench.analyses.held_out_loss import held_out_rows, losses
from workbench.analyses.rerun import Rerun
from workbench.errors import LayerOutOfRange, LengthMismatch
from workbench.tracer import is_edited, starting_at

TEXTS = [
    "a dog and a cat and a frog. " * 3,
    "the bird sings in the tree. " * 3,
    "one two three four. " * 3,
    "no more of that. " * 4,
]


@torch.no_grad()
def test_a_run_from_a_layer_on_ends_where_the_whole_run_does(tiny):
    batch = tiny.tokenize(["a dog and", "a cat"])
    whole = tiny.forward(batch)
    acts = wb.capture(tiny, batch, "resid_pre")
    for layer in range(LAYERS):
        with starting_at(tiny, layer, acts[f"resid_pre.{layer}"]):
            found = tiny.forward(batch)
        torch.testing.assert_close(found[batch.mask], whole[batch.mask], rtol=0, atol=0)
    again = wb.capture(tiny, batch, "resid_pre")
    for name, stream in acts.items():  # what was handed on was a copy
        torch.testing.assert_close(stream, again[name], rtol=0, atol=0)
    assert not is_edited(tiny)
    torch.testing.assert_close(tiny.forward(batch), whole, rtol=0, atol=0)


@torch.no_grad()
def test_blocks_before_it_are_not_run():
    model = tiny_model("llama", check=False)
    batch = model.tokenize("a dog and a cat")
    whole, stream = model.forward(batch), wb.capture(model, batch, "resid_pre.2")["resid_pre.2"]
    for weight in model.block(1).parameters():
        weight.fill_(torch.nan)
    with starting_at(model, 2, stream):
        found = model.forward(batch)
    torch.testing.assert_close(found, whole, rtol=0, atol=0)
    assert not model.forward(batch).isfinite().all()


def test_a_run_that_fails_leaves_the_model_as_it_was(llama):
    batch = llama.tokenize("a dog")
    before = wb.capture(llama, batch, "resid_pre.2", logits=True)
    with pytest.raises(ZeroDivisionError), starting_at(llama, 2, before["resid_pre.2"] * 0):
        raise ZeroDivisionError
    with torch.no_grad():
        torch.testing.assert_close(llama.forward(batch), before.logits, rtol=0, atol=0)


@torch.no_grad()
def test_a_stream_of_another_batch_is_refused(llama):
    stream = wb.capture(llama, "a dog", "resid_pre.2")["resid_pre.2"]
    with (
        pytest.raises(LengthMismatch, match=r"stream of \[1, 5, 32\].*for a batch of \[1, 3, 32\]"),
        starting_at(llama, 2, stream),
    ):
        llama.forward(llama.tokenize("cat"))
    with pytest.raises(LayerOutOfRange, match="Layer 3 is not in"), starting_at(llama, 3, stream):
        pass


def test_losses_do_not_depend_on_where_their_runs_begin(llama):
    """In any order of layers: the stream is moved on, or begun again."""
    rows = held_out_rows(wb.Corpus(TEXTS), llama, 200)
    texts, edits = Rerun(llama, rows, 64), {layer: wb.ablate(f"mlp_out.{layer}") for layer in range(LAYERS)}
    assert len(texts.batches) > 1
    clean = losses(texts, nullcontext())
    for layer in (1, 2, 0, 2, 1):
        whole = losses(Rerun(llama, rows, 64), wb.intervene(llama, edits[layer]))
        found = losses(texts, wb.intervene(llama, edits[layer]), since=layer)
        assert found.nats == pytest.approx(whole.nats, abs=1e-6)
        assert abs(found.change(clean)[0]) > 1e-4


def test_a_model_that_is_edited_already_is_run_from_the_beginning(llama):
    rows = held_out_rows(wb.Corpus(TEXTS), llama, 200)
    early, late = wb.ablate("mlp_out.0"), wb.ablate("mlp_out.2")
    texts = Rerun(llama, rows, None)
    losses(texts, wb.intervene(llama, late), since=2)  # its streams are those of the model as it is
    with wb.intervene(llama, early):
        found = losses(texts, wb.intervene(llama, late), since=2)
    both = losses(Rerun(llama, rows, None), wb.intervene(llama, early, late))
    assert found.nats == pytest.approx(both.nats, abs=1e-6)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_of_the_callers_own_is_heard_once(llama, hook):
    """On the block that is left out, or on the first that is run, before what is kept of it."""
    rows = held_out_rows(wb.Corpus(TEXTS), llama, 200)
    texts, block = Rerun(llama, rows, None), llama.block(1 if hook == "register_forward_hook" else 2)

    def tripled(module, args, *output):
        return output[0] * 3 if output else (args[0] * 3, *args[1:])

    handle = getattr(block, hook)(tripled)
    try:
        found = losses(texts, wb.intervene(llama, wb.ablate("mlp_out.2")), since=2)
        same = wb.activation_patching(
            llama, "a dog", "a cog", 5, 9, sites="resid_pre", layers="2", positions=[0], progress=False
        )
    finally:
        handle.remove()
    with wb.intervene(llama, wb.scale("resid_post.1", 3.0)):
        whole = losses(texts, wb.intervene(llama, wb.ablate("mlp_out.2")))
    assert found.nats == pytest.approx(whole.nats, abs=1e-5)
    assert same.table["restored"].to_numpy() == pytest.approx(0, abs=1e-4)  # the prompts are the same up to there


def test_patching_an_edited_model_patches_the_edited_one(llama):
    common = {"target": 5, "versus": 9, "sites": "mlp_out", "layers": "2", "progress": False}
    edit = wb.scale("resid_post.1", 3.0)  # made twice, if a run began at layer 2
    with wb.intervene(llama, edit):
        found = wb.activation_patching(llama, "a dog", "a cog", **common)
        acts = wb.capture(llama, "a dog", "mlp_out.2")
        for row in found.table.to_dict("records"):
            with wb.intervene(llama, wb.patch("mlp_out.2", acts, positions=row["pos"])), torch.no_grad():
                logits = llama.forward(llama.tokenize("a cog"))[0, -1]
            assert row["logit_difference"] == pytest.approx(float(logits[5] - logits[9]), abs=1e-4)


def test_what_is_measured_does_not_depend_on_where_runs_begin(monkeypatch):
    """Every analysis that runs a model from a layer on, beside the same with whole runs."""
    config = AutoConfig.for_model("llama", pad_token_id=0, **(FAMILIES["llama"][1] | {"num_hidden_layers": 5}))
    torch.manual_seed(0)
    model = wb.load(randomised(AutoModelForCausalLM.from_config(config)), tokenizer=tiny_tokenizer())
    corpus, quiet = wb.Corpus(TEXTS * 3), {"progress": False}
    begun: list[int] = []

    def noted(model, layer, stream):
        begun.append(layer)
        return starting_at(model, layer, stream)

    monkeypatch.setattr(rerun, "starting_at", noted)
    monkeypatch.setattr(activation_patching, "starting_at", noted)

    def measured():
        for measure in (
            lambda: wb.linearity(model, corpus, parts=["block"], loss_tokens=100, together=2, **quiet).damage,
            lambda: wb.transport(model, corpus, ["3>4", "1>3"], damage=100, weigh=[], closely=False, **quiet).damage,
            lambda: wb.shortcuts(model, corpus, modes=["mlp"], loss_tokens=100, **quiet).table,
            lambda: wb.activation_patching(model, "a dog", "a cog", 5, 9, **quiet).table,
        ):
            begun.clear()
            yield measure(), max(begun, default=0)

    found = list(measured())
    assert [deepest for _, deepest in found] == [4, 2, 4, 4]
    since = Rerun.since
    monkeypatch.setattr(Rerun, "since", lambda self, layer: since(self, 0))
    monkeypatch.setattr(activation_patching, "_streams", lambda *_: {})
    for (own, _), (whole, deepest) in zip(found, list(measured()), strict=True):
        assert deepest == 0
        pd.testing.assert_frame_equal(own, whole, rtol=1e-4, atol=2e-6)
