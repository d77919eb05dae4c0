"""What is written can be read by others, goes on after any interruption, and is never read when it is not as it was written."""

import errno
import hashlib
import itertools
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import workbench as wb
from workbench.corpus.corpus import STRATA
from workbench.errors import (
    BadArtifact,
    CannotWrite,
    FolderInUse,
    NotFinite,
    OtherJob,
    UnknownOption,
    UnknownSite,
    WorkbenchError,
)
from workbench.store import files, write, writer
from workbench.store import store as store_module
from workbench.streaming.stream import Stream

WORDS = "a dog saw two cats and went home, where nobody was; so it slept until the sun came up again".split()  # noqa: SIM905
TEXTS = [f"{i} " + " ".join(WORDS[i % 11 : i % 11 + n]) for i, n in enumerate([3, 17, 1, 9, 2, 14, 5, 1, 7, 11, 4, 6] * 3)]
CORPUS = wb.Corpus(TEXTS, length=24)
SITES = ["resid_post.1", "z.0"]
SMALL = {"batch_tokens": 100, "shard_tokens": 150, "progress": False}


def captured(model, folder, corpus=CORPUS, sites=SITES, **options):
    return wb.capture_to_store(model, corpus, sites, folder, **(SMALL | options))


def told(model, corpus=CORPUS, sites=SITES, dtype=torch.bfloat16):
    """What the stream gives: tensors and tokens of all batches."""
    batches = list(wb.stream(model, corpus, sites, batch_tokens=100, dtype=dtype, progress=False))
    return {site: torch.cat([b[site] for b in batches]) for site in batches[0]}, pd.concat([b.table for b in batches])


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    """A finished one. Do not change its files."""
    return captured(llama, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def truth(llama):
    return told(llama)


@pytest.fixture
def copied(store, tmp_path):
    """Another one, whose files may be changed."""
    shutil.copytree(store.folder, tmp_path / "copy")
    return tmp_path / "copy"


@contextmanager
def nothing_leaks() -> Iterator[None]:
    """No thread and no file stays open, however the block ends."""

    def held():
        open_files = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return threading.active_count(), sorted(os.readlink(path) for path in open_files if os.path.islink(path))

    before = held()
    yield
    assert held() == before


@contextmanager
def failing(place, name, n, error):
    """A function that works for n calls, and then no more."""
    function, calls = getattr(place, name), itertools.count()

    def fails(*args, **kwargs):
        if next(calls) >= n:
            raise error
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, fails)
        yield


def interrupted(model, folder, *, n=12, **options):
    """A job that is stopped by Ctrl-C after some batches."""
    with nothing_leaks(), failing(writer, "_columns", n, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        captured(model, folder, **options)
    assert (folder / ".job/job.json").is_file()


# What is written


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_shards_are_plain_safetensors_with_the_streams_values(llama, tmp_path, dtype):
    store = captured(llama, tmp_path, dtype=dtype)
    tensors, _ = told(llama, dtype=getattr(torch, dtype))
    shards = [load_file(tmp_path / shard.file) for shard in store.shards]
    assert len(shards) > 3
    for site, values in tensors.items():
        parts = [shard[site] for shard in shards]
        assert [len(part) for part in parts] == [150] * (len(values) // 150) + [len(values) % 150]
        assert torch.equal(torch.cat(parts), values)
        assert values.dtype == store.dtype == getattr(torch, dtype)
    assert [shard.tokens for shard in store.shards] == [len(shard["z.0"]) for shard in shards]


def test_the_folder_holds_an_index_the_tokens_and_the_shards(store, truth):
    assert names(store.folder) - {".lock"} == {"index.json", "tokens.parquet", *(shard.file for shard in store.shards)}
    index = json.loads((store.folder / "index.json").read_text())
    assert index["tokens"] == len(store) == sum(shard["tokens"] for shard in index["shards"]) == len(truth[1])
    assert (index["kind"], index["dtype"]) == ("activation store", "bfloat16")
    assert index["sites"] == {"resid_post.1": [32], "z.0": [4, 8]}
    assert index["median_norm"] > 0
    assert index["limits"] == []
    for shard in index["shards"]:
        file = store.folder / shard["file"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == shard["sha256"]
        assert file.stat().st_size == shard["bytes"]
    wanted = {"model", "weights_hash", "versions", "corpus", "length", "row_length", "packed", "bos", "max_tokens", "sites"}
    assert wanted | {"tokens_hash", "batch_tokens", "window", "kept_dtype", "massive_at", "edited"} <= set(index["settings"])


def test_the_table_has_every_token(store, truth, llama):
    found = pq.read_table(store.folder / "tokens.parquet").to_pandas()
    for column in ("token_id", "document", "offset", "row", "pos", "stratum", "document_id"):
        assert found[column].astype(str).tolist() == truth[1][column].astype(str).tolist(), column
    assert pq.ParquetFile(store.folder / "tokens.parquet").num_row_groups == len(store.shards)
    words = {"stratum": str, "document_id": str}
    pd.testing.assert_frame_equal(store.tokens.astype(words), found.astype(words))
    for row in CORPUS.rows(llama):
        assert sorted(found["pos"][found["row"] == row.index]) == list(range(len(row)))


@pytest.mark.parametrize("family", ["qwen2_moe", "lfm2", "bloom"])
def test_other_families_and_sites(family, tmp_path):
    model = tiny_model(family, check=False)
    sites = ["router_logits.1", "blocks.2.hook_resid_post"] if family == "qwen2_moe" else ["attn.hook_z", "resid_post"]
    sites = sites if family == "qwen2_moe" else ["z.1", "resid_post", "mlp_post.0"]
    store = captured(model, tmp_path, sites=sites, dtype="float32", corpus=wb.Corpus(TEXTS, length=24, packed=True))
    tensors, _ = told(model, wb.Corpus(TEXTS, length=24, packed=True), sites, torch.float32)
    assert store.sites == list(tensors)
    for site, values in tensors.items():
        assert torch.equal(store.read(site), values)


@pytest.mark.parametrize("shard_tokens", [1, 7, 10_000, None])
def test_shards_of_any_length_hold_the_same(llama, tmp_path, truth, shard_tokens):
    texts = wb.Corpus(TEXTS[:4], length=24)
    store = captured(llama, tmp_path, texts, shard_tokens=shard_tokens)
    assert torch.equal(store.read("z.0"), told(llama, texts)[0]["z.0"])
    assert len(store.shards) == (1 if shard_tokens in (None, 10_000) else -(-len(store) // shard_tokens))


def test_what_would_be_too_large_is_refused_before_anything_is_written(llama, tmp_path, monkeypatch):
    with pytest.raises(CannotWrite, match=r"take [\d.]+ kB \([\d,]+ tokens of 128 B\), more than the 10 kB allowed\. Take"):
        captured(llama, tmp_path, max_bytes=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000))
    with pytest.raises(CannotWrite, match=r"needs [\d.]+ kB more in .*, where 20 kB are free\. Make room, .* Nothing was"):
        captured(llama, tmp_path)
    assert names(tmp_path) <= {".lock"}
    captured(llama, tmp_path, sites="resid_post.0", corpus=wb.Corpus(TEXTS[:4]))  # another job in the same folder


def test_half_a_store_needs_room_for_the_other_half_alone(llama, tmp_path, monkeypatch):
    needed = len(told(llama)[1]) * 128
    interrupted(llama, tmp_path)
    done = sum(record.bytes for record in files.finished_shards(tmp_path))
    assert done > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - done - 1))
    with pytest.raises(CannotWrite, match="Nothing was written now"):
        captured(llama, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - done))
    captured(llama, tmp_path)


# Going on


@pytest.mark.parametrize("n", [0, 1, 7, 12, 18])
def test_a_job_that_was_stopped_goes_on_and_writes_the_same_bytes(llama, tmp_path, store, n):
    interrupted(llama, tmp_path, n=n)
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(BadArtifact, match=r"holds an unfinished store\. Run the same capture again to finish it"):
        wb.ActivationStore(tmp_path)
    captured(llama, tmp_path)
    assert fingerprint(tmp_path) == fingerprint(store.folder)


def test_a_store_that_is_whole_is_not_written_again(llama, copied, caplog):
    before = {path: path.stat().st_mtime_ns for path in copied.glob("*.*")}
    (copied / ".job").mkdir()
    (copied / ".job/job.json").write_text("{}")  # as a kill in the last moment leaves it
    (copied / ".tokens.parquet.1.partial").touch()
    with failing(write, "Writer", 0, AssertionError("something was written")):
        captured(llama, copied)
    assert "is whole already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in copied.glob("*.*")} == before
    assert not (copied / ".job").exists()


CHANGES = [
    ({"corpus": wb.Corpus([*TEXTS[:-1], "x"], length=24)}, "the corpus has changed"),
    ({"corpus": wb.Corpus(TEXTS, length=24, max_tokens=500)}, r"max_tokens was None and is now 500; the corpus has changed"),
    ({"corpus": wb.Corpus(TEXTS, length=23)}, r"length was 24 and is now 23; row_length was 24 and is now 23"),
    ({"sites": ["resid_post.1"]}, r"sites was \['resid_post\.1', 'z\.0'\] and is now \['resid_post\.1'\]"),
    ({"dtype": "float16"}, "kept_dtype was 'bfloat16' and is now 'float16'"),
    ({"batch_tokens": 99}, "batch_tokens was 100 and is now 99"),
    ({"shard_tokens": 149}, "shard_tokens was 150 and is now 149"),
    ({"massive_at": None}, "massive_at was 'resid_post.1' and is now None"),
]


def test_another_job_is_refused_and_told_what_differs(llama, store, tmp_path):
    interrupted(llama, tmp_path)
    for folder in (store.folder, tmp_path):
        before = fingerprint(folder)
        for options, text in CHANGES:
            with pytest.raises(OtherJob, match=rf"holds the store of another job: {text}.*name another folder"):
                captured(llama, folder, **options)
        changed = tiny_model("llama", check=False)
        changed.hf.get_input_embeddings().weight.data[5] += 1
        with pytest.raises(OtherJob, match="it is of another model"):
            captured(changed, folder)
        assert fingerprint(folder) == before


def test_another_number_of_threads_is_another_job(llama, store, monkeypatch):
    """They decide in which order sums are taken."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 57)
    with pytest.raises(OtherJob, match=r"threads was \d+ and is now 57"):
        captured(llama, store.folder)


def test_where_memory_ran_out_is_remembered(llama, tmp_path):
    """What was halved is halved again, though there is memory now: another width of a batch gives other last bits."""
    tried = Stream._tried

    def short_of_memory(self, index, rows):
        return None if index > 3 and len(rows) * len(rows[0]) > 60 else tried(self, index, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "_tried", short_of_memory)
        whole = captured(llama, tmp_path / "whole")
        interrupted(llama, tmp_path / "stopped", n=20)
    assert whole.index["limits"][0]["batch"] == 4
    captured(llama, tmp_path / "stopped")
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")


def test_edits_are_recorded_and_an_edited_job_does_not_go_on(llama, tmp_path, store):
    edit = wb.add("resid_post.0", torch.ones(32))
    with wb.intervene(llama, edit):
        edited = captured(llama, tmp_path / "whole")
        assert edited.settings["edited"] is True
        assert not torch.equal(edited.read("resid_post.1"), store.read("resid_post.1"))
        interrupted(llama, tmp_path / "stopped")
        with pytest.raises(OtherJob, match=r"under edits, and whether these are the same cannot be told\. Name another folder"):
            captured(llama, tmp_path / "stopped")
        with pytest.raises(OtherJob, match="edited was False and is now True"):
            captured(llama, store.folder)
    with pytest.raises(OtherJob, match="edited was True and is now False"):
        captured(llama, tmp_path / "stopped")


def test_two_jobs_do_not_write_to_one_folder(llama, tmp_path):
    """The second is refused, and no longer once the first is dead, however it died."""
    lock = (
        "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", lock, tmp_path / ".lock"], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            with pytest.raises(FolderInUse, match=r"Another job is writing to .*\. Wait for it, or name another folder"):
                captured(llama, tmp_path)
            assert names(tmp_path) == {".lock"}
        finally:
            other.kill()
    captured(llama, tmp_path)


# A disk that refuses

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("place", "name", "n"),
    [
        (os, "posix_fallocate", 0), (os, "posix_fallocate", 3), (os, "pwrite", 0), (os, "pwrite", 1), (os, "pwrite", 17),
        (os, "fsync", 0), (os, "fsync", 2), (os, "lseek", 1), (pq, "write_table", 0), (pq, "write_table", 3),
        (pq.ParquetWriter, "write_table", 2), (Path, "write_text", 1), (Path, "write_text", 4),
    ],
)  # fmt: skip
def test_a_full_disk_is_said_and_the_job_goes_on_when_there_is_room(llama, tmp_path, store, place, name, n):
    with nothing_leaks(), failing(place, name, n, FULL), pytest.raises(CannotWrite, match="No space left on device") as raised:
        captured(llama, tmp_path)
    assert "make room" in str(raised.value).lower()
    assert not list(tmp_path.rglob("*.partial"))
    for record in files.finished_shards(tmp_path):
        whole = store.folder / record.file
        assert (tmp_path / record.file).read_bytes() == whole.read_bytes()
    captured(llama, tmp_path)
    assert fingerprint(tmp_path) == fingerprint(store.folder)


def test_a_limit_of_the_system_is_said(llama, tmp_path, store):
    """A real one: files of this process may not grow beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))
    try:
        with (
            nothing_leaks(),
            pytest.raises(CannotWrite, match=r"could not be written on \(File too large\)\. Finished shards stay"),
        ):
            captured(llama, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    captured(llama, tmp_path)
    assert fingerprint(tmp_path) == fingerprint(store.folder)


def test_a_system_that_reserves_nothing_writes_the_same(llama, tmp_path, store, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    captured(llama, tmp_path)
    assert fingerprint(tmp_path) == fingerprint(store.folder)


def test_a_fault_of_a_writing_thread_comes_out_as_it_is(llama, tmp_path):
    with (
        nothing_leaks(),
        failing(os, "pwrite", 5, ZeroDivisionError("a fault")),
        pytest.raises(ZeroDivisionError, match="a fault"),
    ):
        captured(llama, tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_what_the_corpus_is_read_from_may_fail_too(llama, tmp_path):
    """That is no fault of the disk that is written to."""

    class Broken:
        features = None
        left = 60

        def __iter__(self):
            for text in TEXTS:
                self.left -= 1
                if self.left < 0:
                    raise ConnectionError("the network is gone")
                yield {"text": text}

    with nothing_leaks(), pytest.raises(ConnectionError, match="the network is gone"):
        captured(llama, tmp_path, corpus=wb.Corpus(Broken(), length=24))


def test_what_is_no_number_is_not_stored(llama, tmp_path):
    with (
        wb.intervene(llama, wb.replace("resid_post.1", lambda value: value * 1e38)),
        nothing_leaks(),
        pytest.raises(NotFinite, match=r"resid_post\.1 holds \d+ values that are NaN or infinite, in torch\.float16"),
    ):
        captured(llama, tmp_path, dtype="float16")
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "int8"}, r"dtype='int8' is not known\. Use one of 'bfloat16', 'float16', 'float32'"),
        ({"shard_tokens": 0}, "shard_tokens=0 is out of range"),
    ],
)
def test_options_out_of_range(llama, tmp_path, options, text):
    with pytest.raises(UnknownOption, match=text):
        captured(llama, tmp_path, **options)


def test_a_folder_that_cannot_be_one(llama, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=r"Output folder .* cannot be written"):
        captured(llama, tmp_path / "file")


# What is read


def test_opening_reads_no_shard_and_reading_only_what_it_needs(store):
    with failing(store_module, "sha256_of", 0, AssertionError("a file was read")):
        opened = wb.ActivationStore(store.folder)
        assert (len(opened), opened.sites, opened.dtype) == (len(store), SITES, torch.bfloat16)
        assert f": {len(store):,} tokens of 'texts' through 'LlamaForCausalLM', 2 sites, bfloat16, " in repr(opened)
    opened.read("z.0", slice(150, 160))
    assert list(opened._open) == [1]
    opened.read("z.0", [160, 460, 170])
    assert sorted(opened._open) == [1, 3]
    assert f"{store.folder}/shard-00003.safetensors" in Path("/proc/self/maps").read_text()  # mapped, not loaded


ORDINALS = st.integers(-(10**3), 10**3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.slices(800) | st.lists(ORDINALS, max_size=30) | st.none(), site=st.sampled_from(SITES))
def test_any_tokens_in_any_order(store, truth, at, site):
    values = truth[0][site]
    if isinstance(at, list):
        at = [i if -len(values) <= i < len(values) else i % len(values) for i in at]
    wanted = values.numpy(force=True) if values.dtype != torch.bfloat16 else values.view(torch.int16).numpy()
    wanted = wanted[slice(None) if at is None else np.array(at, np.int64) if isinstance(at, list) else at]
    found = store.read(site, at)
    assert found.dtype == store.dtype
    assert np.array_equal(found.view(torch.int16).numpy(), wanted)


def test_tokens_may_be_chosen_by_arrays_tensors_and_masks(store, truth):
    values = truth[0]["resid_post.1"]
    mask = np.arange(len(store)) % 7 == 3
    places = mask.nonzero()[0]
    for at in (mask, torch.from_numpy(mask), mask.tolist(), places, places.astype(np.int32), torch.from_numpy(places)):
        assert torch.equal(store.read("resid_post.1", at), values[torch.from_numpy(mask)])
    for nothing in ([], np.zeros(len(store), bool), slice(5, 5), torch.zeros(0, dtype=torch.long)):
        assert store.read("z.0", nothing).shape == (0, 4, 8)


def test_a_site_is_read_by_any_spelling(store):
    assert torch.equal(store.read("blocks.0.attn.hook_z"), store.read("z.-3"))
    with pytest.raises(UnknownOption, match=r"Site 'resid_post\.2' is not in the store\. It has resid_post\.1, z\.0"):
        store.read("resid_post.2")
    with pytest.raises(UnknownSite, match="Site 'nowhere' does not exist"):
        store.read("nowhere")


@pytest.mark.parametrize(
    "at", [[10**6], [-(10**6)], np.array([0.5]), torch.zeros(1, 1).long(), np.ones(3, bool), np.array(["a"])]
)
def test_tokens_that_there_are_not(store, at):
    with pytest.raises(UnknownOption, match=r"Tokens of this store go from 0 to \d+: a flat list of these is wanted"):
        store.read("z.0", at)


def test_tokens_by_stratum_document_id_and_row(store, truth):
    table = truth[1].reset_index(drop=True)

    def chosen(mask):
        return mask.to_numpy().nonzero()[0].tolist()

    assert store.where().tolist() == list(range(len(store)))
    for kind in STRATA:
        assert store.where(stratum=kind).tolist() == chosen(table["stratum"] == kind)
    assert store.where(stratum=["first", "early"]).tolist() == chosen(table["pos"] < 4)
    assert store.where(document=7).tolist() == store.where(document="7").tolist() == chosen(table["document"] == 7)
    assert store.where(document=[7, "9", np.int64(3)]).tolist() == chosen(table["document"].isin([3, 7, 9]))
    assert store.where(document=store.tokens["document"].iloc[-1]).size
    assert store.where(row=[2, 5], stratum="ordinary").tolist() == chosen(
        table["row"].isin([2, 5]) & (table["stratum"] == "ordinary")
    )
    token = table["token_id"].iloc[0]
    assert store.where(token_id=token).tolist() == chosen(table["token_id"] == token)
    assert not store.where(token_id=299).size
    with pytest.raises(UnknownOption, match=r"stratum='last' is not known\. Use one of 'first', 'early'"):
        store.where(stratum="last")
    for unknown in (999, "x"):
        with pytest.raises(UnknownOption, match=rf"Document {unknown!r} is not in the store\. store\.tokens lists"):
            store.where(document=unknown)


def test_batches_hold_each_token_once_an_epoch(store, truth):
    """Nearly all values are different, so that they tell the token."""
    values = truth[0]["resid_post.1"]
    of = {row.numpy().tobytes(): i for i, row in enumerate(values.view(torch.int16))}
    assert len(of) > 0.9 * len(store)

    def ordinals(batches):
        return [of[row.numpy().tobytes()] for batch in batches for row in batch.view(torch.int16)]

    everything = ordinals([values])
    once, again, other = (ordinals(store.batches("resid_post.1", 64, seed=seed)) for seed in (0, 0, 1))
    assert once == again
    assert once != other
    assert sorted(once) == sorted(other) == sorted(everything)
    assert ordinals(store.batches("resid_post.1", 64, shuffle=False)) == everything
    twice = ordinals(store.batches("resid_post.1", 64, epochs=2))
    assert twice[: len(store)] == once
    assert sorted(twice[len(store) :]) == sorted(everything)
    assert twice[len(store) :] not in (once, other)
    assert [len(batch) for batch in store.batches("z.0", 1000)] == [1000, len(store) - 1000]
    some = store.where(stratum="ordinary")
    assert sorted(ordinals(store.batches("resid_post.1", 64, at=some))) == sorted(everything[i] for i in some)


def test_the_order_is_that_of_a_uniform_permutation(store):
    """Each batch draws from each shard in proportion, neighbours are parted, and no place keeps its token."""
    index = np.arange(100_000)
    order = np.concatenate(list(store_module._chosen(index, 4096, True, 0, 1)))
    shard, batch = order // 10_000, index // 4096
    found = np.array([[((shard == s) & (batch == b)).sum() for s in range(10)] for b in range(24)])
    chi_squared = ((found - 409.6) ** 2 / 409.6).sum()
    assert 130 < chi_squared < 300  # of about 24 x 9 = 216 degrees of freedom: mean 216 x 0.96, standard deviation 20
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert (order == index).sum() < 10
    mixed = [set((store.where()[chosen] // 150).tolist()) for chosen in store_module._chosen(store.where(), 64, True, 3, 1)]
    assert all(len(shards) >= len(store.shards) - 1 for shards in mixed[:-1])  # the last one is small


def test_batches_of_several_sites_belong_together(store):
    both = list(store.batches(["z.0", "blocks.1.hook_resid_post"], 100, dtype=torch.float32, seed=5))
    alone = [list(store.batches(site, 100, dtype=torch.float32, seed=5)) for site in ("z.0", "resid_post.1")]
    for batch, z, resid in zip(both, *alone, strict=True):
        assert list(batch) == ["z.0", "resid_post.1"]
        assert batch["z.0"].dtype == torch.float32
        assert torch.equal(batch["z.0"], z)
        assert torch.equal(batch["resid_post.1"], resid)


def test_batches_without_end_and_left_half_way(store):
    with nothing_leaks():
        endless = store.batches("z.0", 1000, epochs=None)
        assert [len(next(endless)) for _ in range(5)] == [1000, len(store) - 1000, 1000, len(store) - 1000, 1000]
        endless.close()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 0}, r"size=0 is out of range"),
        ({"size": 4, "at": []}, r"No token was chosen, so there is no batch\. Choose others with at="),
        ({"size": 4, "sites": "z.2"}, "is not in the store"),
    ],
)
def test_batches_are_refused_at_once(store, options, text):
    with pytest.raises(UnknownOption, match=text):
        store.batches(**({"sites": "z.0"} | options))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_pytorchs_loader_gives_each_token_once(store, truth, workers):
    def rows(tensor):
        return sorted(row.numpy().tobytes() for row in tensor.flatten(1).view(torch.int16))

    loader = DataLoader(
        store.dataset("z.0"), 200, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(0)
    )
    batches = list(loader)
    assert [len(batch) for batch in batches] == [200] * (len(store) // 200) + [len(store) % 200]
    found = torch.cat(batches)
    assert not torch.equal(found, truth[0]["z.0"])
    assert rows(found) == rows(truth[0]["z.0"])
    both = next(iter(DataLoader(store.dataset(SITES, at=[9, 3, -1], dtype=torch.float32), 3, num_workers=workers)))
    for site, values in truth[0].items():
        assert torch.equal(both[site], values[[9, 3, -1]].float())


def test_the_dataset_is_a_sequence(store, truth):
    dataset = store.dataset("resid_post.1", at=slice(10, 20))
    assert len(dataset) == 10
    assert torch.equal(dataset[-1], truth[0]["resid_post.1"][19])
    with pytest.raises(IndexError):
        dataset[10]


def test_the_loaders_processes_need_not_compare_the_shards_again(store):
    dataset = wb.ActivationStore(store.folder).dataset("z.0")
    sent = pickle.loads(pickle.dumps(dataset))
    with failing(store_module, "sha256_of", 0, AssertionError("a shard was read again")):
        assert torch.equal(sent[3], store.read("z.0", [3])[0])


# What is not as it was written


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-7])
    else:
        place = {"values": -100, "header": 60}[how]
        data[place] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated", "values", "header"])
def test_a_damaged_shard_is_named_and_not_read(copied, truth, how):
    damage(copied / "shard-00002.safetensors", how)
    said = {"missing": "is missing", "truncated": r"has [\d,]+ bytes in place of [\d,]+"}
    if how in said:
        with pytest.raises(BadArtifact, match=rf"Shard .*shard-00002\.safetensors' {said[how]}\. Nothing is read from it"):
            wb.ActivationStore(copied)
        return
    store = wb.ActivationStore(copied)
    assert torch.equal(store.read("z.0", slice(0, 300)), truth[0]["z.0"][:300])  # the others
    wrong = r"Shard .*shard-00002\.safetensors' is not as it was written \(SHA-256 \w{12}… in place of \w{12}…\)\. Nothing"
    for read in (
        lambda: store.read("z.0", [320]),
        lambda: store.read("resid_post.1"),
        lambda: list(store.batches("z.0", 100)),
        lambda: store.dataset("z.0"),
        store.verify,
    ):
        with pytest.raises(BadArtifact, match=wrong):
            read()


def test_damage_after_the_first_reading_is_found_by_verify(copied):
    store = wb.ActivationStore(copied)
    store.verify()
    damage(copied / "shard-00001.safetensors", "values")
    with pytest.raises(BadArtifact, match="shard-00001"):
        store.verify()


def test_without_the_check_a_header_that_is_none_is_still_refused(copied):
    store = wb.ActivationStore(copied, check=False)
    path = copied / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(BadArtifact, match=r"shard-00002\.safetensors' is not as it was written"):
        store.read("z.0", [320])


@pytest.mark.parametrize("how", ["missing", "truncated", "values"])
def test_damaged_tokens_are_named_and_not_read(copied, how):
    damage(copied / "tokens.parquet", how)
    store = wb.ActivationStore(copied)
    for read in (lambda: store.tokens, lambda: store.where(stratum="first"), store.verify):
        with pytest.raises(BadArtifact, match=r"tokens\.parquet' is missing or was altered\. Capture the store again"):
            read()
    assert len(store.read("z.0")) == len(store)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, r"holds no activation store\. Make one with workbench capture, or mend the path"),
        ("{", "cannot be read as JSON"),
        ('{"kind": "neuron map"}', r"is not the index of an activation store\. Name the folder of one"),
        ("[]", "is not the index"),
        ('{"kind": "activation store"}', r"index\.json' lacks tokens, dtype, sites, shards, .*\. Capture the store again"),
    ],
)
def test_a_folder_that_holds_no_store(tmp_path, content, text):
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(BadArtifact, match=text):
        wb.ActivationStore(tmp_path)


def test_a_store_of_another_model_is_refused(store, llama):
    store.require_model(llama)
    other = tiny_model("gpt2", check=False)
    with pytest.raises(OtherJob, match=r"was made with 'LlamaForCausalLM' \(\w{12}…\), not with the weights of .*\. Capture"):
        store.require_model(other)


def test_every_error_is_one_that_a_user_can_cause():
    for error in (BadArtifact, CannotWrite, FolderInUse, OtherJob):
        assert issubclass(error, WorkbenchError)


def test_a_job_killed_at_any_moment_goes_on_and_writes_the_same_bytes(tmp_path):
    """In each phase once; `python tests/kill_capture.py` does so at 60 random moments."""
    script = Path(__file__).with_name("kill_capture.py")
    done = subprocess.run([sys.executable, script, "--each-phase"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["differing"] == []
    assert found["killed_while"] == {"counting": 1, "writing": 2, "merging": 1, "clearing": 1}
