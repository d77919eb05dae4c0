import pytest
import torch
from conftest import tiny_model
from families import FAMILIES, tiny_hf

from workbench.errors import LayerOutOfRange, MissingWeight, UnknownArchitecture, UnknownSite, WorkbenchError
from workbench.model import WEIGHTS
from workbench.sites import Site


def test_dimensions_are_those_of_the_config(tiny, family):
    options = FAMILIES[family][1]
    assert tiny.n_layers == 3
    assert tiny.d_model == 32
    assert tiny.d_mlp == 48
    assert tiny.n_heads == 4
    assert tiny.d_vocab == 300
    assert tiny.d_head == options.get("head_dim", 8)


def test_shapes_of_the_weights(tiny):
    heads, kv, e, d, f = tiny.n_heads, tiny.heads.n_key_value_heads, tiny.d_head, tiny.d_model, tiny.d_mlp
    shapes = {
        "W_E": (300, d), "W_U": (d, 300), "W_Q": (heads, d, e), "W_K": (kv, d, e), "W_V": (kv, d, e), "W_O": (heads, e, d),
        "W_in": (d, f), "W_gate": (d, f), "W_out": (f, d), "ln1.w": (d,), "ln2.w": (d,), "ln_final.w": (d,),
        "b_Q": (heads, e), "b_K": (kv, e), "b_V": (kv, e), "b_O": (d,),
        "b_in": (f,), "b_gate": (f,), "b_out": (d,), "b_U": (300,),
    }  # fmt: skip
    assert set(shapes) == set(WEIGHTS)
    for name, shape in shapes.items():
        layer = None if name in ("W_E", "W_U", "b_U", "ln_final.w") else 1
        found = tiny.optional_weight(name, layer)
        assert found is None or found.shape == shape, name
    assert (tiny.optional_weight("W_gate", 0) is None) == (tiny.row.model_type in ("gpt2", "gpt_neox"))


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


def test_an_unknown_family_is_refused(llama):
    from workbench.architectures import architecture_of

    class Config:
        model_type = "rwkv"

    with pytest.raises(UnknownArchitecture, match=r"'rwkv' has no row in workbench/architectures.py. Known families: gemma2"):
        architecture_of(Config())


def test_weights_that_are_elsewhere_are_refused():
    model = tiny_model("llama")
    model.hf.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(MissingWeight, match="offloaded"):
        model.weight("W_in", 0)
    model.hf.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(MissingWeight, match="no plain floating-point weight"):
        model.weight("W_in", 1)


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
