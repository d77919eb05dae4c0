"""Files of the user's: looked at before anything reads them, kept by their hash, never unpickled."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import streamlit as st

from app.places import own_folder
from workbench.errors import BadArtifact

LARGEST = 64_000_000
"""Bytes."""


def upload(label: str, endings: tuple[str, ...], *, key: str) -> Path | None:
    """A place for a file; where it lies now, to be named on a command line."""
    with st.expander(label):
        given = st.file_uploader(
            label, list(endings), key=key, label_visibility="collapsed", max_upload_size=LARGEST // 1_000_000
        )
        if given is None:
            return None
        try:
            path = keep(given.name, given.getvalue())
        except BadArtifact as error:
            st.error(str(error))
            return None
        st.caption("It was looked at and is kept here; copy its path into the form:")
        st.code(str(path), language=None)
        return path


def keep(name: str, content: bytes) -> Path:
    """Check a file by what its ending promises, and keep it under its hash.

    Raises:
        BadArtifact: if it is too large, of no kind that is taken, or not what its ending says.
    """
    ending = Path(name).suffix.lower().removeprefix(".")
    if ending not in CHECKS:
        raise BadArtifact(f"{name!r}: only {', '.join(CHECKS)} are taken. Pickled files (.pt, .bin, .pkl) never are.")
    if len(content) > LARGEST:
        raise BadArtifact(f"{name!r} has {len(content) / 1e6:.0f} MB; {LARGEST / 1e6:.0f} are taken. Name a path in the form.")
    try:
        CHECKS[ending](content)
    except _NOT_THAT as error:
        raise BadArtifact(f"{name!r} is no {ending} file: {error}. Look at it with another program.") from None
    stem = re.sub(r"[^\w-]+", "_", Path(name).stem)[:40] or "file"
    path = own_folder("uploads") / f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}.{ending}"
    if not path.exists():
        path.write_bytes(content)
    return path


def _text(content: bytes) -> None:
    if not content.strip():
        raise ValueError("it is empty")
    if b"\0" in content:
        raise ValueError("it holds zero bytes")
    content.decode("utf-8")


def _csv(content: bytes) -> None:
    _text(content)
    rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))
    if len(rows) < 2 or len({len(row) for row in rows if row}) != 1:
        raise ValueError("its rows have not all the same number of columns, or there is but one row")


def _parquet(content: bytes) -> None:
    import pyarrow.parquet as parquet

    parquet.ParquetFile(io.BytesIO(content))  # reads the schema alone; pyarrow's error is a ValueError


def _safetensors(content: bytes) -> None:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != len(content):
        raise ValueError("its tensors do not end where the file does")


_NOT_THAT = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError, struct.error, csv.Error)
"""What reading a file raises that is of another kind: OSError is pyarrow's, for a parquet file whose end is none."""
CHECKS: dict[str, Callable[[bytes], None]] = {
    "txt": _text, "csv": _csv, "parquet": _parquet, "safetensors": _safetensors,
}  # fmt: skip
