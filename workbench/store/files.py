"""What lies in a store's folder, and what lies in it while it is being written.

    index.json  tokens.parquet  shard-00000.safetensors  shard-00001.safetensors  …
    .job/       job.json  shard-00002.json  tokens-00002.parquet  shard-00003.partial      (until the job is done)

A folder with an index.json is whole. A shard is finished when its record, `.job/shard-….json`, is there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from workbench.artifacts import read_json, staged, write_json
from workbench.errors import BadArtifact, OtherJob

KIND = "activation store"
INDEX, TOKENS, JOB = "index.json", "tokens.parquet", ".job"


KEYS = ("tokens", "dtype", "sites", "shards", "tokens_sha256", "settings")
"""What an index must have to be read."""


class Record(NamedTuple):
    """A finished shard."""

    file: str
    tokens: int
    bytes: int
    sha256: str


def shard_name(number: int) -> str:
    """Of its files, without what comes after the dot."""
    return f"shard-{number:05d}"


def read_index(folder: Path) -> dict[str, Any]:
    """
    Raises:
        BadArtifact: if the folder holds no store, or an unfinished one.
    """
    if not (folder / INDEX).is_file():
        unfinished = (folder / JOB / "job.json").is_file()
        how = "holds an unfinished store. Run the same capture again to finish it" if unfinished else (
            "holds no activation store. Make one with workbench capture, or mend the path"
        )  # fmt: skip
        raise BadArtifact(f"Folder {str(folder)!r} {how}.")
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or index.get("kind") != KIND:
        raise BadArtifact(f"{str(folder / INDEX)!r} is not the index of an {KIND}. Name the folder of one.")
    if lacking := [key for key in KEYS if key not in index]:
        raise BadArtifact(f"{str(folder / INDEX)!r} lacks {', '.join(lacking)}. Capture the store again.")
    return index


def require_same_job(found: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """
    Raises:
        OtherJob: naming the settings that differ.
    """
    differing = [key for key in asked if found.get(key) != asked[key]]
    if not differing:
        return
    reasons = {"tokens_hash": "the corpus has changed", "weights_hash": "it is of another model"}
    words = [
        reasons.get(key, f"{key} was {_short(found.get(key))} and is now {_short(asked[key])}") for key in differing
    ]  # fmt: skip
    raise OtherJob(
        f"Folder {str(folder)!r} holds the store of another job: {'; '.join(words[:4])}. Give that job's settings to go on "
        "with it, or name another folder."
    )


def finished_shards(folder: Path) -> list[Record]:
    """Shards from the first on that are finished and have their size."""
    found: list[Record] = []
    while (record := folder / JOB / f"{shard_name(len(found))}.json").is_file():
        shard = Record(**read_json(record))
        file = folder / shard.file
        if not file.is_file() or file.stat().st_size != shard.bytes:
            break
        found.append(shard)
    return found


def clear(folder: Path) -> None:
    """Take away what a killed job had not finished, and after the last write all that only the job needs.

    While files of it are there, a folder with an index is whole, but not clean."""
    staged_here = [half for name in (INDEX, TOKENS) for half in folder.glob(f".{name}.*.partial")]
    for half in [*staged_here, *folder.glob(f"{JOB}/*.partial"), *folder.glob(f"{JOB}/.*.partial")]:
        half.unlink(missing_ok=True)
    if (folder / INDEX).is_file():
        shutil.rmtree(folder / JOB, ignore_errors=True)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """The last write of a job: with it the store is whole."""
    write_json(folder / INDEX, {"kind": KIND} | index)


def merge_tokens(folder: Path, parts: int) -> None:
    """One table of all tokens, a row group a shard, from the shards' own."""
    import pyarrow.parquet as pq

    with staged(folder / TOKENS) as beside:
        first = pq.read_schema(folder / JOB / "tokens-00000.parquet")
        with pq.ParquetWriter(beside, first, compression="zstd") as writer:
            for number in range(parts):
                writer.write_table(pq.read_table(folder / JOB / f"tokens-{number:05d}.parquet"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
