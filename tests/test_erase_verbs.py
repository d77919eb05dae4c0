"""`workbench erase` and `workbench ablate-weights` on a tiny model: tables, files, the same numbers as Python, and mistakes."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny_hf, tiny_tokenizer
from typer.testing import CliRunner

import probes
import workbench as wb
from workbench.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_hf("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The last letter says the class; letters of one word are held out together."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), 4)) for _ in range(60)]
    rows = [
        {"text": f"{start} {word}", "label": "ad"[word[-1] > "d"] + "x", "group": word} for word in words for start in "abc"
    ]
    path = tmp_path_factory.mktemp("set") / "letters.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def erased(model, examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("erased")
    done = invoke(
        "erase", "--model", model, "--data", examples, "--site", "resid_post.0", "--eraser", "leace,random", "--no-mlp",
        "--answers", "ax=a,dx=d", "--everywhere", "resid_post", "--follow", "--tokens", 40, "--prompt", "a b", "--out", out,
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)


def test_the_tables_are_those_of_python(model, examples, erased):
    _, said = erased
    found = probes.erase(
        wb.load(model), str(examples), "resid_post.0", erasers=["leace", "random"], mlp=False, progress=False
    )  # fmt: skip
    assert [row["eraser"] for row in said["erasure"]] == ["none", "leace", "random"]
    for row, own in zip(said["erasure"], found.table.to_dict("records"), strict=True):
        assert row["linear"] == pytest.approx(own["linear"])
        assert row["edit"] == pytest.approx(own["edit"])
    assert [row["erased"] for row in said["scrubbing"]][:3] == ["none", "resid_post.0, leace", "leace at all resid_post"]
    assert said["scrubbing"][0]["loss"] == 0
    assert said["followed"][0]["site"] == "resid_post.0"


def test_all_that_is_written_can_be_read_again(erased):
    out, said = erased
    names = {path.name for path in out.iterdir()}
    assert {"run.json", "erasure.parquet", "erasers.safetensors", "leaks.html", "scatter.html", "scrubbing-bars.html"} <= names
    assert {"scrubbing", "followed", "followed.html"} <= names
    assert probes.Erasure.load(out).table["eraser"].tolist() == ["none", "leace", "random"]
    assert probes.Scrubbing.load(out / "scrubbing").table["loss"].tolist() == [row["loss"] for row in said["scrubbing"]]
    assert len(probes.Followed.load(out / "followed").table) == len(said["followed"])


def test_weights_are_written_from_an_eraser_and_checked(model, erased, tmp_path):
    out, _ = erased
    arguments = ("ablate-weights", out / "erasers.safetensors", "--model", model, "--tokens", 40, "--out", tmp_path / "new")
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert "holds several erasers" in refused.stderr
    named = (*arguments, "--name", "resid_post.0/leace", "--prompt", "a b")
    done = invoke(*named, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    loaded, eraser = wb.load(tmp_path / "new"), probes.load_erasers(out / "erasers.safetensors")["resid_post.0/leace"]
    after = wb.capture(loaded, "a bc", "resid_post")
    for state in after.values():
        assert float((state @ eraser.write_.float()).abs().max()) < 1e-5
    assert said["compared"]["change"] == pytest.approx(said["compared"]["loss_after"] - said["compared"]["loss_before"])
    again = invoke(*named)
    assert again.exit_code == 2
    assert "is not empty" in again.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--eraser", "nothing"], "There is no eraser 'nothing'"),
        (["--eraser", "leace,leace"], "asked for twice"),
        (["--answers", "ax"], "is not understood"),
        (["--answers", "ax= a"], "There is no answer for 'dx'"),
        (["--site", "resid_post.99"], "do not lie in this model"),
        (["--label", "none"], "no column 'none'"),
    ],
)
def test_mistakes_are_one_line(model, examples, more, words):
    arguments = ["erase", "--model", model, "--data", examples, "--no-mlp", "--tokens", 40]
    done = invoke(*arguments, *([] if "--eraser" in more else ["--eraser", "leace"]), *more)
    assert done.exit_code == 2
    assert words in done.stderr.splitlines()[-1]
    assert torch.is_grad_enabled()
