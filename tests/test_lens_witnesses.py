"""Lenses beside TransformerLens's: states read by the final norm and head of its bridge, and its own Jacobian fit."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from families import tiny_hf, tiny_tokenizer
from test_lens import TEXTS

import workbench as wb

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2")
"""Whose logits the bridge has as Hugging Face has them (`WITNESSES.md`)."""


def bridge_of(family, folder):
    pytest.importorskip("transformer_lens", reason="make test-all installs the witnesses")
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    tiny_tokenizer().save_pretrained(folder)  # the bridge reads the tokenizer's files again
    hf = tiny_hf(family)
    hf.config.architectures = [type(hf).__name__]
    return TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_lens_is_the_bridges_norm_and_head_of_every_state(family, tmp_path):
    bridge, model = bridge_of(family, tmp_path), tiny_model(family, check=False)
    view = wb.logit_lens(model, TEXTS[0], k=model.d_vocab)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(model.tokenize(TEXTS[0]).tokens)
        for layer in (-1, *range(model.n_layers)):
            name = "blocks.0.hook_resid_pre" if layer < 0 else f"blocks.{layer}.hook_resid_post"
            theirs = bridge.unembed(bridge.ln_final(cache[name]))[0]
            if cap := model.vocabulary.softcap:  # the bridge's own head is without it, its logits are not
                theirs = cap * torch.tanh(theirs / cap)
            if layer == model.n_layers - 1:
                torch.testing.assert_close(theirs, logits[0], rtol=1e-5, atol=1e-5)
            own = view.table[view.table["layer"] == layer].sort_values(["pos", "token_id"])
            np.testing.assert_allclose(
                own["logit"].to_numpy().reshape(theirs.shape), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max())
            )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_jacobian_lens_is_the_one_that_transformer_lens_fits(family, tmp_path):
    bridge, model = bridge_of(family, tmp_path), tiny_model(family, check=False)
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    theirs = JacobianLens.fit(bridge, TEXTS, corpus="two lines", skip_first_positions=3, max_seq_len=40, show_progress=False)
    ours = wb.fit_jacobian(model, wb.Corpus(TEXTS, length=40, bos="document"), skip=3, progress=False)
    for layer in theirs.source_layers:
        own = ours.maps[f"resid_post.{layer}"].left.T.float()
        torch.testing.assert_close(own, theirs.jacobians[layer], rtol=1e-3, atol=1e-5 * float(own.abs().max()))
