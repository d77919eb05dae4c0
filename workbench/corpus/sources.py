"""Where a corpus's documents come from: texts in hand, files, datasets. Read one after another, never all at once."""

from __future__ import annotations

import json
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
    if isinstance(given, Sequence) and all(isinstance(text, str) for text in given):
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
        for n, line in enumerate(_lines(self.path)):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadCorpus(
                    f"Line {n + 1} of {str(self.path)!r} is no JSON ({error}). Mend it, or take the line out."
                ) from None
            if not isinstance(row, dict) or not isinstance(row.get(self.column), str):
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise BadCorpus(
                    f"Line {n + 1} of {str(self.path)!r} has no text in {self.column!r}; it has {has}. Name it with column=."
                )
            yield Document(str(row.get("id", n)), row[self.column])


@dataclass(frozen=True)
class Parquet(_File):
    """A row a document, with the text in one column and its name, if it has one, in `id`."""

    def __iter__(self) -> Iterator[Document]:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException

        try:
            with pq.ParquetFile(self.path) as file:
                has = file.schema_arrow.names
                if self.column not in has:
                    raise BadCorpus(
                        f"{str(self.path)!r} has no column {self.column!r}; it has {', '.join(has)}. Name it with column=."
                    )
                named = ["id"] if "id" in has else []
                n = 0
                for part in file.iter_batches(256, columns=[self.column, *named]):
                    for row in part.to_pylist():
                        yield Document(str(row.get("id", n)), row[self.column] or "")
                        n += 1
        except ArrowException as error:
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
            yield Document(str(row.get("id", n)), row[self.column] or "")


_KINDS = {".txt": TextFile, ".jsonl": JsonLines, ".parquet": Parquet}


def _file(given: str | Path, column: str) -> Source:
    path, ours = Path(given), SHIPPED / f"{given}.parquet"
    if ours.is_file():
        return Parquet(ours, "text")
    if not path.is_file():
        names = ", ".join(sorted(shipped())) or "none here, as they lie in the project's checkout"
        raise BadCorpus(f"{str(given)!r} is no file, and no shipped corpus. Shipped ones: {names}. Mend the path.")
    if path.suffix not in _KINDS:
        raise BadCorpus(f"{str(given)!r} is none of {', '.join(_KINDS)}. Write the texts in one of these.")
    return _KINDS[path.suffix](path, column)


def _lines(path: Path) -> Iterator[str]:
    """
    Raises:
        BadCorpus: if it is no text.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for n, line in enumerate(file):
                if "\0" in line:
                    raise BadCorpus(f"{str(path)!r} is no text: line {n + 1} holds a zero byte. Give a file of UTF-8 text.")
                yield line
    except UnicodeDecodeError as error:
        raise BadCorpus(
            f"{str(path)!r} is no UTF-8 text ({error.reason} at byte {error.start}). Convert it to UTF-8."
        ) from None
