"""Results as JSON: what the worker sends to the page. Nothing is pickled."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.results import Result


def answer(
    result: Result,
    tables: Mapping[str, pd.DataFrame | None] | None = None,
    figures: Mapping[str, go.Figure] | None = None,
    n_tokens: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A result's settings, tables and pictures, as `card` takes them.

    Args:
        tables: Of the result's own, `table` alone if None.
        n_tokens: Of the text that was read, where the settings do not say it.
        more: What else the screen needs, as plain values.
    """
    chosen = {"table": result.table} if tables is None else tables
    return {
        "settings": as_plain(result.settings | ({} if n_tokens is None else {"tokens": n_tokens})),
        "tables": {name: columns(table) for name, table in chosen.items() if table is not None},
        "figures": {name: as_plain(figure.to_plotly_json()) for name, figure in (figures or {}).items()},
        **as_plain(more),
    }


def columns(table: pd.DataFrame) -> dict[str, list[Any]]:
    """A table as lists, column by column."""
    return {str(name): _column(table[name]) for name in table.columns}


def _column(values: pd.Series) -> list[Any]:
    """Most columns hold what JSON holds: looked at as a whole, a lens takes a tenth of a second less."""
    found = values.to_list()
    whole = isinstance(values.dtype, np.dtype) and values.dtype.kind in "iubf" and bool(np.isfinite(values.to_numpy()).all())
    return found if whole or all(type(one) is str for one in found) else as_plain(found)


def as_plain(value: Any) -> Any:
    """As JSON can hold it; NaN and infinity become null."""
    if isinstance(value, dict):
        if "bdata" in value:  # plotly's way to write an array
            flat = np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"]))
            shape = [int(one) for one in str(value.get("shape", len(flat))).split(",")]
            return as_plain(flat.reshape(shape))
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [as_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return as_plain(value.tolist())
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return as_plain(value.item()) if hasattr(value, "item") else str(value)
