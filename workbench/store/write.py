"""Writing a store: a stream of activations into shards, which any interruption leaves so that the same call goes on."""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from workbench.artifacts import output_folder, read_json, staged, write_json
from workbench.corpus.corpus import STRATA, Corpus
from workbench.errors import CannotWrite, FolderInUse, OtherJob, UnknownOption, require_one_of
from workbench.model import LanguageModel
from workbench.results import versions
from workbench.sites import Site
from workbench.store import files
from workbench.store.files import JOB, Record, shard_name
from workbench.store.shard import DTYPES, Shard, sha256_of
from workbench.store.store import ActivationStore
from workbench.streaming.plan import shown_bytes
from workbench.streaming.stream import Stream, StreamState, TokenBatch, stream
from workbench.tracer import is_edited

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

SHARD_BYTES = 512_000_000
"""Of a shard, if its number of tokens is not given: few files of a large store, and a short way back after a crash."""
_ROUND = 1024
_AHEAD = 3
"""Batches that may wait to be written while the model goes on."""
_WRITERS, _FINISHERS = 4, max(2, (os.cpu_count() or 1) // 2)
"""Threads that write, as copying into the page cache by one alone is slower than fast disks are; and that make shards whole:
enough of them that the disk is never idle."""


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
            _Writer(self, done).write()
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
                "sites": {str(site): list(shape) for site, shape in self.shapes.items()},
                **self.stream.state.to_json(),
                "shards": [shard._asdict() for shard in shards],
                "tokens_sha256": sha256_of(self.folder / files.TOKENS),
                "settings": self.settings,
            },
        )

    @cached_property
    def shapes(self) -> dict[Site, tuple[int, ...]]:
        """Of a token's tensor, by site."""
        return {site: self.stream.shape(site) for site in self.stream.sites}


class _Writer:
    """Takes batches from the stream and fills shards in threads of its own, so that the model need not wait."""

    def __init__(self, job: StoreJob, done: list[Record]) -> None:
        self.job, self.folder = job, job.folder
        self.shards = len(done)
        """How many were begun."""
        self.written = sum(record.tokens for record in done)
        self.shard: Shard | None = None
        """The one that is being filled."""
        self.open: list[Shard] = []
        """All that may not be finished."""
        self.filled = 0
        """Tokens of the shard that were given to the threads."""
        self.columns: list[pa.Table] = []
        self.pending: deque[list[Future[None]]] = deque()
        self.unwritten: list[Future[None]] = []
        """Of the shard that is being filled."""

    def write(self) -> None:
        """
        Raises:
            CannotWrite: if the disk refuses; shards that are finished stay.
        """
        job = self.job
        state = job.stream.state.to_json()
        with ThreadPoolExecutor(_WRITERS) as self.threads, ThreadPoolExecutor(_FINISHERS) as self.finishers:
            try:
                for batch, first in job.stream.after(self.written, job.tokens):
                    if job.stream.state.to_json() != state:
                        state = job.stream.state.to_json()
                        job.save_state()  # before any shard that it decides is finished
                    with self._disk():
                        self._put(batch, first)
                with self._disk():
                    for futures in self.pending:
                        _wait(futures)
            finally:
                self.threads.shutdown(cancel_futures=True)
                self.finishers.shutdown(cancel_futures=True)
                for shard in self.open:
                    shard.drop()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """
        Raises:
            CannotWrite: if the disk refuses. (What the corpus is read from may refuse too: that is another matter.)
        """
        try:
            yield
        except (OSError, CannotWrite) as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            raise CannotWrite(
                f"The store in {str(self.folder)!r} could not be written on ({reason}). Finished shards stay: make room, and "
                "give the same command again."
            ) from None

    def _put(self, batch: TokenBatch, first: int) -> None:
        """Hand a batch over, from its token `first` on."""
        futures: list[Future[None]] = []
        while first < batch.tokens.n:
            if self.shard is None:
                left = self.job.tokens - self.written
                path = self.folder / JOB / f"{shard_name(self.shards)}.partial"
                shapes = {str(site): shape for site, shape in self.job.shapes.items()}
                self.shard = Shard(path, shapes, min(self.job.shard_tokens, left), self.job.dtype)
                self.open = [shard for shard in self.open if shard.is_open] + [self.shard]
                self.shards, self.filled, self.columns, self.unwritten = self.shards + 1, 0, [], []
            n = min(batch.tokens.n - first, self.shard.tokens - self.filled)
            for site, values in batch.items():
                self.unwritten.append(self.threads.submit(self.shard.write, site, self.filled, values[first : first + n]))
            futures += self.unwritten[-len(batch) :]
            self.columns.append(_columns(batch, slice(first, first + n)))
            self.filled, self.written, first = self.filled + n, self.written + n, first + n
            if self.filled == self.shard.tokens:
                futures.append(self.finishers.submit(self._finish, self.shard, self.shards - 1, self.columns, self.unwritten))
                self.shard = None
        self.pending.append(futures)
        while len(self.pending) > _AHEAD:
            _wait(self.pending.popleft())

    def _finish(self, shard: Shard, number: int, columns: list[pa.Table], unwritten: list[Future[None]]) -> None:
        """Make a shard whole: its file, its tokens, and last the record that says so."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        _wait(unwritten)
        name = shard_name(number)
        sha256 = shard.finish(self.folder / f"{name}.safetensors")
        with staged(self.folder / JOB / f"tokens-{number:05d}.parquet") as beside:
            pq.write_table(pa.concat_tables(columns), beside, compression="zstd")
        record = Record(f"{name}.safetensors", shard.tokens, shard.bytes, sha256)
        write_json(self.folder / JOB / f"{name}.json", record._asdict())


def _columns(batch: TokenBatch, part: slice) -> pa.Table:
    """A row a token: token_id, document, offset, row, pos, stratum, document_id."""
    import pyarrow as pa

    columns: dict[str, Any] = {name: values[part] for name, values in batch.tokens._asdict().items()}
    ordinals, which = np.unique(columns["document"], return_inverse=True)
    columns["document_id"] = pa.array([batch.documents[i] for i in ordinals.tolist()], pa.string()).take(pa.array(which))
    columns["stratum"] = pa.array(STRATA).take(pa.array(columns["stratum"]))
    return pa.table(columns)


def _wait(futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()


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
