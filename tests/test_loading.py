import pytest
import torch
from families import tiny_hf, tiny_tokenizer

import workbench as wb
from workbench.embedded import DEFAULT
from workbench.errors import BadArtifact, BrokenModel, UnknownArchitecture, UnknownModel
from workbench.model_files import check_weights


@pytest.fixture
def folder(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_loads_as_the_live_model_does(folder):
    loaded, live = wb.load(folder), wb.load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    assert loaded.weights_hash == live.weights_hash
    assert loaded.name == str(folder)
    assert loaded.revision == "local"
    assert loaded.source == folder
    batch = loaded.tokenize("a dog")
    assert torch.equal(loaded.forward(batch), live.forward(batch))
    assert "llama, 3 layers, d_model 32, d_mlp 48" in repr(loaded)


def test_dtype(folder):
    assert wb.load(folder, dtype=torch.bfloat16).dtype == wb.load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert wb.load(str(folder)).dtype == torch.float32


def test_a_live_model_needs_its_tokenizer():
    with pytest.raises(UnknownModel, match=r"without its tokenizer. Pass tokenizer="):
        wb.load(tiny_hf("llama"))


def test_an_unknown_id_without_network_names_what_is_here():
    with pytest.raises(
        UnknownModel,
        match=rf"Model 'nobody/nothing' is not embedded, is no folder, is not cached, and could not be had from the hub "
        rf"\(.*\). Embedded: {DEFAULT}; cached: .*workbench models",
    ):
        wb.load("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "text"), [("./nowhere", "Folder './nowhere' does not exist"), ("what is this", "is no model name")]
)
def test_a_name_that_can_be_no_id_is_refused(name, text):
    with pytest.raises(UnknownModel, match=text):
        wb.load(name)


def test_a_folder_without_config_or_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenModel, match=r"holds no \*.safetensors weights. Was the download cut short"):
        wb.load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(BrokenModel, match=r"pytorch_model.bin is pickled, which can run code when it is read"):
        wb.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(BrokenModel, match=r"holds no config.json: it is no Hugging Face model folder"):
        wb.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BrokenModel, match=r"truncated or damaged. Fetch it again|no readable safetensors header"):
        wb.load(folder)


def test_a_missing_shard_is_named(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    check_weights(tmp_path)
    shards[1].unlink()
    with pytest.raises(BrokenModel, match=f"lacks {shards[1].name}, which its index names"):
        check_weights(tmp_path)


def test_an_encoder_decoder_is_refused_by_name(folder):
    config = (folder / "config.json").read_text().replace('"llama"', '"t5"')
    (folder / "config.json").write_text(config)
    with pytest.raises(UnknownArchitecture, match="'t5' is an encoder-decoder: its decoder reads"):
        wb.load(folder)


def test_missing_tokenizer_files_are_named(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BrokenModel, match="could not be loaded"):
        wb.load(folder)


def test_models_lists_the_embedded_one(smollm):
    listing = {model.name: model for model in wb.models()}[DEFAULT]
    assert (listing.kind, listing.state, listing.licence) == ("embedded", "ready", "Apache-2.0")
    assert listing.bytes > 500e6


def test_a_family_that_transformers_does_not_know_is_refused_by_name(folder):
    config = (folder / "config.json").read_text().replace('"llama"', '"brandnew"')
    (folder / "config.json").write_text(config)
    with pytest.raises(UnknownArchitecture, match=r"Transformers \S+ does not know the family 'brandnew' of .*live model"):
        wb.load(folder)


def test_a_malformed_config_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(BadArtifact, match=r"config.json' cannot be read as JSON"):
        wb.load(folder)


def test_a_model_without_its_head_is_refused():
    with pytest.raises(UnknownArchitecture, match=r"LlamaModel lacks lm_head, .*with its head"):
        wb.load(tiny_hf("llama").model, tokenizer=tiny_tokenizer())


def test_a_revision_of_a_folder_is_refused(folder):
    with pytest.raises(UnknownModel, match=r"revision='main' was asked for, but .* is no hub model"):
        wb.load(folder, revision="main")
