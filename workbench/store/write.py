"""Writing a store: a stream of activations into shards, which any interruption leaves so that the same call goes on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from workbench.artifacts import output_folder, read_json, write_json
from workbench.corpus.corpus import Corpus
from workbench.errors import CannotWrite, FolderInUse, OtherJob, UnknownOption, require_one_of
from workbench.model import LanguageModel
from workbench.results import versions
from workbench.store import files
from workbench.store.files import JOB, Record
from workbench.store.shard import DTYPES, sha256_of
from workbench.store.store import ActivationStore
from workbench.store.writer import Writer
from workbench.streaming.plan import shown_bytes
from workbench.streaming.state import StreamState
from workbench.streaming.stream import Stream, stream
from workbench.tracer import is_edited

log = logging.getLogger(__name__)

SHARD_BYTES = 512_000_000
"""Of a shard, if its number of tokens is not given: few files of a large store, and a short way back after a crash."""
_ROUND = 1024


def capture_to_store(
    model: LanguageModel,
    corpus: Corpus | Any,
    sites: str | Sequence[str],
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    batch_tokens: int | None = None,
    shard_tokens: int | None = None,
    massive_at: str | None = "middle",
    max_bytes: int | float | None = None,
    progress: bool = True,
) -> ActivationStore:
    """Run a model over a corpus and write the activations of its real tokens to a folder; see `ActivationStore`.

    The corpus is counted first, and nothing is written unless all of it has room. The same call in the same folder goes on
    after any interruption, and what it writes is the same, byte for byte, as without one. (That needs the same device, versions
    and number of threads; they are compared.)

    Args:
        sites, batch_tokens, massive_at: As in `stream`.
        dtype: Of the store: `bfloat16`, `float16` or `float32`.
        shard_tokens: Tokens of a file; as many as make 512 MB, if None.
        max_bytes: Refuse to write more than this.
    Raises:
        BadCorpus, UnknownSite, NotFinite, OutOfMemory: as `stream`.
        CannotWrite: if the folder cannot be written, or the disk has no room; finished shards stay.
        FolderInUse: if another job is writing there.
        OtherJob: if the folder holds the store, finished or not, of other settings, another model, or a changed corpus.
    """
    return StoreJob(
        model, corpus, sites, folder, dtype=dtype, batch_tokens=batch_tokens, shard_tokens=shard_tokens,
        massive_at=massive_at, max_bytes=max_bytes, progress=progress,
    ).run()  # fmt: skip


class StoreJob:
    """What `capture_to_store` runs; `job.stream.plan()` says first what it will take."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus | Any,
        sites: str | Sequence[str],
        folder: str | Path,
        *,
        dtype: str,
        batch_tokens: int | None,
        shard_tokens: int | None,
        massive_at: str | None,
        max_bytes: int | float | None,
        progress: bool,
    ) -> None:
        require_one_of("dtype", dtype, tuple(DTYPES))
        if shard_tokens is not None and shard_tokens < 1:
            raise UnknownOption(f"shard_tokens={shard_tokens} is out of range: a shard has 1 or more.")
        self.model, self.folder, self.max_bytes, self.dtype = model, Path(folder), max_bytes, getattr(torch, dtype)
        self.stream: Stream = stream(
            model, corpus, sites, batch_tokens=batch_tokens, dtype=self.dtype, device="cpu", massive_at=massive_at,
            progress=progress,
        )  # fmt: skip
        self.edited = is_edited(model)
        self.shard_tokens = shard_tokens or _shard_tokens(self.stream.bytes_per_token)

    @property
    def tokens(self) -> int:
        return self.stream.counted.count.tokens

    @property
    def bytes(self) -> int:
        """Of all activations, counted before any is written."""
        return self.tokens * self.stream.bytes_per_token

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that decides the bytes of the store."""
        where = torch.cuda.get_device_name(self.model.device) if self.model.device.type == "cuda" else "cpu"
        return self.model.provenance | self.stream.settings | {
            "n_layers": self.model.n_layers, "tokens_hash": self.stream.counted.count.tokens_hash,
            "shard_tokens": self.shard_tokens,
            "computed_on": where, "threads": torch.get_num_threads() if where == "cpu" else None, "versions": versions(),
            "edited": self.edited,
        }  # fmt: skip

    def run(self) -> ActivationStore:
        """Write the store, or what is missing of it."""
        output_folder(self.folder)
        with _locked(self.folder):
            files.clear(self.folder)
            if (self.folder / files.INDEX).is_file():
                files.require_same_job(files.read_index(self.folder)["settings"], self.settings, self.folder)
                log.warning("The store in %s is whole already.", self.folder)
                return ActivationStore(self.folder)
            done = self._begun()
            self._require_room(sum(record.bytes for record in done))
            output_folder(self.folder / JOB)
            self.save_state()
            Writer(self.folder, self.stream, self.shard_tokens, done, self.save_state).write()
            files.merge_tokens(self.folder, len(files.finished_shards(self.folder)))
            self._write_index()
            files.clear(self.folder)
        return ActivationStore(self.folder)

    def _begun(self) -> list[Record]:
        """The finished shards of the same job, if it was begun before.

        Raises:
            OtherJob: if the folder holds another one, or perhaps another one.
        """
        kept = self.folder / JOB / "job.json"
        if not kept.is_file():
            return []
        saved = read_json(kept)
        files.require_same_job(saved["settings"], self.settings, self.folder)
        if self.edited:
            raise OtherJob(
                f"Folder {str(self.folder)!r} holds an unfinished store of a model under edits, and whether these are the same "
                "cannot be told. Name another folder."
            )
        self.stream.state = StreamState.from_json(saved["state"])
        return files.finished_shards(self.folder)

    def save_state(self) -> None:
        write_json(self.folder / JOB / "job.json", {"settings": self.settings, "state": self.stream.state.to_json()})

    def _require_room(self, written: int) -> None:
        """
        Raises:
            CannotWrite: if the store would be larger than allowed, or than the disk has room for.
        """
        needed = self.bytes - written
        if self.max_bytes is not None and self.bytes > self.max_bytes:
            raise CannotWrite(
                f"The store would take {shown_bytes(self.bytes)} ({self.tokens:,} tokens of "
                f"{shown_bytes(self.stream.bytes_per_token)}), more than the {shown_bytes(self.max_bytes)} allowed. Take fewer "
                "sites, layers or tokens, or a smaller dtype."
            )
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise CannotWrite(
                f"The store needs {shown_bytes(needed)} more in {str(self.folder)!r}, where {shown_bytes(free)} are free. "
                "Make room, or take fewer sites, layers or tokens, or a smaller dtype. Nothing was written now."
            )

    def _write_index(self) -> None:
        shards = files.finished_shards(self.folder)
        files.write_index(
            self.folder,
            {
                "tokens": self.tokens,
                "dtype": str(self.dtype).removeprefix("torch."),
                "sites": {str(site): list(self.stream.shape(site)) for site in self.stream.sites},
                **self.stream.state.to_json(),
                "shards": [shard._asdict() for shard in shards],
                "tokens_sha256": sha256_of(self.folder / files.TOKENS),
                "settings": self.settings,
            },
        )


def _shard_tokens(bytes_per_token: int) -> int:
    return max(_ROUND, SHARD_BYTES // bytes_per_token // _ROUND * _ROUND)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While open, no other job can write there. The system lets go of the lock when the process ends, however it does.

    Raises:
        FolderInUse: if another one does.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FolderInUse(f"Another job is writing to {str(folder)!r}. Wait for it, or name another folder.") from None
    try:
        yield
    finally:
        lock.release()
