"""Lenses of other packages: theirs and ours read the same logits, and a file that is not what it should be is refused.

tests/files/ holds lenses that the packages themselves wrote (tests/foreign_lenses.py says how); files to be refused are written
here, in the layout that those show.
"""

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from families import tiny_hf, tiny_tokenizer
from foreign_lenses import FILES, formula_model, jacobian, tokens, tuned
from safetensors.torch import load_file
from typer.testing import CliRunner

import workbench as wb
from workbench.errors import BadArtifact, NotComparable, NotFinite, UnreadableWeight
from workbench.lenses.foreign import require_own
from workbench.lenses.lens import Lens
from workbench.model import Batch

TUNED, JACOBIAN = FILES / "tuned_lens", FILES / "jacobian_lens.pt"
NEITHER = "config.json and params.pt, as tuned-lens writes them .* Jacobian lens"
"""Every refusal of an unknown format names those that are known."""


@pytest.fixture(scope="module")
def formula() -> wb.LanguageModel:
    """The model that the lenses of tests/files/ were made for."""
    return wb.load(formula_model(), tokenizer=tiny_tokenizer())


def read(lens: Lens, model: wb.LanguageModel) -> dict[str, torch.Tensor]:
    """Logits `[pos, d_vocab]` by site."""
    ids = tokens()
    acts = wb.capture(model, Batch(ids, torch.ones_like(ids, dtype=torch.bool)), list(lens.maps))
    return {site: model.vocabulary.logits(lens.read(acts[site], site))[0] for site in lens.maps}


def values_of(file: Path) -> dict[Any, Any]:
    return torch.load(file, weights_only=True)


def write_tuned(folder: Path, values: dict[Any, Any] | None = None, **config: Any) -> Path:
    """The committed tuned lens with other weights, or other words in its config; a word that is None goes."""
    folder.mkdir(exist_ok=True)
    said = json.loads((TUNED / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    torch.save(values_of(TUNED / "params.pt") if values is None else values, folder / "params.pt")
    return folder


def write_jacobian(file: Path, **values: Any) -> Path:
    """The committed Jacobian lens with other values; one that is None goes."""
    torch.save({name: value for name, value in (values_of(JACOBIAN) | values).items() if value is not None}, file)
    return file


def test_a_tuned_lens_reads_what_its_package_reads(formula):
    lens = wb.convert_lens(TUNED, formula)
    assert lens.kind == "tuned"
    assert list(lens.maps) == ["resid_pre.0", "resid_post.0", "resid_post.1"]
    theirs = load_file(FILES / "foreign_lens_logits.safetensors")
    for number, logits in enumerate(read(lens, formula).values()):
        torch.testing.assert_close(logits[-2:], theirs[f"tuned/{number}"], rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
    own = values_of(TUNED / "params.pt")
    for number, one in enumerate(lens.maps.values()):
        assert torch.equal(one.left, own[f"{number}.weight"].T.double() + torch.eye(32, dtype=torch.float64))
        assert torch.equal(one.bias, own[f"{number}.bias"].double())
    converted = lens.settings["converted"]
    assert converted["unembedding_agrees"] is True
    assert converted["base_model"] == "tests/tiny"
    assert converted["config"] == json.loads((TUNED / "config.json").read_text())
    assert (converted["file"], len(converted["sha256"])) == ("params.pt", 64)


def test_a_jacobian_lens_reads_what_transformer_lens_reads(formula):
    lens = wb.convert_lens(JACOBIAN, formula)
    assert lens.kind == "jacobian"
    assert list(lens.maps) == ["resid_post.0", "resid_post.1"]
    theirs, own = load_file(FILES / "foreign_lens_logits.safetensors"), values_of(JACOBIAN)["J"]
    for layer, logits in enumerate(read(lens, formula).values()):
        torch.testing.assert_close(logits[-2:], theirs[f"jacobian/{layer}"], rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
        one = lens.maps[f"resid_post.{layer}"]
        assert one.left.dtype == torch.float16, "the file's own"
        assert torch.equal(one.left, own[layer].T)
        assert not one.bias.any()
    said = lens.settings["converted"]["metadata"]
    assert (said["target_layer"], said["corpus"], said["transformer_lens_version"]) == (2, "one line", "3.9.0")


def test_an_unfinished_fit_is_the_mean_of_its_prompts(formula, tmp_path):
    sums = {layer: 5 * matrix.float() for layer, matrix in values_of(JACOBIAN)["J"].items()}
    fit = {"jacobian_sum": sums, "n_done": 5, "next_idx": 6, "source_layers": [0, 1], "target_layer": 2, "model_name": "a/tiny"}
    torch.save(fit, tmp_path / "fit.pt")
    lens = wb.convert_lens(tmp_path, formula)
    for layer, matrix in sums.items():
        assert torch.equal(lens.maps[f"resid_post.{layer}"].left, (matrix / 5).T)
    converted = lens.settings["converted"]
    assert converted["format"] == "jacobian-lens (unfinished fit)"
    assert converted["base_model"] == "a/tiny"
    assert (converted["metadata"]["n_done"], converted["metadata"]["next_idx"]) == (5, 6)
    for bad in (0, None, 2.5):
        torch.save(fit | {"n_done": bad}, tmp_path / "fit.pt")
        with pytest.raises(BadArtifact, match=f"n_done={bad} prompts, so there is no mean yet"):
            wb.convert_lens(tmp_path, formula)


def test_what_is_converted_is_an_ordinary_lens(formula, tmp_path):
    for number, path in enumerate((TUNED, JACOBIAN)):
        lens = wb.convert_lens(path, formula)
        loaded = Lens.load(lens.save(tmp_path / str(number)), model=formula)
        assert loaded.kind == lens.kind
        assert loaded.settings == lens.settings
        for site, one in lens.maps.items():
            assert torch.equal(loaded.maps[site].left, one.left)
        view = wb.lens(formula, "a dog and a cat", loaded, layers=None if path is TUNED else "0:3")
        assert view.settings["lens"] == lens.kind
        assert (view.positions.query("layer == 2")["kl_to_final_nats"] == 0).all()


@pytest.mark.parametrize(("name", "is_named"), [("tests/tiny", True), ("Elsewhere/Tiny", True), ("other", False), ("", None)])
def test_another_name_is_a_warning(formula, tmp_path, caplog, name, is_named):
    tuned, file = write_tuned(tmp_path / "lens", base_model_name_or_path=name), tmp_path / "lens.pt"
    for path in (tuned, write_jacobian(file, metadata={"model_name": name} if name else None)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "workbench"):
            assert wb.convert_lens(path, formula).settings["converted"]["names_this_model"] is is_named
        said = {None: "names no model; it is", False: "says that it was made for other; it is"}.get(is_named)
        assert [record.message for record in caplog.records if "converted for tests/tiny" not in record.message] == []
        assert len(caplog.records) == (said is not None)
        assert said is None or said in caplog.text


def test_a_tuned_lens_may_lack_biases_a_hash_and_single_precision(formula, tmp_path):
    own = {key: value.half() for key, value in values_of(TUNED / "params.pt").items() if key.endswith("weight")}
    lens = wb.convert_lens(write_tuned(tmp_path / "lens", own, bias=False, unembed_hash=None, colour="red"), formula)
    assert lens.settings["affine"] is False
    assert lens.settings["converted"]["unembedding_agrees"] is None
    assert lens.settings["converted"]["config"]["colour"] == "red"
    for number, one in enumerate(lens.maps.values()):
        assert torch.equal(one.left, own[f"{number}.weight"].T.double() + torch.eye(32, dtype=torch.float64))
        assert not one.bias.any()


def test_the_unembedding_is_known_in_any_precision_and_however_numpy_prints(formula, tmp_path):
    import numpy as np

    folder = write_tuned(tmp_path / "lens")
    with np.printoptions(edgeitems=1, threshold=2, suppress=True, linewidth=20):
        assert wb.convert_lens(folder, formula).settings["converted"]["unembedding_agrees"] is True
    noted = json.loads((TUNED / "config.json").read_text())["unembed_hash"]
    misspelled = write_tuned(tmp_path / "old", unembed_hash=None, unemebd_hash=noted)
    assert wb.convert_lens(misspelled, formula).settings["converted"]["unembedding_agrees"] is True
    hf = formula_model()
    hf.get_output_embeddings().weight.data[-1, -1] += 1
    with pytest.raises(NotComparable, match=r"another unembedding matrix than that of .* Name that model"):
        wb.convert_lens(folder, wb.load(hf, tokenizer=tiny_tokenizer(), check=False))
    with pytest.raises(NotComparable, match="another unembedding matrix"):
        wb.convert_lens(write_tuned(tmp_path / "old", unembed_hash=None, unemebd_hash="0" * 64), formula)


def test_an_unembedding_that_cannot_be_read_is_not_compared(formula, monkeypatch):
    def unreadable(self, name, *arguments, **options):
        raise UnreadableWeight(name)

    monkeypatch.setattr(wb.LanguageModel, "weight", unreadable)
    assert wb.convert_lens(TUNED, formula).settings["converted"]["unembedding_agrees"] is None


def test_lenses_of_other_models_are_refused(formula, tmp_path):
    with pytest.raises(NotComparable, match=r"of a model of 4 layers, d_model 32; .* has 3 of 32"):
        wb.convert_lens(write_tuned(tmp_path / "lens", num_hidden_layers=4), formula)
    with pytest.raises(NotComparable, match=r"of a model of 3 layers, d_model 64; .* has 3 of 32"):
        wb.convert_lens(write_tuned(tmp_path / "lens", d_model=64), formula)
    file, J = tmp_path / "lens.pt", values_of(JACOBIAN)["J"]
    with pytest.raises(NotComparable, match=r"of a model of d_model 64; .* has 32"):
        wb.convert_lens(write_jacobian(file, d_model=64), formula)
    with pytest.raises(NotComparable, match=r"leads to the output of block 1; the last one of .* is 2"):
        wb.convert_lens(write_jacobian(file, metadata={"target_layer": 1}), formula)
    with pytest.raises(NotComparable, match=r"a map from the output of block 2; in .* there are some from 0 to 1"):
        wb.convert_lens(write_jacobian(file, J=J | {2: J[0]}, metadata=None), formula)
    torch.save({"jacobian_sum": {0: torch.zeros(64, 64)}, "n_done": 1}, file)
    with pytest.raises(NotComparable, match="d_model 64"):
        wb.convert_lens(file, formula)


class Program:
    """A pickle of it writes a file when it is opened."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_something_is_not_opened(formula, tmp_path, zipped):
    ran, file = tmp_path / "ran", tmp_path / "lens.pt"
    torch.save(values_of(JACOBIAN) | {"metadata": Program(ran)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        BadArtifact, match=r"is not read: it is a pickle that asks for '\w+.mkdir', and opening it would run that"
    ):
        wb.convert_lens(file, formula)
    assert not ran.exists()
    write_tuned(tmp_path / "folder", {"0.weight": Program(ran)})
    with pytest.raises(BadArtifact, match="is not read"):
        wb.convert_lens(tmp_path / "folder", formula)
    file.write_bytes(pickle.dumps({"J": Program(ran)}))
    with pytest.raises(BadArtifact, match="cannot be read"):
        wb.convert_lens(file, formula)
    assert not ran.exists()


def test_our_readers_refuse_what_others_wrote(tmp_path):
    write_jacobian(tmp_path / "lens.pt")
    for path in (TUNED, JACOBIAN, tmp_path):
        with pytest.raises(BadArtifact, match=r"nothing is unpickled here.* workbench convert-lens"):
            require_own(path)
        with pytest.raises(BadArtifact, match="workbench convert-lens"):
            Lens.load(path)
        with pytest.raises(BadArtifact):
            wb.Transport.load(path)
    (tmp_path / "run.json").touch()
    require_own(tmp_path)
    require_own(tmp_path / "absent")


def test_damaged_files_are_refused(formula, tmp_path):
    file, whole = tmp_path / "lens.pt", JACOBIAN.read_bytes()
    torch.save(values_of(JACOBIAN), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.bin").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6549\n"
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        old[: len(old) // 2],
        old[:-100],
        pointer,
        b"<html>404</html>",
        bytes(range(256)),
    ):
        file.write_bytes(damaged)
        with pytest.raises(BadArtifact, match=f"cannot be read: it is cut short, damaged, .* {NEITHER}") as refused:
            wb.convert_lens(file, formula)
        assert "weights_only" not in str(refused.value), "torch advises to let it run"
    for place in range(0, len(whole), 97):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:  # a flipped bit may fall on padding or a word; whatever is not refused has a named reason or is whole
            wb.convert_lens(file, formula)
        except (BadArtifact, NotComparable, NotFinite):
            continue


def test_missing_layers_and_bad_numbers_are_refused(formula, tmp_path):
    own, J, file = values_of(TUNED / "params.pt"), values_of(JACOBIAN)["J"], tmp_path / "lens.pt"
    without = {key: value for key, value in own.items() if key != "1.weight"}
    with pytest.raises(BadArtifact, match=r"translators 0 to 2, each with a bias, .* missing or too much: 1.weight"):
        wb.convert_lens(write_tuned(tmp_path / "lens", without), formula)
    with pytest.raises(BadArtifact, match=r"missing or too much: 3.weight"):
        wb.convert_lens(write_tuned(tmp_path / "lens", own | {"3.weight": own["0.weight"]}), formula)
    with pytest.raises(BadArtifact, match="none with a bias"):
        wb.convert_lens(write_tuned(tmp_path / "lens", bias=False), formula)
    with pytest.raises(BadArtifact, match=r"says that it has layers \[0, 1\]; \[1\] are not there"):
        wb.convert_lens(write_jacobian(file, J={0: J[0]}), formula)
    some = wb.convert_lens(write_jacobian(file, J={1: J[1]}, source_layers=[1]), formula)
    assert list(some.maps) == ["resid_post.1"], "a lens of chosen layers is whole"
    spoiled = J[1].clone()
    spoiled[3, 4] = float("nan")
    with pytest.raises(NotFinite, match="layer 1 holds NaN or infinity"):
        wb.convert_lens(write_jacobian(file, J=J | {1: spoiled}), formula)
    with pytest.raises(NotFinite, match=r"2.bias holds NaN or infinity"):
        wb.convert_lens(write_tuned(tmp_path / "lens", own | {"2.bias": own["2.bias"] / 0}), formula)
    for bad, said in ((J[0][:9], r"has shape \[9, 32\]"), (J[0].int(), "floating-point"), ("no tensor", "floating-point")):
        with pytest.raises(BadArtifact, match=f"layer 0 .*{said}"):
            wb.convert_lens(write_jacobian(file, J=J | {0: bad}), formula)
    for bad in ({}, [J[0]], {"a": J[0]}):
        with pytest.raises(BadArtifact, match="should hold a matrix by layer"):
            wb.convert_lens(write_jacobian(file, J=bad), formula)


def test_what_is_not_known_is_refused_with_what_is(formula, tmp_path):
    file = tmp_path / "other.pt"
    for odd, said in (({"probe": torch.zeros(2)}, "holds probe"), ({}, "holds nothing"), ([1], "holds a list")):
        torch.save(odd, file)
        with pytest.raises(BadArtifact, match=f"{said}, which no known lens .* {NEITHER}"):
            wb.convert_lens(file, formula)
    old = {"input_translator.weight": torch.zeros(32, 32), "layer_translators.0.weight": torch.zeros(32, 32)}
    with pytest.raises(BadArtifact, match=f"tuned-lens 0.0, which kept .* {NEITHER}"):
        wb.convert_lens(write_tuned(tmp_path / "lens", old), formula)
    with pytest.raises(BadArtifact, match="a lens of type 'deep'; only 'linear_tuned_lens'"):
        wb.convert_lens(write_tuned(tmp_path / "lens", lens_type="deep"), formula)
    (tmp_path / "lens" / "config.json").write_text("{")
    with pytest.raises(BadArtifact, match="cannot be read as JSON"):
        wb.convert_lens(tmp_path / "lens", formula)
    (tmp_path / "lens" / "config.json").unlink()
    torch.save(values_of(TUNED / "params.pt"), tmp_path / "lens" / "params.pt")
    with pytest.raises(BadArtifact, match=r"no config.json lies beside it"):
        wb.convert_lens(tmp_path / "lens" / "params.pt", formula)
    with pytest.raises(BadArtifact, match=f"does not exist.* {NEITHER}"):
        wb.convert_lens(tmp_path / "absent", formula)
    torch.save({}, tmp_path / "second.pt")
    with pytest.raises(BadArtifact, match=r"should hold one .pt file; it has other.pt, second.pt"):
        wb.convert_lens(tmp_path, formula)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadArtifact, match=r"should hold one .pt file; it has none"):
        wb.convert_lens(tmp_path / "empty", formula)


def test_the_verb_converts_and_says_so_and_the_lens_verb_reads_it(tmp_path):
    from workbench.cli import app

    def command(*arguments: Any):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    model, out = tmp_path / "tiny", tmp_path / "out"
    formula_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    done = command("convert-lens", TUNED, "--model", model, "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["kind"], answer["maps"]) == ("tuned", ["resid_pre.0", "resid_post.0", "resid_post.1"])
    assert answer["settings"]["converted"]["names_this_model"] is True
    done = command("lens", "--model", model, "--lens", out, "--prompt", "a dog", "--json")
    assert json.loads(done.stdout)["settings"]["lens"] == "tuned"
    done = command("convert-lens", JACOBIAN, "--model", model, "--out", tmp_path / "second")
    assert done.exit_code == 0, done.stderr
    assert "Lens(jacobian, 2 maps" in done.stdout
    assert "sha256" in done.stdout
    assert "--lens" in done.stderr
    done = command("convert-lens", tmp_path / "none.pt", "--model", model, "--out", out)
    assert done.exit_code == 2
    assert done.stderr.startswith("workbench: ")
    assert "does not exist" in done.stderr
    assert command("convert-lens", TUNED, "--out", out).exit_code == 2, "the model must be named"


FAMILIES = ["bloom", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "opt"]
"""Those that tuned-lens knows the norm of."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_tuned_lens_itself_agrees_on_every_family_that_it_knows(family, dtype, tmp_path):
    pytest.importorskip("tuned_lens", reason="pip install --no-deps tuned-lens==0.2.0")
    hf = tiny_hf(family).to(dtype)
    theirs = tuned(hf, tokens(), tmp_path, seed=1)
    lens = wb.convert_lens(tmp_path, wb.load(hf, tokenizer=tiny_tokenizer(), check=False))
    assert lens.settings["converted"]["unembedding_agrees"] is True
    wide = wb.load(hf.float(), tokenizer=tiny_tokenizer(), check=False)  # the same weights, in another precision
    ours = read(wb.convert_lens(tmp_path, wide), wide)
    if dtype == torch.float32:
        for logits, other in zip(ours.values(), theirs.values(), strict=True):
            torch.testing.assert_close(logits, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "llama", "qwen3"])
def test_transformer_lens_itself_agrees(family, tmp_path):
    pytest.importorskip("transformer_lens", reason="make test-all installs the witnesses")
    theirs = jacobian(tiny_hf(family), tokens(), tmp_path / "lens.pt")
    model = tiny_model(family, check=False)
    ours = read(wb.convert_lens(tmp_path, model), model)
    assert len(theirs) == model.n_layers - 1
    for logits, other in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(logits, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
