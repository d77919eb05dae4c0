"""Where a corpus's documents come from: texts in hand, files, datasets. Read one after another, never all at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from workbench.errors import BadCorpus

SHIPPED = Path(__file__).parents[2] / "data" / "corpora"
"""Corpora that come with the project, a Parquet file each."""


def shipped() -> dict[str, dict[str, Any]]:
    """What is known of each shipped corpus, by name: size, licence, source, closeness to web text. Empty where they are not
    installed: they lie in the project's own checkout."""
    about = SHIPPED / "corpora.json"
    return json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}


class Document(NamedTuple):
    """A text with a name."""

    id: str
    text: str


@runtime_checkable
class Source(Protocol):
    """Documents, in an order that does not change."""

    @property
    def name(self) -> str: ...

    def __iter__(self) -> Iterator[Document]: ...


def source_of(given: Any, column: str) -> Source:
    """The source that a user names: texts, a path, the name of a shipped corpus, or a Hugging Face dataset.

    Raises:
        BadCorpus: if it is none of these, or the file does not exist or has another kind.
    """
    if isinstance(given, (str, Path)):
        return _file(given, column)
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        for i, text in enumerate(given):
            if not isinstance(text, str):
                raise BadCorpus(f"Text {i} is a {type(text).__name__}, not a string. Give a list of strings.")
        return Texts(tuple(given))
    if isinstance(given, Iterable) and hasattr(given, "features"):
        return Dataset(given, column)
    raise BadCorpus(
        f"A corpus cannot be made of a {type(given).__name__}. Give a list of texts, the path of a .txt, .jsonl or .parquet "
        "file, the name of a shipped corpus, or a Hugging Face dataset."
    )


@dataclass(frozen=True)
class Texts:
    """Texts in hand, a document each."""

    texts: tuple[str, ...]
    name: str = "texts"

    def __iter__(self) -> Iterator[Document]:
        return (Document(str(i), text) for i, text in enumerate(self.texts))


@dataclass(frozen=True)
class _File:
    path: Path
    column: str

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class TextFile(_File):
    """A document per block of lines; blocks are separated by blank lines."""

    def __iter__(self) -> Iterator[Document]:
        block: list[str] = []
        n = 0
        for line in _lines(self.path):
            if line.strip():
                block.append(line)
            elif block:
                yield Document(str(n), "".join(block).rstrip("\n"))
                block, n = [], n + 1
        if block:
            yield Document(str(n), "".join(block).rstrip("\n"))


@dataclass(frozen=True)
class JsonLines(_File):
    """A JSON object a line, with the text in one of its fields and its name, if it has one, in `id`."""

    def __iter__(self) -> Iterator[Document]:
        n = 0
        for number, line in enumerate(_lines(self.path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadCorpus(
                    f"Line {number} of {str(self.path)!r} is no JSON ({error}). Mend it, or take the line out."
                ) from None
            if not isinstance(row, dict) or not isinstance(row.get(self.column), str):
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise BadCorpus(
                    f"Line {number} of {str(self.path)!r} has no text in {self.column!r}; it has {has}. Name it with column=."
                )
            yield Document(_name(row, n), row[self.column])
            n += 1


@dataclass(frozen=True)
class Parquet(_File):
    """A row a document, with the text in one column and its name, if it has one, in `id`."""

    def __iter__(self) -> Iterator[Document]:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException, types

        try:
            with pq.ParquetFile(self.path) as file:
                has = file.schema_arrow.names
                if self.column not in has:
                    raise BadCorpus(
                        f"{str(self.path)!r} has no column {self.column!r}; it has {', '.join(has)}. Name it with column=."
                    )
                kind = file.schema_arrow.field(self.column).type
                kind = kind.value_type if types.is_dictionary(kind) else kind
                if not any(is_text(kind) for is_text in (types.is_string, types.is_large_string, types.is_string_view)):
                    raise BadCorpus(
                        f"Column {self.column!r} of {str(self.path)!r} holds {kind}, no text. Name another with column=."
                    )
                named = ["id"] if "id" in has else []
                n = 0
                for part in file.iter_batches(256, columns=[self.column, *named]):
                    for row in part.to_pylist():
                        yield Document(_name(row, n), row[self.column] or "")
                        n += 1
        except (ArrowException, OSError) as error:  # a page that does not unpack is an OSError
            reason = str(error).splitlines()[0]
            raise BadCorpus(f"{str(self.path)!r} cannot be read as Parquet ({reason}). Write it again.") from None


@dataclass(frozen=True)
class Dataset:
    """A dataset of the datasets library, streaming or not."""

    dataset: Any
    column: str

    @property
    def name(self) -> str:
        return str(getattr(getattr(self.dataset, "info", None), "dataset_name", None) or type(self.dataset).__name__)

    def __iter__(self) -> Iterator[Document]:
        for n, row in enumerate(self.dataset):
            if self.column not in row:
                raise BadCorpus(
                    f"The dataset has no column {self.column!r}; it has {', '.join(row)}. Name the column with column=."
                )
            text = "" if row[self.column] is None else row[self.column]
            if not isinstance(text, str):
                raise BadCorpus(
                    f"Column {self.column!r} of the dataset holds a {type(text).__name__}, no text, in row {n}. Name another."
                )
            yield Document(_name(row, n), text)


_KINDS = {".txt": TextFile, ".jsonl": JsonLines, ".parquet": Parquet}


def _file(given: str | Path, column: str) -> Source:
    path, ours = Path(given), shipped()
    if str(given) in ours:
        return Parquet(SHIPPED / f"{given}.parquet", "text")
    if not os.path.isfile(path):  # Path.is_file raises an error for a whole text
        names = ", ".join(sorted(ours)) or "none here, as they lie in the project's checkout"
        shown = str(given) if len(str(given)) < 200 else f"{str(given)[:200]}…"
        raise BadCorpus(
            f"{shown!r} is no file, and no shipped corpus. Shipped ones: {names}. Mend the path; texts themselves are given as "
            "a list."
        )
    if path.suffix not in _KINDS:
        raise BadCorpus(f"{str(given)!r} is none of {', '.join(_KINDS)}. Write the texts in one of these.")
    return _KINDS[path.suffix](path, column)


def _lines(path: Path) -> Iterator[str]:
    """
    Raises:
        BadCorpus: if it is no text, or cannot be read.
    """
    try:
        with path.open("rb") as file:  # decoded here: a text file's own error counts bytes from its last buffer
            for number, line in enumerate(file, 1):
                if b"\0" in line:
                    raise BadCorpus(f"{str(path)!r} is no text: line {number} holds a zero byte. Give a file of UTF-8 text.")
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise BadCorpus(
                        f"{str(path)!r} is no UTF-8 text ({error.reason} at byte {error.start} of line {number}). Convert it "
                        "to UTF-8."
                    ) from None
                yield text.replace("\r\n", "\n")
    except OSError as error:
        raise BadCorpus(f"{str(path)!r} cannot be read ({error.strerror or error}). Mend that, or name another.") from None


def _name(row: dict[str, Any], n: int) -> str:
    """A document's own name, or its ordinal."""
    return str(n if row.get("id") is None else row["id"])
