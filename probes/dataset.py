"""Labelled texts: what is asked of the model, at which words, and which examples must be held out together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from workbench.errors import BadDataset, TooFewExamples, require_one_of

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["classes", "numbers"]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Examples of a concept. `Dataset.load` reads them from a file; from lists they are made as here.

    Raises:
        BadDataset: if the parts are not of one length, a text is empty, or a span lies outside its text.
    """

    texts: Sequence[str] | None
    """`[n]`; None for a dataset of rows that are at hand, which no model is run for."""
    labels: Any
    """`[n]`, of any kind, for classes; numbers `[n]` or `[n, target]` for a regression."""
    spans: Any = None
    """Characters `[n, 2]` of the words that are asked about, from and up to; None: the whole text."""
    groups: Any = None
    """`[n]` or `[n, 2]`: what examples share that must not be both learnt from and tested on, such as a word, or a word and a
    template. The words asked about, if None."""
    types: Any = None
    """`[n]`: what a control task gives a random label to (Hewitt and Liang 2019). The words asked about, if None."""
    kind: Kind = "classes"
    target_names: tuple[str, ...] = ("target",)
    """Of the numbers."""
    name: str = "examples"
    about: dict[str, Any] = field(default_factory=dict)
    """Where it is from, and under which licence."""

    def __post_init__(self) -> None:
        n = len(self.labels)
        if not n:
            raise BadDataset(f"{self.name!r} has no examples. Give texts with a label each.")
        texts = None if self.texts is None else _texts(self.texts, n, self.name)
        spans = None if self.spans is None or texts is None else _spans(self.spans, texts)
        words: list[str] = [str(i) for i in range(n)]
        if texts is not None:
            words = [t.strip().lower() if spans is None else t[slice(*spans[i])].strip().lower() for i, t in enumerate(texts)]
        groups = np.asarray(words if self.groups is None else self.groups, object)
        require_one_of("kind", self.kind, ("classes", "numbers"))
        object.__setattr__(self, "target_names", tuple(self.target_names))
        labels = _numbers(self.labels, self.name) if self.kind == "numbers" else _names(self.labels, self.name)
        own = {
            "texts": texts, "spans": spans, "labels": labels, "groups": groups[:, None] if groups.ndim == 1 else groups,
            "types": np.asarray(words if self.types is None else self.types, object),
        }  # fmt: skip
        for part, value in own.items():
            if value is not None and len(value) != n:
                raise BadDataset(f"{self.name!r} has {n} labels and {len(value)} {part}. Give one of each an example.")
            object.__setattr__(self, part, value)
        if groups.ndim == 2 and groups.shape[1] > 2:
            raise BadDataset(f"{self.name!r} has groups of {groups.shape[1]} columns. Hold out by one, or by two.")
        self._require_labels()

    def _require_labels(self) -> None:
        if self.kind == "numbers":
            if not np.isfinite(self.labels).all():
                row = int(np.argwhere(~np.isfinite(self.labels))[0, 0])
                raise BadDataset(f"Target of example {row} of {self.name!r} is no finite number. Leave the example out.")
            if self.labels.shape[1] != len(self.target_names):
                names = tuple(f"target {i}" for i in range(self.labels.shape[1]))
                object.__setattr__(self, "target_names", names)
            return
        if len(self.classes) < 2:
            raise TooFewExamples(
                f"All {len(self)} examples of {self.name!r} are labelled {str(self.classes[0])!r}, one class. A probe needs "
                "two or more."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        groups = f"{len(set(self.groups[:, 0])):,} groups"
        if self.kind == "numbers":
            return f"Dataset({self.name!r}: {len(self):,} examples of {', '.join(self.target_names)}, {groups})"
        counts = ", ".join(f"{name} {n:,}" for name, n in zip(self.classes, np.bincount(self.index), strict=True))
        return f"Dataset({self.name!r}: {len(self):,} examples, {counts}; {groups})"

    @property
    def classes(self) -> np.ndarray:
        """Sorted."""
        return np.unique(self.labels)

    @property
    def index(self) -> np.ndarray:
        """Each example's class, as an index into `classes`."""
        return np.unique(self.labels, return_inverse=True)[1]

    @property
    def settings(self) -> dict[str, Any]:
        """What a result must say of its examples: the hash changes with any text, span, label, group or type."""
        import hashlib

        digest, none = hashlib.sha256(), [None] * len(self)
        spans = none if self.spans is None else self.spans.tolist()
        for row in zip(self.texts or none, self.labels.tolist(), spans, self.groups.tolist(), self.types.tolist(), strict=True):
            digest.update(repr(row).encode())
        return {
            "dataset": self.name, "examples": len(self), "labels_are": self.kind, "dataset_hash": digest.hexdigest(),
            "groups": [len(set(column)) for column in self.groups.T], "about": self.about,
        }  # fmt: skip

    def head(self, n: int) -> Dataset:
        """The first n examples (of a shipped set, a fair sample)."""
        parts = {name: getattr(self, name) for name in ("texts", "labels", "spans", "groups", "types")}
        return replace(self, **{name: None if part is None else part[:n] for name, part in parts.items()})

    def halves(self, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Two halves of the groups (of the first column), with like shares of the classes: to fit to one, and score on the
        other.

        Raises:
            TooFewExamples: if a class has fewer than two groups.
        """
        from probes.folds import folds_by_group, numeric_folds

        groups = self.groups[:, 0]
        fold = (
            folds_by_group(self.index, groups, 2, seed) if self.kind == "classes" else numeric_folds(len(self), groups, 2, seed)
        )
        first, second = (self._only(np.flatnonzero(fold == side)) for side in (0, 1))
        return first, second

    def _only(self, at: np.ndarray) -> Dataset:
        parts = {name: getattr(self, name) for name in ("labels", "spans", "groups", "types")}
        texts = None if self.texts is None else [self.texts[i] for i in at]
        return replace(self, texts=texts, **{name: None if part is None else part[at] for name, part in parts.items()})

    @classmethod
    def load(
        cls,
        source: str | Path | pd.DataFrame,
        *,
        text: str = "text",
        label: str | Sequence[str] = "label",
        group: str | Sequence[str] | None = None,
        target: str | None = None,
        type: str | None = None,
        kind: Kind | None = None,
    ) -> Dataset:
        """From a CSV or Parquet file, a table, or the name of a shipped set (`probes.shipped_sets()`).

        Args:
            label: The column of labels; several are the targets of one regression.
            group: The column of what must be held out together, or two; `group`, where there is one, if None.
            target: The column of the words asked about: `12:17` or `[12, 17]`, characters of the text, from and up to; or the
                words themselves, where they stand in the text once. `target`, where there is one, if None.
            type: The column of what a control task gives a random label to; `type`, where there is one, if None.
            kind: `classes` or `numbers`; numbers, if None, where labels are fractions or there are several columns.
        Raises:
            BadDataset: if the file or a column is missing, or an example is faulty.
        """
        from probes.dataset_files import read

        return read(source, text=text, label=label, group=group, target=target, type=type, kind=kind)


def _names(given: Any, name: str) -> np.ndarray:
    """Labels of classes, `[n]`, all text or all numbers.

    Raises:
        BadDataset: if one is missing, there are several of an example, or they are of kinds that cannot be sorted.
    """
    labels = given.tolist() if isinstance(given, np.ndarray) else list(given)
    missing = [i for i, label in enumerate(labels) if label is None or label != label or label == ""]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadDataset(f"Example {missing[0]} of {name!r} has no label{more}. Leave it out, or label it.")
    kinds = {
        str if isinstance(label, str) else bool if isinstance(label, (bool, np.bool_)) else type(label) for label in labels
    }
    if len(kinds) > 1 or any(isinstance(label, (list, tuple, np.ndarray)) for label in labels):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise BadDataset(f"Labels of {name!r} are of the kinds {found}. Give each example one label, all text or all numbers.")
    return np.asarray(labels)


def _numbers(given: Any, name: str) -> np.ndarray:
    """Targets, `[n, target]`.

    Raises:
        BadDataset: if they are no numbers.
    """
    try:
        found = np.array(given, float)  # a copy: tensors are made of it, which cannot be read-only
    except (TypeError, ValueError) as error:
        raise BadDataset(f"Targets of {name!r} are no numbers ({error}). Ask for kind='classes', or mend them.") from None
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2:
        raise BadDataset(f"Targets of {name!r} are {list(found.shape)}. Give [n], or [n, target].")
    return found


def _texts(given: Sequence[str], n: int, name: str) -> tuple[str, ...]:
    """
    Raises:
        BadDataset: if there are more or fewer than labels, or one is empty.
    """
    if len(given) != n:
        raise BadDataset(f"{name!r} has {n} labels and {len(given)} texts. Give one of each an example.")
    for i, text in enumerate(given):
        if not isinstance(text, str) or not text.strip():
            raise BadDataset(f"Text {i} of {name!r} is {text!r}. Every example needs a text of a word or more.")
    return tuple(given)


def _spans(given: Any, texts: Sequence[str]) -> np.ndarray:
    """
    Raises:
        BadDataset: naming the first span that is none.
    """
    if len(given) != len(texts):
        raise BadDataset(f"{len(texts)} texts and {len(given)} spans were given. Give one of each an example.")
    found = np.empty((len(texts), 2), np.int64)
    for i, (span, text) in enumerate(zip(given, texts, strict=True)):
        try:
            start, end = (int(one) for one in span)
        except (TypeError, ValueError, OverflowError):
            raise BadDataset(f"Span of example {i} is {span!r}. Give two numbers of characters: from, and up to.") from None
        if not 0 <= start < end <= len(text) or not text[start:end].strip():
            raise BadDataset(
                f"Span {start}:{end} of example {i} holds no word of its text of {len(text)} characters: {text[:60]!r}. "
                "Count characters from 0, up to and without the last."
            )
        found[i] = start, end
    return found
