"""One shard: a safetensors file that is filled in place while activations arrive, hashed, and renamed when it is whole.

Written here rather than by the safetensors library, which wants all tensors in memory at once and copies them: a shard that is
being filled takes no memory of ours.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Names of the dtypes that a store can have, in safetensors."""


class Shard:
    """A shard in the making.

    Args:
        path: Where the unfinished file lies.
        shapes: Of a token's tensor, by site.
        tokens: How many tokens it will hold.
    Raises:
        OSError: if the disk refuses; its space is asked for before anything is written.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], tokens: int, dtype: torch.dtype) -> None:
        self.path, self.tokens, self._row, self._start = path, tokens, {}, {}
        header, end = {}, 0
        for site, shape in shapes.items():
            self._row[site] = math.prod(shape) * dtype.itemsize
            header[site] = {
                "dtype": DTYPES[str(dtype).removeprefix("torch.")],
                "shape": [tokens, *shape],
                "data_offsets": [end, end + tokens * self._row[site]],
            }
            self._start[site], end = end, end + tokens * self._row[site]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors are aligned
        before = len(text).to_bytes(8, "little") + text
        self._start = {site: start + len(before) for site, start in self._start.items()}
        self.bytes = len(before) + end
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self.is_open = True
        try:
            _reserve(self._file, self.bytes)
            _write(self._file, memoryview(before), 0)
        except BaseException:
            self.drop()
            raise

    def write(self, site: str, token: int, values: Tensor) -> None:
        """Put tokens `[n, …]` in from one on. Several threads may do so."""
        raw = values.contiguous().view(-1).view(torch.uint8).numpy().data
        _write(self._file, raw, self._start[site] + token * self._row[site])

    def finish(self, to: Path) -> str:
        """Its SHA-256; the file lies at its place, on the disk itself, when this returns."""
        os.lseek(self._file, 0, os.SEEK_SET)
        with ThreadPoolExecutor(1) as beside, os.fdopen(self._file, "rb", closefd=False) as file:
            synced = beside.submit(os.fsync, self._file)  # the disk works while we hash
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            synced.result()
        self.path.replace(to)
        self._close()
        return sha256

    def drop(self) -> None:
        """Give it up, unless it is finished."""
        if self.is_open:
            self._close()
            self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        self.is_open = False
        os.close(self._file)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reserve(file: int, n: int) -> None:
    """Ask the disk for so many bytes."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, n)
    else:  # macOS: a full disk then shows while it is being filled
        os.truncate(file, n)


def _write(file: int, data: memoryview, at: int) -> None:
    while len(data):
        n = os.pwrite(file, data, at)
        if n == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, at = data[n:], at + n
