"""The self-check passes on every family, and catches rows that lie."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from families import tiny_hf, tiny_tokenizer
from torch import nn

import workbench as wb
from workbench.architectures import Part
from workbench.errors import VerificationFailed
from workbench.verification import TOLERANCE, verify_briefly


def test_every_identity_holds(tiny):
    found = tiny.verify()
    assert found.passed, str(found)
    # Each identity at each layer: nothing was left out.
    per_layer = found.table[found.table["layer"].notna()].groupby("identity").size()
    assert (per_layer.drop("resid_post = next resid_pre") == tiny.n_layers).all()


def test_every_identity_holds_in_bfloat16(family):
    found = tiny_model(family, dtype=torch.bfloat16).verify()
    assert found.passed, str(found)


def test_the_real_model_verifies(smollm):
    assert smollm.verify().passed


def test_the_table_of_the_probe_says_what_was_checked(llama):
    found = llama.verify()
    assert list(found.table.columns) == ["identity", "layer", "error", "tolerance", "passed"]
    assert (found.table["tolerance"] == TOLERANCE[torch.float32]).all()
    assert "all identities hold" in str(found)
    assert found.settings["family"] == "llama"


def broken(family: str, **changes) -> wb.LanguageModel:
    """A model whose row lies."""
    model = tiny_model(family)
    return replace(model, row=replace(model.row, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "identity"),
    [
        ("llama", {"ln1": "post_attention_layernorm"}, "ln1(resid_pre) W_Q = q"),
        ("llama", {"ln2": "input_layernorm"}, "resid_pre + attn_out = resid_mid"),
        ("llama", {"up": Part("mlp.gate_proj"), "gate": Part("mlp.up_proj")}, "act(mlp_pre) mlp_up = mlp_post"),
        ("gemma2", {"softcap": None}, "unembedding the last resid_post = logits"),
        ("gemma2", {"softcap": 6.0}, "unembedding the last resid_post = logits"),
        ("gemma2", {"ln1_post": None}, "resid_pre + attn_out = resid_mid"),
        ("gemma2", {"ln2_post": None}, "resid_mid + mlp_out = resid_post"),
        ("gpt_neox", {"parallel": False}, "resid_pre + attn_out = resid_mid"),
        ("gpt_neox sequential", {"parallel": True}, "ln2(stream) W_in = mlp_pre"),
        ("gpt2", {"ln_final": "transformer.h.0.ln_1"}, "ln_final(last resid_post) = ln_final"),
    ],
)
def test_a_row_that_lies_is_caught(family, changes, identity):
    found = verify_briefly(broken(family, **changes))
    failed = found.table.loc[~found.table["passed"], "identity"]
    assert identity in set(failed)
    with pytest.raises(VerificationFailed, match=r"does not behave as its family .* promises: .* is off by"):
        found.require()


def test_a_norm_gain_without_its_offset_is_caught():
    failed = verify_briefly(broken("gemma2", norm_gain_offset=0.0)).table.query("not passed")["identity"]
    assert set(failed) == {f"{name}.w is the gain of {name}" for name in ("ln1", "ln2", "ln_final")}


def test_a_failure_of_the_whole_model_names_no_layer():
    with pytest.raises(VerificationFailed, match=r"'unembedding the last resid_post = logits' is off by \S+ \(tolerance"):
        verify_briefly(broken("gemma2", softcap=None)).require()


def test_a_model_whose_code_was_changed_is_refused():
    class Louder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.down_proj, self.up_proj, self.gate_proj, self.act_fn = (
                inner.down_proj,
                inner.up_proj,
                inner.gate_proj,
                inner.act_fn,
            )

        def forward(self, x):
            return 1.5 * self.inner(x)

    hf = tiny_hf("llama")
    hf.model.layers[1].mlp = Louder(hf.model.layers[1].mlp)
    with pytest.raises(VerificationFailed, match=r"'mlp_post W_out = mlp_out' is off by .* at layer 1 .*pass check=False"):
        wb.load(hf, tokenizer=tiny_tokenizer())
    assert not wb.load(hf, tokenizer=tiny_tokenizer(), check=False).verify().passed


def test_absolute_positions_that_count_the_padding_are_caught(monkeypatch):
    model = tiny_model("gpt2")
    hf_forward = model.hf.forward

    def without_positions(input_ids, attention_mask, use_cache):
        return hf_forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model.hf, "forward", without_positions)
    failed = model.verify().table.query("not passed")["identity"]
    assert set(failed) == {"a left-padded batch = its single rows"}


def test_verifying_leaves_no_hook_behind(llama):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.hf.modules())

    before = hooks()
    llama.verify()
    assert hooks() == before
