"""Labelled examples from files and tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.dataset import Dataset, Kind
from probes.shipped import SHIPPED, shipped_sets
from workbench.errors import BadDataset, require_one_of

if TYPE_CHECKING:
    import pandas as pd

_SPAN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


def read(
    source: str | Path | pd.DataFrame, *, text: str, label: str | Sequence[str], group: str | Sequence[str] | None,
    target: str | None, type: str | None, kind: Kind | None,
) -> Dataset:  # fmt: skip
    """As `Dataset.load`."""
    table, name, about = _table(source)
    labels = [label] if isinstance(label, str) else list(label)
    if labels == ["label"] and about and "label" not in table:
        labels = list(about["targets"])
    groups = [group] if isinstance(group, str) else list(group or ())
    asked = [text, *labels, *groups, *(one for one in (target, type) if one is not None)]
    for column in asked:
        if column not in table:
            raise BadDataset(f"{name!r} has no column {column!r}. It has {', '.join(map(str, table.columns))}.")
    groups = groups or (["group"] if "group" in table else [])
    target = target or ("target" if "target" in table else None)
    type = type or ("type" if "type" in table else None)
    numeric = len(labels) > 1 or _are_fractions(table[labels[0]])
    kind = kind or ("numbers" if numeric else "classes")
    require_one_of("kind", kind, ("classes", "numbers"))
    texts = [one if isinstance(one, str) else "" for one in table[text].tolist()]
    try:
        values = table[labels].to_numpy(float) if kind == "numbers" else table[labels[0]].to_numpy()
    except (TypeError, ValueError) as error:
        raise BadDataset(
            f"Labels {labels} of {name!r} are no numbers ({error}). Ask for kind='classes', or mend them."
        ) from None
    return Dataset(
        texts, values,
        spans=None if target is None else [span_of(one, texts[i], i) for i, one in enumerate(table[target].tolist())],
        groups=_named(table, groups, name) if groups else None,
        types=None if type is None else _named(table, [type], name)[:, 0],
        kind=kind, target_names=tuple(labels), name=name, about=about,
    )  # fmt: skip


def column_of(source: str | Path | pd.DataFrame, column: str) -> np.ndarray:
    """One column of a dataset's table, `[n]`, such as labels of another task.

    Raises:
        BadDataset: if the file or the column is missing.
    """
    table, name, _ = _table(source)
    if column not in table:
        raise BadDataset(f"{name!r} has no column {column!r}. It has {', '.join(map(str, table.columns))}.")
    return table[column].to_numpy()


def _named(table: pd.DataFrame, columns: list[str], name: str) -> np.ndarray:
    """Columns as text.

    Raises:
        BadDataset: naming the first row where one is missing.
    """
    missing = table[columns].isna().any(axis=1).to_numpy()
    if missing.any():
        raise BadDataset(f"Row {int(missing.argmax())} of {name!r} has no {' or '.join(columns)}. Leave it out, or fill it in.")
    return table[columns].astype(str).to_numpy(object)


def _are_fractions(column: pd.Series) -> bool:
    """Whether some label is no whole number; a column of these is read as fractions too, where one is missing."""
    values = column.to_numpy()
    return column.dtype.kind == "f" and bool((values[np.isfinite(values)] % 1 != 0).any())


def span_of(given: Any, text: str, i: int) -> tuple[int, int]:
    """Characters that `12:17`, `[12, 17]` or the words themselves stand for.

    Raises:
        BadDataset: if it is none of these, or the words are not in the text once.
    """
    if isinstance(given, str):
        numbers = _SPAN.fullmatch(given)
        if numbers and given in text:
            raise BadDataset(
                f"Target {given!r} of example {i} could be characters, or the words that stand in its text: {text[:60]!r}. "
                "Give it as a pair of numbers."
            )
        if numbers:
            return int(numbers[1]), int(numbers[2])
        found = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(given)}(?!\w)", text)] if given else []
        if len(found) == 1:
            return found[0], found[0] + len(given)
        raise BadDataset(
            f"Target {given!r} of example {i} stands in its text {len(found)} times: {text[:60]!r}. Write its characters, from "
            "and up to, such as 12:17."
        )
    if isinstance(given, (list, tuple, np.ndarray)) and len(given) == 2:
        try:
            return int(given[0]), int(given[1])
        except (TypeError, ValueError, OverflowError):
            pass  # said below
    raise BadDataset(f"Target of example {i} is {given!r}. Write characters, from and up to, such as 12:17, or the words.")


def _table(source: str | Path | pd.DataFrame) -> tuple[pd.DataFrame, str, dict[str, Any]]:
    """The table, what it is called, and what is known of it, if it is shipped."""
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        return source, "table", {}
    shipped = shipped_sets()
    if str(source) in shipped:
        return _parquet(SHIPPED / f"{source}.parquet"), str(source), shipped[str(source)]
    path = Path(source)
    if path.suffix not in (".csv", ".tsv", ".parquet") or not path.is_file():
        raise BadDataset(
            f"{str(source)!r} is no .csv, .tsv or .parquet file that exists, and no shipped set. Shipped are "
            f"{', '.join(shipped) or 'none: they lie in the checkout of the project'}."
        )
    if path.suffix == ".parquet":
        return _parquet(path), path.stem, {}
    try:
        return (
            pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", keep_default_na=False, na_values=[""]),
            path.stem,
            {},
        )
    except (OSError, ValueError) as error:  # pandas's errors of a damaged file are among them
        raise BadDataset(
            f"{str(path)!r} cannot be read ({' '.join(str(error).split())}). Save it as UTF-8 with a row of column names."
        ) from None


def _parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise BadDataset(f"{str(path)!r} is missing or damaged ({error}).") from None
