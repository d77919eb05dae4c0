"""Families without a row: guessed where the self-check confirms it, else refused with what was guessed; and wrappers."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import _unchanged
from families import FAMILIES, LAYERS, randomised, tiny_hf, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

import workbench as wb
from workbench.architectures import families
from workbench.architectures.cuts import Grouped
from workbench.architectures.row import Part, as_source
from workbench.checks.still import sites_of
from workbench.errors import UnknownArchitecture

NOT_GUESSED = {
    "bloom", "deepseek_v3", "deepseek_v3 full queries", "falcon 7b", "falcon 40b", "falcon 11b", "falcon rw", "gpt_oss",
    "llama4_text", "olmo clipped", "opt",
}  # fmt: skip
"""Families with a peculiarity that no guess covers. They must be refused without their row."""
SAME_TREE = {
    "cohere2", "exaone4", "falcon 11b", "gemma3_text softcap", "helium", "llama biases", "llama tied", "llama wide heads",
    "ministral", "ministral3", "mistral", "olmo3", "qwen2", "seed_oss", "smollm3",
}  # fmt: skip
"""Families whose modules are named as those of another: guessed in the same way, which only `make test-all` tries again."""


def load_without_row(family, monkeypatch):
    monkeypatch.delitem(families.ROWS, FAMILIES[family][0])
    return wb.load(tiny_hf(family), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in SAME_TREE else name for name in sorted(FAMILIES)]
)
def test_a_guess_is_what_the_row_says_or_is_refused(family, tiny, monkeypatch):
    if family in NOT_GUESSED:
        with pytest.raises(UnknownArchitecture, match=r"has no row in workbench/architectures/families\.py"):
            load_without_row(family, monkeypatch)
        return
    guessed = load_without_row(family, monkeypatch)
    sites = [str(site) for site in sites_of(tiny)]
    assert [str(site) for site in sites_of(guessed)] == sites
    batch = tiny.tokenize("a dog and a cat")
    expected, found = wb.capture(tiny, batch, sites), wb.capture(guessed, batch, sites)
    for site in sites:
        assert torch.equal(found[site], expected[site]), site
    assert guessed.row.logit_scale == tiny.row.logit_scale
    assert guessed.row.embed_scale == tiny.row.embed_scale


def test_what_is_left_to_the_slow_suite_has_the_tree_of_another():
    trees = {family: frozenset(dict(_unchanged(family).hf.named_modules())) for family in FAMILIES}
    tried = {tree for family, tree in trees.items() if family not in SAME_TREE}
    assert {trees[family] for family in SAME_TREE} <= tried


def test_a_refusal_shows_what_fails_and_a_row_that_can_be_pasted(monkeypatch):
    with pytest.raises(UnknownArchitecture) as refused:
        load_without_row("bloom", monkeypatch)
    text = str(refused.value)
    assert "'resid_pre + attn_out = resid_mid': off by 1.0e+00" in text
    found = re.search(r"'bloom': (Architecture\(.*\)),$", text)
    assert found is not None
    pasted = eval(found[1], vars(families))
    assert pasted.backbone == "transformer"
    # Mended where it fails, and then where the whole self-check fails (its heads are grouped), it is a row that holds.
    fused = {name: Part("self_attention.query_key_value", Grouped(name)) for name in "qkv"}
    block = replace(pasted.blocks[0], attn="self_attention.dense", mlp="mlp.dense_4h_to_h", **fused)
    mended = replace(pasted, blocks=(block,))
    monkeypatch.setitem(families.ROWS, "bloom", mended)
    wb.load(tiny_hf("bloom"), tokenizer=tiny_tokenizer()).verify().require()


def test_a_row_prints_as_source_that_makes_it(tiny):
    if tiny.row.model_type in ("gpt_oss", "llama4_text"):  # they hold functions of their own
        assert "_clamped_swish" in as_source(tiny.row) or "_all_experts" in as_source(tiny.row)
    assert eval(as_source(tiny.row), vars(families)) == tiny.row


@pytest.mark.parametrize("kind", ["biogpt", "xglm", "olmoe", "ernie4_5"])
def test_families_that_have_no_row_are_guessed(kind):
    """Published families for which nobody wrote a row."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {"xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}}
    config = AutoConfig.for_model(kind, pad_token_id=0, **(sizes | names.get(kind, {})))
    torch.manual_seed(0)
    model = wb.load(randomised(AutoModelForCausalLM.from_config(config)), tokenizer=tiny_tokenizer())
    assert model.n_layers == 2
    assert eval(as_source(model.row), vars(families)) == model.row


def test_a_model_that_looks_ahead_is_refused(monkeypatch):
    """With its row by name; without it, because a later token moves earlier logits: every other identity holds."""
    name, config = FAMILIES["gemma3_text"]
    monkeypatch.setitem(FAMILIES, "looks ahead", (name, config | {"use_bidirectional_attention": True}))
    with pytest.raises(UnknownArchitecture, match="This gemma3_text looks ahead"):
        wb.load(tiny_hf("looks ahead"), tokenizer=tiny_tokenizer())
    with pytest.raises(UnknownArchitecture, match="'a later token moves no earlier logit': off by"):
        load_without_row("looks ahead", monkeypatch)


def test_an_encoder_is_refused():
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model("bert", num_hidden_layers=LAYERS, is_decoder=False, **sizes)
    with pytest.raises(UnknownArchitecture, match="the MLP's projections cannot be told"):
        wb.load(randomised(AutoModelForCausalLM.from_config(config)), tokenizer=tiny_tokenizer())


def test_an_encoder_decoder_is_refused_by_name():
    config = AutoConfig.for_model("t5", vocab_size=300, d_model=32, num_layers=2, num_heads=4, d_ff=48)
    with pytest.raises(UnknownArchitecture, match=r"'t5' is an encoder-decoder: its decoder reads an encoder's states"):
        wb.load(AutoModelForSeq2SeqLM.from_config(config), tokenizer=tiny_tokenizer())


def test_variants_that_no_name_would_fit_are_refused():
    from conftest import tiny_model

    for family, option, text in (
        ("opt", {"do_layer_norm_before": False}, "norms the stream itself after each addition"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "adds to the normed stream"),
    ):
        name, config = FAMILIES[family]
        FAMILIES["variant"] = (name, config | option)
        try:
            with pytest.raises(UnknownArchitecture, match=text):
                tiny_model("variant")
        finally:
            del FAMILIES["variant"]


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_TEXT = FAMILIES["llama"][1]
WRAPPERS = {
    "gemma3": {"text_config": FAMILIES["gemma3_text"][1], "vision_config": VISION, "mm_tokens_per_image": 4},
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": 299,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral", "head_dim": 8},
        "vision_config": VISION | {"model_type": "pixtral"},
        "image_token_index": 299,
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
        "image_token_id": 299,
    },
}


@pytest.mark.parametrize("kind", sorted(WRAPPERS))
def test_a_vision_language_model_works_through_its_text_decoder(kind):
    torch.manual_seed(0)
    hf = randomised(AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **WRAPPERS[kind])))
    model = wb.load(hf, tokenizer=tiny_tokenizer())
    assert "language_model" in model.row.backbone
    model.verify().require()
    batch = model.tokenize("a dog")
    with torch.no_grad():
        states = hf(input_ids=batch.tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(wb.capture(model, batch, "resid_post.1")["resid_post.1"], states[2])


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_a_vision_language_model_loads_from_its_folder(kind, tmp_path):
    """Gemma 3 stands among transformers' causal models, LLaVA only among those that read images."""
    hf = randomised(AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **WRAPPERS[kind])))
    hf.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = wb.load(tmp_path)
    assert model.n_layers == LAYERS
    assert wb.map_neurons(model, k=2, progress=False).table["layer"].nunique() == LAYERS
    assert torch.equal(wb.load(tmp_path, stream=True).weight("W_in", 1), model.weight("W_in", 1))
