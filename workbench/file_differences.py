"""What differs between two files of results, said in a line."""

import json
from pathlib import Path
from typing import Any

SHOWN = 3
"""Keys or columns that a line names."""


def describe(before: Path, after: Path) -> str:
    """Keys of JSON, rows and columns of Parquet, bytes of anything else. Empty if they hold the same, apart from seconds."""
    if before.read_bytes() == after.read_bytes():
        return ""
    try:
        if before.suffix == ".json":
            return _json(before, after)
        if before.suffix == ".parquet":
            return _parquet(before, after)
    except (ValueError, OSError):  # one is damaged, which the sizes may tell
        pass
    return f"{before.stat().st_size:,} bytes, now {after.stat().st_size:,}"


def changed(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Where two JSON values differ: dotted key to the value before and after; None where there is none."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}


def listed(differences: dict[str, tuple[Any, Any]]) -> str:
    """The first of them on a line, with how many more there are."""
    some = [f"{key} {_short(old)} -> {_short(new)}" for key, (old, new) in list(differences.items())[:SHOWN]]
    more = [f"{len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
    return ", ".join(some + more)


def _leaves(value: Any, key: str = ""):
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield key, value
        return
    for name, item in items:
        yield from _leaves(item, f"{key}.{name}" if key else str(name))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 24 else f"{text[:23]}…"


def _json(before: Path, after: Path) -> str:
    differences = changed(json.loads(before.read_text(encoding="utf-8")), json.loads(after.read_text(encoding="utf-8")))
    return listed({key: pair for key, pair in differences.items() if not key.endswith("seconds")})


def _parquet(before: Path, after: Path) -> str:
    import pandas as pd

    old, new = pd.read_parquet(before), pd.read_parquet(after)
    if list(old.columns) != list(new.columns):
        return f"columns {', '.join(old.columns)}, now {', '.join(new.columns)}"
    if len(old) != len(new):
        return f"{len(old):,} rows, now {len(new):,}"
    differs = pd.DataFrame({name: _cells_differ(old[name], new[name]) for name in old.columns})
    rows, columns = int(differs.any(axis=1).sum()), list(differs.columns[differs.any()])
    if not rows:
        return "the same rows, written as other bytes"
    return f"{rows:,} of {len(old):,} rows differ, in {', '.join(columns)}"


def _cells_differ(old: Any, new: Any) -> Any:
    """Row by row; NaN is NaN, and lists and categories are compared as they print."""
    if old.dtype != new.dtype or old.dtype == "object" or old.dtype == "category":
        old, new = old.astype("str"), new.astype("str")
    return (old != new) & ~(old.isna() & new.isna())
