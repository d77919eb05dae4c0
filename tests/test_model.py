import pytest
import torch
from conftest import tiny_model
from families import FAMILIES, LAYERS, tiny_hf

from workbench.errors import LayerOutOfRange, MissingWeight, UnknownSite, UnreadableWeight, WorkbenchError
from workbench.model import WEIGHTS
from workbench.sites import Site

WHOLE = ("W_E", "W_U", "b_U", "ln_final.w")


def test_dimensions_are_those_of_the_config(tiny, family):
    options = FAMILIES[family][1]
    assert tiny.n_layers == LAYERS
    assert tiny.d_model == 32
    assert tiny.d_mlp == {"bloom": 128, "granitemoe": 48}.get(family, 48)  # BLOOM's is four times d_model
    assert tiny.n_heads == 4
    assert tiny.d_vocab == 300
    if "kv_lora_rank" in options:
        assert tiny.heads == (4, 4, options["qk_nope_head_dim"] + options["qk_rope_head_dim"], options["v_head_dim"])
    else:
        assert tiny.d_head == options.get("head_dim", 8)


def test_shapes_of_the_weights(tiny):
    heads, kv, e, v = tiny.heads
    d, f, n = tiny.d_model, tiny.d_mlp, tiny.n_experts
    shapes = {
        "W_E": (300, d), "W_U": (d, 300), "W_Q": (heads, d, e), "W_K": (kv, d, e), "W_V": (kv, d, v), "W_O": (heads, v, d),
        "W_in": (d, f), "W_gate": (d, f), "W_out": (f, d), "ln1.w": (d,), "ln2.w": (d,), "ln_final.w": (d,),
        "b_Q": (heads, e), "b_K": (kv, e), "b_V": (kv, v), "b_O": (d,),
        "b_in": (f,), "b_gate": (f,), "b_out": (d,), "b_U": (300,), "W_router": (d, n), "b_router": (n,),
    }  # fmt: skip
    assert set(shapes) == set(WEIGHTS)
    for layer in range(LAYERS):
        found = {name: tiny.optional_weight(name, None if name in WHOLE else layer) for name in WEIGHTS}
        assert {name: tuple(w.shape) for name, w in found.items() if w is not None}.items() <= shapes.items()
        block = tiny.row.block(layer)
        assert (found["W_gate"] is not None) == (block.gate is not None)
        assert (found["W_router"] is not None) == (block.experts is not None)
        assert {name for name in ("W_E", "W_U", "W_O") if found[name] is None} == (set() if block.attn else {"W_O"})


def test_weights_of_experts(tiny):
    """Their shapes, and what is said where there is none."""
    for layer in range(LAYERS):
        experts = tiny.row.block(layer).experts
        if experts is None:
            with pytest.raises(MissingWeight, match=f"Layer {layer} of .* has no experts: ask for its weights without expert="):
                tiny.weight("W_in", layer, expert=0)
            continue
        widths = {tiny.weight(name, layer, expert=1).shape for name in ("W_in", "W_gate")}
        (shape,) = widths
        assert shape[0] == 32
        assert tiny.weight("W_out", layer, expert=1).shape == shape[::-1]
        with pytest.raises(
            MissingWeight, match=r"has no W_in. It is a mixture of \d experts: ask for one of them, weight\('W_in'"
        ):
            tiny.weight("W_in", layer)
        with pytest.raises(MissingWeight, match=rf"has no expert 99: they go from 0 to {tiny.n_experts - 1}"):
            tiny.weight("W_in", layer, expert=99)
        if experts.shared is None:
            with pytest.raises(MissingWeight, match="has no shared expert"):
                tiny.weight("W_in", layer, expert="shared")
        else:
            assert tiny.weight("W_in", layer, expert="shared").shape[0] == 32


def test_what_is_no_experts_weight_is_refused():
    model = tiny_model("qwen2_moe")
    with pytest.raises(MissingWeight, match=r"'W_Q' is no weight of an expert. Experts have W_in"):
        model.weight("W_Q", 1, expert=0)
    with pytest.raises(MissingWeight, match=r"has no b_gate. It is a mixture of 4 experts"):
        model.weight("b_gate", 1)


def test_latent_attention_has_no_one_matrix():
    with pytest.raises(MissingWeight, match=r"has no W_V. Multi-head latent attention goes through a compressed stream"):
        tiny_model("deepseek_v3").weight("W_V", 0)


def test_layers_without_attention_have_no_matrix_of_it():
    with pytest.raises(MissingWeight, match=r"layer 0 of .* has no W_Q. This layer has no attention"):
        tiny_model("lfm2").weight("W_Q", 0)
    assert tiny_model("lfm2").weight("W_Q", 1).shape == (4, 32, 8)


def test_a_norm_without_weights_has_no_gain():
    model = tiny_model("olmo")
    with pytest.raises(MissingWeight, match=r"has no ln2.w. No norm with a gain stands there"):
        model.weight("ln2.w", 0)
    assert model.vocabulary.gain is None
    x = torch.randn(3, 32)
    torch.testing.assert_close(model.vocabulary.logits(x, decoder="gain"), x @ model.weight("W_U"))


def test_tied_and_untied_heads():
    assert tiny_model("llama tied").is_tied
    assert not tiny_model("llama").is_tied


def test_weights_are_views_of_hugging_faces_own(llama):
    assert llama.weight("W_in", 1).data_ptr() == llama.hf.model.layers[1].mlp.up_proj.weight.data_ptr()


@pytest.mark.parametrize(
    ("name", "layer", "error", "text"),
    [
        ("W_up", 0, MissingWeight, r"No weight is called 'W_up'. Weights are W_E, .*W_gate"),
        ("b_in", 0, MissingWeight, r"layer 0 of .* \(llama\) has no b_in. No bias is added there"),
        ("W_in", None, LayerOutOfRange, r"Weight 'W_in' belongs to a layer. Ask for weight\('W_in', layer\)"),
        ("W_in", 3, LayerOutOfRange, r"Layer 3 is not in .*; layers go from 0 to 2"),
        ("W_E", 0, LayerOutOfRange, r"Weight 'W_E' belongs to the whole model"),
    ],
)
def test_a_weight_that_is_not_there_is_refused(llama, name, layer, error, text):
    with pytest.raises(error, match=text):
        llama.weight(name, layer)


def test_a_plain_mlp_has_no_gate():
    with pytest.raises(MissingWeight, match=r"has no W_gate. Its MLP is not gated: W_in is the matrix before"):
        tiny_model("gpt2").weight("W_gate", 0)
    with pytest.raises(UnknownSite, match=r"Site 'mlp_up.0' does not exist in 'gpt2': its MLP has no gate. Use mlp_pre"):
        tiny_model("gpt2").tap(Site("mlp_up", 0))


def test_parallel_blocks_have_no_stream_between():
    with pytest.raises(
        UnknownSite, match=r"Site 'resid_mid.1' does not exist in 'gpt_neox': attention and MLP run in parallel"
    ):
        tiny_model("gpt_neox").tap(Site("resid_mid", 1))


def test_weights_that_were_never_loaded_are_refused():
    model = tiny_model("llama")
    model.hf.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(UnreadableWeight, match=r"This weight is on no device \('meta'\): it was never loaded"):
        model.weight("W_in", 0)


def test_padding_sides(llama):
    right, left = llama.tokenize(["dog", "a dog"]), llama.tokenize(["dog", "a dog"], padding_side="left")
    assert right.mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert left.mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert right.tokens[0, :3].tolist() == left.tokens[0, 2:].tolist()


@pytest.mark.parametrize(("texts", "text"), [([], "No text was given"), (["a", ""], "Text 1 is empty: it gives no token")])
def test_no_text_is_refused(llama, texts, text):
    with pytest.raises(WorkbenchError, match=text):
        llama.tokenize(texts)


def test_the_fingerprint_follows_the_weights():
    first, same, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama")
    other.hf.model.layers[2].mlp.down_proj.weight.data *= 1.001
    assert first.weights_hash == same.weights_hash != other.weights_hash


def test_the_models_own_logits(llama):
    batch = llama.tokenize(["a dog"])
    hf = tiny_hf("llama")
    with torch.no_grad():
        torch.testing.assert_close(llama.forward(batch), hf(input_ids=batch.tokens).logits)
