"""What the explorer refuses: paths out of the runs folder, files that are not what they say, models that do not fit."""

import io
import json
import struct

import pandas as pd
import pytest
import torch
from safetensors.torch import save

from app import memory, places, runs, uploads
from workbench.errors import BadArtifact, UnknownModel


@pytest.fixture
def folder(explorer):
    """A runs folder with a run in it, another beside it, and links from one to the other."""
    for run in (explorer / "own", explorer / "deep" / "er", explorer.parent / "other"):
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"kind": "linearity", "model": "tiny"}))
    (explorer / "plain").mkdir()
    (explorer / "plain" / "notes.txt").write_text("mine")
    (explorer / "link").symlink_to(explorer.parent / "other")
    (explorer / "inner").symlink_to(explorer / "own")
    return explorer


# ---- paths


def test_a_run_is_found_by_its_name(folder):
    assert places.run_at("own") == folder / "own"
    assert places.run_at("deep/er") == folder / "deep" / "er"
    assert places.run_at("inner") == folder / "own"
    assert [places.name_of(places.run_at(name)) for name in ("own", "deep/er")] == ["own", "deep/er"]


@pytest.mark.parametrize(
    "name",
    [
        "../other",
        "own/../../other",
        "..",
        ".",
        "",
        "link",
        "/",
        "/etc",
        "~",
        "nothing",
        "own/run.json",
        "own\0",
        "x" * 300,
        "x" * 5000,
    ],
)
def test_no_name_leads_out_of_the_runs_folder(folder, name):
    with pytest.raises(BadArtifact):
        places.run_at(name)


def test_an_absolute_path_is_taken_only_where_it_was_named_at_the_start(folder, monkeypatch):
    other = folder.parent / "other"
    with pytest.raises(BadArtifact, match="lies outside of the runs folder"):
        places.run_at(str(other))
    monkeypatch.setenv("WORKBENCH_APP_MAPS", str(other))
    assert places.run_at(str(other)) == other
    assert places.run_at(str(folder / "own")) == folder / "own"
    assert places.name_of(other) == str(other)


# ---- runs


def test_runs_are_listed_as_whole_unfinished_or_damaged(folder):
    (folder / "cut").mkdir()
    (folder / "cut" / "run.json").write_text('{"kind": "linearity", "mo')
    (folder / "list").mkdir()
    (folder / "list" / "run.json").write_text("[1]")
    (folder / "begun" / ".neurons-parts").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "run.json").write_text("{}")
    found = {one.name: one.state for one in runs.found_runs()}
    assert set(found) == {"own", "deep/er", "cut", "list", "begun"}
    assert found["own"] == found["deep/er"] == "whole"
    assert found["begun"] == "unfinished"
    assert found["cut"].startswith("damaged: ")
    assert found["list"] == "damaged: its run.json is no record."
    assert {one.name for one in runs.found_runs("linearity")} == {"own", "deep/er"}


def test_a_run_is_deleted_with_all_below_it(folder):
    (folder / "own" / "table.parquet").write_bytes(b"x" * 100)
    (folder / "own" / "below").mkdir()
    size = sum(file.stat().st_size for file in (folder / "own").rglob("*") if file.is_file())
    assert runs.delete("own") == size
    assert not (folder / "own").exists()
    assert (folder / "deep" / "er" / "run.json").exists()


@pytest.mark.parametrize("name", ["plain", "deep", "link", "../other", "OTHER", ".", "nothing"])
def test_nothing_else_is_deleted(folder, name, monkeypatch):
    other = folder.parent / "other"
    monkeypatch.setenv("WORKBENCH_APP_MAPS", str(other))
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(BadArtifact):
        runs.delete(name.replace("OTHER", str(other)))
    assert sorted(folder.parent.rglob("*")) == before


# ---- uploads


def parquet() -> bytes:
    out = io.BytesIO()
    pd.DataFrame({"text": ["a", "b"]}).to_parquet(out)
    return out.getvalue()


def header(content: object) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


GOOD = {
    "a b.txt": b"Some words.",
    "ä.csv": b'\xef\xbb\xbftext,label\na,x\n"b,\n c",y\n',
    "t.parquet": parquet(),
    "T.SAFETENSORS": save({"a": torch.ones(2, 3)}),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_whole_file_is_kept_as_it_is_under_its_hash(explorer, name):
    path = uploads.keep(name, GOOD[name])
    assert path.read_bytes() == GOOD[name]
    assert path.is_relative_to(explorer.parent / "home" / "app" / "uploads")
    assert path.suffix == "." + name.rpartition(".")[2].lower()
    assert uploads.keep(name, GOOD[name]) == path


BAD = {
    "of a pickle": ("m.pkl", b"\x80\x04K\x01.", "Pickled files"),
    "of a pickled model": ("pytorch_model.bin", b"PK\x03\x04", "Pickled files"),
    "of pickled weights": ("m.pt", b"\x80\x04K\x01.", "Pickled files"),
    "without an ending": ("notes", b"text", "only txt, csv, parquet, safetensors"),
    "with another ending": ("notes.md", b"text", "only txt, csv, parquet, safetensors"),
    "of a program": ("run.py", b"print()", "only txt, csv, parquet, safetensors"),
    "of a pickle under another name": ("m.safetensors", b"\x80\x04K\x01.", "is no safetensors file"),
    "of a picture as text": ("p.txt", b"\x89PNG\r\n\0", "zero bytes"),
    "of Latin-1": ("p.txt", "Käse".encode("latin-1"), "is no txt file"),
    "of nothing": ("p.txt", b"", "it is empty"),
    "of blanks": ("p.csv", b" \n\n ", "it is empty"),
    "of an empty parquet": ("t.parquet", b"", "is no parquet file"),
    "of a truncated parquet": ("t.parquet", parquet()[:-20], "is no parquet file"),
    "of a parquet whose end is noise": ("t.parquet", parquet()[:-40] + b"\xff" * 32 + parquet()[-8:], "is no parquet file"),
    "of csv with ragged rows": ("t.csv", b"text,label\na,x\nb\n", "same number of columns"),
    "of csv with a header alone": ("t.csv", b"text,label\n", "but one row"),
    "of csv with zero bytes": ("t.csv", b"text,label\na\0,x\n", "zero bytes"),
    "of a truncated safetensors": ("t.safetensors", GOOD["T.SAFETENSORS"][:-1], "do not end where the file does"),
    "of a safetensors with more behind": ("t.safetensors", GOOD["T.SAFETENSORS"] + b"x", "do not end where the file does"),
    "of a safetensors cut in its header": ("t.safetensors", GOOD["T.SAFETENSORS"][:20], "is no safetensors file"),
    "of a header that is a list": ("t.safetensors", header([1, 2]), "is no safetensors file"),
    "of a header without places": ("t.safetensors", header({"a": {"dtype": "F32"}}), "is no safetensors file"),
    "of a header of numbers": ("t.safetensors", header({"a": 3}), "is no safetensors file"),
    "of a header with places that are none": ("t.safetensors", header({"a": {"data_offsets": [0, "x"]}}), "is no safetensors"),
    "of a header without end": ("t.safetensors", struct.pack("<Q", 40_000) + b"[" * 40_000, "is no safetensors file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_is_refused(explorer, case):
    name, content, words = BAD[case]
    with pytest.raises(BadArtifact) as error:
        uploads.keep(name, content)
    assert words in str(error.value)
    assert name in str(error.value)
    kept = explorer.parent / "home" / "app" / "uploads"
    assert not kept.exists() or not list(kept.iterdir())


def test_a_file_that_is_too_large_is_refused_with_its_size(explorer, monkeypatch):
    monkeypatch.setattr(uploads, "LARGEST", 3_000_000)
    with pytest.raises(BadArtifact, match=r"'big.txt' has 4 MB; 3 are taken"):
        uploads.keep("big.txt", b"x" * 4_000_000)
    assert uploads.keep("fits.txt", b"x" * 3_000_000).exists()


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd.txt", "/etc/x.txt", "..\\x.txt", "a\nb.txt", ".txt.txt", "💾" * 300 + ".txt"]
)
def test_no_name_of_a_file_leads_out_of_its_folder(explorer, name):
    path = uploads.keep(name, b"words")
    assert path.parent == explorer.parent / "home" / "app" / "uploads"
    assert path.exists()


# ---- memory


def test_a_model_needs_the_bytes_of_its_weights_at_the_width_asked_for(tiny_folder):
    weights = sum(file.stat().st_size for file in tiny_folder.glob("*.safetensors"))
    assert memory.needed_bytes(tiny_folder, None) == int(weights * 1.25)
    assert memory.needed_bytes(tiny_folder, "float32") == int(weights * 1.25)
    assert memory.needed_bytes(tiny_folder, "bfloat16") == int(weights / 2 * 1.25)


def test_a_model_that_does_not_fit_is_refused_with_the_figures(tiny_folder, monkeypatch):
    monkeypatch.setattr(memory, "weight_bytes", lambda folder: 8_000_000_000)
    monkeypatch.setattr(memory, "available_bytes", lambda: 4_000_000_000)
    with pytest.raises(memory.TooLarge) as error:
        memory.require_room(str(tiny_folder), None, None, None)
    assert "would take about 10.0 GB, and 4.0 GB are free" in str(error.value)
    assert "Choose bfloat16" in str(error.value)
    with pytest.raises(memory.TooLarge, match=r"about 5\.0 GB as bfloat16, and 4\.5 GB are free"):
        memory.require_room(str(tiny_folder), None, "bfloat16", "cpu", freed=500_000_000)
    assert memory.require_room(str(tiny_folder), None, "bfloat16", None, freed=1_000_000_000) == 5_000_000_000
    assert memory.require_room(str(tiny_folder), None, None, "cuda") == 10_000_000_000


def test_a_model_is_not_refused_where_the_system_does_not_say_what_is_free(tiny_folder, monkeypatch):
    monkeypatch.setattr(memory, "weight_bytes", lambda folder: 10**15)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert memory.require_room(str(tiny_folder), None, None, None) > 10**15


def test_a_model_that_is_not_there_is_named(explorer):
    with pytest.raises(UnknownModel, match="does not exist"):
        memory.require_room(str(explorer / "nothing"), None, None, None)


def test_free_memory_is_some(tiny_folder):
    free = memory.available_bytes()
    assert free is None or 10**6 < free < 10**15
