"""Filling shards in threads, so that the model need not wait for the disk."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.artifacts import staged, write_json
from workbench.corpus.corpus import STRATA
from workbench.errors import CannotWrite
from workbench.store.files import JOB, Record, shard_name
from workbench.store.shard import Shard
from workbench.streaming.stream import Stream
from workbench.streaming.token_batch import TokenBatch

if TYPE_CHECKING:
    import pyarrow as pa

_AHEAD = 3
"""Batches that may wait to be written while the model goes on."""
_WRITERS, _FINISHERS = 4, max(2, (os.cpu_count() or 1) // 2)
"""Threads that write, as copying into the page cache by one alone is slower than fast disks are; and that make shards whole:
enough of them that the disk is never idle."""


class Writer:
    """Takes batches from the stream and fills shards in threads of its own, so that the model need not wait."""

    def __init__(
        self, folder: Path, stream: Stream, shard_tokens: int, done: list[Record], save_state: Callable[[], None]
    ) -> None:
        """
        Args:
            done: Shards that are finished already.
            save_state: Called when the stream's state has changed, before any shard that it decides is finished.
        """
        self.folder, self.stream, self.shard_tokens, self.save_state = folder, stream, shard_tokens, save_state
        self.tokens = stream.counted.count.tokens
        self.dtype = stream.dtype or stream.model.dtype
        self.shapes = {str(site): stream.shape(site) for site in stream.sites}
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
        state = self.stream.state.to_json()
        with ThreadPoolExecutor(_WRITERS) as self.threads, ThreadPoolExecutor(_FINISHERS) as self.finishers:
            try:
                for batch, first in self.stream.after(self.written, self.tokens):
                    if self.stream.state.to_json() != state:
                        state = self.stream.state.to_json()
                        self.save_state()
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
                left = self.tokens - self.written
                path = self.folder / JOB / f"{shard_name(self.shards)}.partial"
                self.shard = Shard(path, self.shapes, min(self.shard_tokens, left), self.dtype)
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
