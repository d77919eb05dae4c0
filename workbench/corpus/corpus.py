"""Texts as rows of tokens: how documents are cut, where beginnings are marked, and which token belongs to which document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from workbench.corpus.sources import Dataset, Document, source_of
from workbench.errors import BadCorpus, UnknownOption, require_one_of
from workbench.model import LanguageModel

Bos = Literal["tokenizer", "document", "row", "never"]
Side = Literal["all", "training", "held_out"]
HELD_OUT_ONE_IN = 10
"""Documents that nothing is trained on: every so-manieth."""

STRATA = ("first", "early", "special", "massive", "ordinary")
"""Kinds of tokens, so different that no statistic should mix them unsaid. A token is of the first kind that fits: at position
0 of its row (where attention rests), at positions 1 to 3, a special token, a state of massive norm, any other."""
FIRST, EARLY, SPECIAL, MASSIVE, ORDINARY = range(len(STRATA))
EARLY_UNTIL = 4

LENGTH = 512
"""Tokens of a row at most, if no number is given and the model's context has room for them."""

_DOCUMENTS_AT_ONCE, _CHARACTERS_AT_ONCE = 256, 1 << 18
"""What is tokenised at once: enough for the tokenizer's threads, little enough for memory and for a corpus that soon ends."""


@dataclass(frozen=True, eq=False)
class Row:
    """A row of tokens; arrays are int32 `[pos]`."""

    index: int
    """Ordinal of the row in the corpus."""
    tokens: np.ndarray
    documents: np.ndarray
    """Ordinal of each token's document in the corpus."""
    offsets: np.ndarray
    """Where each token stands in its document, from 0; -1 for a token of beginnings that was put before a row."""
    ids: dict[int, str]
    """The documents' own names, by ordinal."""

    def __len__(self) -> int:
        return len(self.tokens)


class Count(NamedTuple):
    """What a corpus holds for a model."""

    documents: int
    """Up to the last one that has a token; those without are counted."""
    rows: int
    tokens: int
    tokens_hash: str
    """SHA-256 of all rows' token ids and of the documents they come from: any change of the texts, their names, the tokenizer
    or the way of cutting changes it."""


class Corpus:
    """Documents, and how they become rows of tokens. Nothing is read before it is asked for, and never all at once.

    Rows do not overlap. A document longer than a row goes on in the next one, without the context of the one before.
    """

    def __init__(
        self,
        source: Any,
        *,
        column: str = "text",
        length: int | None = None,
        packed: bool = False,
        bos: Bos = "tokenizer",
        max_tokens: int | None = None,
    ) -> None:
        """
        Args:
            source: Texts; the path of a .txt file (a document per block between blank lines), or of a .jsonl or .parquet one;
                the name of a shipped corpus; or a dataset of the datasets library, streaming or not.
            column: The field of the text, in .jsonl, .parquet and datasets. A field `id`, if there is one, names the document.
            length: Tokens of a row at most; 512, or the model's context if that is shorter, if None.
            packed: Rows are filled with one document after the other, so that none needs padding; attention then sees the
                documents before in the row. Otherwise a row has tokens of one document alone.
            bos: Where the token of beginnings stands: where the `tokenizer` puts it (before a document, or nowhere), before
                every `document`, before every `row`, or `never`.
            max_tokens: The corpus ends after so many, in the middle of a row if need be.
        Raises:
            BadCorpus: if there is no such source.
            UnknownOption: for numbers out of range.
        """
        require_one_of("bos", bos, get_args(Bos))
        if (length is not None and length < 2) or (max_tokens is not None and max_tokens < 1):
            raise UnknownOption(
                f"length={length}, max_tokens={max_tokens}: rows need 2 tokens or more, and the corpus 1 or more."
            )
        self.source = source_of(source, column)
        self.length, self.packed, self.bos, self.max_tokens = length, packed, bos, max_tokens
        self.side: Side = "all"

    def __repr__(self) -> str:
        kind = "packed" if self.packed else "a document a row"
        rows = "" if self.length is None else f", rows of {self.length}"
        upto = "" if self.max_tokens is None else f", at most {self.max_tokens:,} tokens"
        return f"Corpus({self.source.name!r}, {kind}{rows}, bos={self.bos!r}{upto})"

    @property
    def settings(self) -> dict[str, Any]:
        """What a result must say of the corpus it was made with, beside the hash of its tokens and, where `length` is None,
        `row_length`."""
        return {
            "corpus": self.source.name, "length": self.length, "packed": self.packed, "bos": self.bos,
            "max_tokens": self.max_tokens, "side": self.side,
        }  # fmt: skip

    def training(self) -> Corpus:
        """The same without every tenth document."""
        return self._but(side="training")

    def held_out(self, max_tokens: int | None = None) -> Corpus:
        """Every tenth document, which `training` leaves out; `max_tokens` counts those of this side."""
        return self._but(side="held_out", max_tokens=max_tokens)

    def upto(self, max_tokens: int) -> Corpus:
        """The same, ended after so many tokens."""
        return self._but(max_tokens=min(max_tokens, self.max_tokens or max_tokens))

    def cut(self, length: int) -> Corpus:
        """The same in rows of this length, if it has none of its own."""
        return self._but(length=self.length or length)

    def _but(self, **changed: Any) -> Corpus:
        other = copy(self)
        vars(other).update(changed)
        return other

    def row_length(self, model: LanguageModel) -> int:
        """Tokens of a row at most, for a model.

        Raises:
            UnknownOption: if that is more than the model's context.
        """
        if self.length is None:
            return min(LENGTH, model.n_context or LENGTH)
        if model.n_context is not None and self.length > model.n_context:
            raise UnknownOption(
                f"Rows of {self.length} tokens do not fit the context of {model.name!r}, which is {model.n_context}. Choose "
                "a shorter length."
            )
        return self.length

    @property
    def is_finite(self) -> bool:
        """Whether it is known to end, so that it can be counted: a streaming dataset may go on for ever."""
        dataset = self.source.dataset if isinstance(self.source, Dataset) else ()
        return self.max_tokens is not None or hasattr(dataset, "__len__")

    def documents(self) -> Iterator[Document]:
        """The documents, in order."""
        return iter(self.source)

    def count(self, model: LanguageModel) -> Count:
        """Read all of it once.

        Raises:
            BadCorpus, UnknownOption: as `rows`.
        """
        tally = Tally()
        for _ in tally.of(self.rows(model)):
            pass
        return tally.count

    def rows(self, model: LanguageModel) -> Iterator[Row]:
        """Rows of the model's tokens, in order. A document without a token is counted, but is in no row.

        Raises:
            BadCorpus: if no document has a token, or one cannot be read.
            UnknownOption: if rows are longer than the model's context, or a token of beginnings is asked for that there is not.
        """
        left, empty = self.max_tokens, True
        for row in self._cut(model):
            empty = False
            if left is not None and len(row) >= left:
                yield _beginning(row, left)
                return
            yield row
            left = None if left is None else left - len(row)
        if empty:
            which = (
                f"every {HELD_OUT_ONE_IN}th document is held out, and none of these"
                if self.side == "held_out"
                else "no document in it"
            )
            raise BadCorpus(f"Corpus {self.source.name!r} is empty: {which} gives a token. Give it some text.")

    def _cut(self, model: LanguageModel) -> Iterator[Row]:
        before = [model.bos_id] if self.bos == "row" else []
        pending = _Pending(before, self.row_length(model) - len(before))
        for ordinal, document, tokens in self._tokenised(model):
            pending.add(ordinal, document.id, tokens)
            while pending.n >= pending.room or (pending.n and not self.packed):
                yield pending.take()
        if pending.n:
            yield pending.take()

    def _tokenised(self, model: LanguageModel) -> Iterator[tuple[int, Document, list[int]]]:
        """Each document that has tokens, with its ordinal."""
        bos = {"tokenizer": None, "document": True}.get(self.bos, False)
        if bos is False and model.tokenizer.bos_token_id is None:
            bos = None  # there is none to take away
        for some in _chunks(self.documents()):
            if self.side != "all":
                kept = self.side == "training"
                some = [one for one in some if (one[0] % HELD_OUT_ONE_IN != HELD_OUT_ONE_IN - 1) == kept]
            for ordinal, document in some:
                _require_text(ordinal, document)
            rows = model.token_ids([document.text for _, document in some], bos=bos)
            for (ordinal, document), tokens in zip(some, rows, strict=True):
                if document.text and tokens:
                    yield ordinal, document, tokens


def _chunks(documents: Iterable[Document]) -> Iterator[list[tuple[int, Document]]]:
    """Documents with their ordinals, some at once."""
    some: list[tuple[int, Document]] = []
    characters = 0
    for ordinal, document in enumerate(documents):
        some.append((ordinal, document))
        characters += len(document.text)
        if len(some) == _DOCUMENTS_AT_ONCE or characters > _CHARACTERS_AT_ONCE:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _require_text(ordinal: int, document: Document) -> None:
    """
    Raises:
        BadCorpus: if it holds half a character, as JSON may spell one (`"\\ud800"`): tokenizers refuse it without a name.
    """
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise BadCorpus(
            f"Document {ordinal} ({document.id!r}) is no text: character {error.start} is half of a surrogate pair. Mend it, "
            "or leave the document out."
        ) from None


def _beginning(row: Row, n: int) -> Row:
    """The first tokens of a row."""
    documents = row.documents[:n]
    ids = {ordinal: row.ids[ordinal] for ordinal in sorted(set(documents.tolist()))}
    return replace(row, tokens=row.tokens[:n], documents=documents, offsets=row.offsets[:n], ids=ids)


class _Pending:
    """Tokens that are in no row yet."""

    def __init__(self, before: list[int], room: int) -> None:
        self.before, self.room = before, room
        self.n, self.rows = 0, 0
        self.pieces: list[tuple[int, np.ndarray, int]] = []
        """Document, tokens, and where the first of them stands in it."""
        self.ids: dict[int, str] = {}

    def add(self, document: int, id: str, tokens: list[int]) -> None:
        self.pieces.append((document, np.array(tokens, np.int32), 0))
        self.ids[document] = id
        self.n += len(tokens)

    def take(self) -> Row:
        """The next row, of as many tokens as there are room and tokens for."""
        tokens, documents, offsets = [], [], []
        left, rest = self.room, []
        for document, piece, start in self.pieces:
            head = piece[:left]
            if len(head):
                tokens.append(head)
                documents.append(np.full(len(head), document, np.int32))
                offsets.append(np.arange(start, start + len(head), dtype=np.int32))
            if len(head) < len(piece):
                rest.append((document, piece[len(head) :], start + len(head)))
            left -= len(head)
        if self.before:
            tokens.insert(0, np.array(self.before, np.int32))
            documents.insert(0, documents[0][:1])
            offsets.insert(0, np.array([-1], np.int32))
        self.pieces, self.n = rest, sum(len(piece) for _, piece, _ in rest)
        row = Row(self.rows, np.concatenate(tokens), np.concatenate(documents), np.concatenate(offsets), dict(self.ids))
        self.ids = {document: self.ids[document] for document, _, _ in rest}
        self.rows += 1
        return row


class Tally:
    """Counts rows that pass by."""

    def __init__(self) -> None:
        self._digest, self._rows, self._tokens, self._last = hashlib.sha256(), 0, 0, -1

    def of(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            for numbers in (row.tokens, row.documents, row.offsets):
                self._digest.update(len(numbers).to_bytes(4, "little") + numbers.astype("<i4").tobytes())
            self._digest.update(repr(row.ids).encode())
            self._rows, self._tokens, self._last = self._rows + 1, self._tokens + len(row), int(row.documents[-1])
            yield row

    @property
    def count(self) -> Count:
        """What has passed so far."""
        return Count(self._last + 1, self._rows, self._tokens, self._digest.hexdigest())


def stratum_indices(names: str | Sequence[str]) -> list[int]:
    """Indices into `STRATA` of the kinds of tokens that count.

    Raises:
        UnknownOption: if there is no such kind.
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        require_one_of("strata", name, STRATA)
    return [STRATA.index(name) for name in names]


def strata(tokens: np.ndarray, positions: np.ndarray, special: np.ndarray) -> np.ndarray:
    """The stratum of tokens as far as text alone says it, an index into `STRATA` (int8): all but the massive ones.

    Args:
        tokens, positions: Ids, and where each stands in its row.
        special: Ids of the tokenizer's special tokens.
    """
    found = np.full(len(tokens), ORDINARY, np.int8)
    found[np.isin(tokens, special)] = SPECIAL
    found[positions < EARLY_UNTIL] = EARLY
    found[positions == 0] = FIRST
    return found
