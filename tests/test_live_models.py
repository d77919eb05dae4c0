"""Models that are not as they came: adapters, several devices, half precision, quantised layers."""

import peft
import pytest
import torch
from conftest import tiny_model
from families import tiny_hf, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import workbench as wb
from workbench.architectures.families import ROWS
from workbench.checks.check import error
from workbench.errors import BrokenModel, MissingWeight, UnknownArchitecture, UnknownModel, UnknownOption, UnreadableWeight

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own


def adapted(**options):
    """A tiny llama with a random adapter on its queries and neurons."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(tiny_hf("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model.eval()


def test_an_adapter_is_captured_named_and_refused_when_its_weight_is_read(caplog):
    peft_model = adapted()
    model = wb.load(peft_model, tokenizer=tiny_tokenizer())
    assert "carries adapters that are not merged (default)" in caplog.text
    assert model.provenance["adapters"] == ["default"]
    with pytest.raises(UnreadableWeight, match="The adapter default is not merged into this weight"):
        model.weight("W_Q", 0)
    with pytest.raises(MissingWeight, match=r"load model.merge_and_unload\(\)"):
        wb.map_neurons(model, side="down", progress=False)
    assert model.weight("W_K", 0).shape == (2, 32, 8)
    found = model.verify()
    assert found.passed
    assert set(found.table.query("verdict == 'unchecked'")["identity"]) == {
        "ln1(resid_pre) W_Q = q",
        "mlp_post W_out = mlp_out",
    }
    # What is captured is what the adapted model computes.
    batch = model.tokenize("a dog")
    with torch.no_grad():
        states = peft_model(input_ids=batch.tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(wb.capture(model, batch, "resid_post.1")["resid_post.1"], states[2])
    plain = wb.capture(tiny_model("llama"), batch, "resid_post.1")["resid_post.1"]
    assert (states[2] - plain).abs().max() > 0.1


def test_merged_adapters_are_ordinary_models():
    unmerged = wb.load(adapted(), tokenizer=tiny_tokenizer())
    for merged in (adapted().merge_and_unload(), adapted()):
        if isinstance(merged, peft.PeftModel):
            merged.merge_adapter()  # merged, but still wrapped
        model = wb.load(merged, tokenizer=tiny_tokenizer())
        assert model.adapters == []
        assert (model.verify().table["verdict"] == "ok").all()
        batch = model.tokenize("a dog")
        with torch.no_grad():
            assert error(model.forward(batch), unmerged.forward(batch)) < 1e-5


def test_an_adapter_that_is_switched_off_is_an_ordinary_model():
    peft_model = adapted()
    peft_model.base_model.disable_adapter_layers()
    model = wb.load(peft_model, tokenizer=tiny_tokenizer())
    assert model.adapters == []
    assert (model.verify().table["verdict"] == "ok").all()
    assert torch.equal(model.weight("W_Q", 0), tiny_model("llama").weight("W_Q", 0))


def test_a_folder_with_an_adapter_alone_is_named(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(BrokenModel, match="it is an adapter"):
        wb.load(tmp_path)


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(tmp_path):
    model = wb.load(adapted(), tokenizer=tiny_tokenizer(), check=False)
    edit = wb.WeightEdit("W_out.0", torch.ones(1, model.d_mlp), torch.ones(1, model.d_model))
    with pytest.raises(UnreadableWeight, match="merge_and_unload"):
        wb.save_edited(model, tmp_path / "edited", edit)


def test_adapters_that_add_tokens_are_refused():
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_hf("llama"), config)
    with pytest.raises(UnknownArchitecture, match="adds virtual tokens before every text"):
        wb.load(model, tokenizer=tiny_tokenizer())


@pytest.fixture
def folder(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_model_spread_by_accelerate_is_the_same(folder, tmp_path):
    """Half of it on disk, from where weights are read when asked for."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    hf = type(tiny_hf("llama")).from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert hf.model.layers[1].mlp.up_proj.weight.is_meta
    spread, whole = wb.load(hf, tokenizer=tiny_tokenizer()), wb.load(folder)
    assert (spread.verify().table["verdict"] == "ok").all()
    for name in ("W_Q", "W_in", "W_out", "ln2.w"):
        assert torch.equal(spread.weight(name, 1), whole.weight(name, 1))
    site = "mlp_post.2"
    assert torch.equal(wb.capture(spread, "a dog", site)[site], wb.capture(whole, "a dog", site)[site])


def test_device_map_of_a_folder(folder):
    model = wb.load(folder, device_map="cpu", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.verify().require()
    with pytest.raises(UnknownOption, match="device= and device_map= exclude each other"):
        wb.load(folder, device_map="cpu", device="cpu")
    with pytest.raises(UnknownOption, match="device_map= and revision= are for models"):
        wb.load(tiny_hf("llama"), tokenizer=tiny_tokenizer(), device_map="cpu")


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((), {}, r"live model was given without its tokenizer. Pass tokenizer="),
        ((), {"tokenizer": "gpt2"}, r"with a str for a tokenizer"),
        ((), {"tokenizer": tiny_tokenizer(), "revision": "main"}, r"revision= are for models that are loaded from files"),
        ((), {"tokenizer": tiny_tokenizer(), "dtype": torch.int8}, r"dtype=torch.int8 is not known. Use one of torch's"),
        ((None,), {}, r"A NoneType was given where a model is wanted"),
        ((nn.Linear(2, 2),), {"tokenizer": tiny_tokenizer()}, r"A Linear was given where a model is wanted"),
        (("",), {}, r"An empty model name was given"),
    ],
)
def test_what_is_no_model_is_refused(arguments, options, text):
    with pytest.raises((UnknownModel, UnknownOption), match=text):
        wb.load(*(arguments or (tiny_hf("llama"),)), **options)


def test_casting_a_live_model_leaves_its_tables():
    hf = tiny_hf("llama")
    table = hf.model.rotary_emb.inv_freq.clone()
    assert wb.load(hf, tokenizer=tiny_tokenizer(), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(hf.model.rotary_emb.inv_freq, table)


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning", "ignore:torch.ao.quantization:DeprecationWarning")
def test_a_quantised_model_is_captured_but_its_weights_are_refused():
    """Linear layers in 8 bits, by torch's own dynamic quantisation."""
    quantised = torch.ao.quantization.quantize_dynamic(tiny_hf("llama"), {nn.Linear}, dtype=torch.qint8)
    model = wb.load(quantised, tokenizer=tiny_tokenizer())
    acts = wb.capture(model, "a dog", ["resid_post.1", "mlp_post.1"])
    assert (model.d_mlp, model.d_vocab) == (48, 300)
    plain = wb.capture(tiny_model("llama"), "a dog", "resid_post.1")["resid_post.1"]
    off = (acts["resid_post.1"] - plain).norm() / plain.norm()
    assert 1e-5 < off < 0.1  # another model, but not by much
    with pytest.raises(UnreadableWeight, match=r"holds no plain floating-point weight \(is the model quantised\?\)"):
        model.weight("W_in", 1)
    # Its activations are scaled by the largest of the whole batch: tokens do depend on their neighbours, and verify says so.
    found = model.verify().table.set_index("identity")["verdict"]
    assert set(found[found == "fails"].index) == {
        "a right-padded batch = its single rows",
        "a left-padded batch = its single rows",
        "a later token moves no earlier logit",
    }
    assert (found["mlp_post W_out = mlp_out"] == "unchecked").all()


@pytest.mark.parametrize("family", ["llama tied", "gpt2", "gemma2", "phi3"])
def test_a_streamed_model_is_the_same(tmp_path, family):
    """Its blocks stay in their files, and are read from there."""
    tiny_hf(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    streamed, whole = wb.load(tmp_path, stream=True), wb.load(tmp_path)
    assert all(one.is_meta for one in streamed.block(0).parameters())
    assert not streamed.weight("W_U").is_meta
    assert streamed.weights_hash == whole.weights_hash
    assert wb.load(tmp_path, stream=True, dtype="bfloat16").weights_hash == wb.load(tmp_path, dtype="bfloat16").weights_hash
    maps = [wb.map_neurons(model, side="all", progress=False) for model in (streamed, whole)]
    assert maps[0].table.equals(maps[1].table)
    assert maps[0].null.equals(maps[1].null)
    assert torch.equal(
        wb.capture(streamed, "a dog", "resid_post.-1")["resid_post.-1"],
        wb.capture(whole, "a dog", "resid_post.-1")["resid_post.-1"],
    )


def test_what_cannot_be_streamed_says_why(tmp_path, monkeypatch):
    tiny_tokenizer().save_pretrained(tmp_path)
    tiny_hf("mixtral").save_pretrained(tmp_path)
    with pytest.raises(UnknownOption, match="in another form than 'mixtral' computes with"):
        wb.load(tmp_path, stream=True)
    tiny_hf("llama").save_pretrained(tmp_path)
    with pytest.raises(BrokenModel, match="choose another device"):
        wb.load(tmp_path, stream=True, device="nowhere")
    (tmp_path / "encoder").mkdir()
    config = AutoConfig.for_model("t5", d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=300)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "encoder")
    with pytest.raises(UnknownArchitecture, match="encoder-decoder"):
        wb.load(tmp_path / "encoder", stream=True)
    monkeypatch.delitem(ROWS, "llama")
    with pytest.raises(UnknownArchitecture, match="'llama' has no row, so its blocks are not known"):
        wb.load(tmp_path, stream=True)
    with pytest.raises(UnknownOption, match="stream=True is for a model that is loaded from files"):
        wb.load(tiny_hf("llama"), tokenizer=tiny_tokenizer(), stream=True)
