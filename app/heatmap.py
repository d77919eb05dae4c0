"""A heatmap that can be clicked: the picture of a `plotly` heatmap of the workbench's, drawn on a canvas.

Of the two ways there are, an invisible scatter over plotly's heatmap answers a click as fast (122 and 109 ms in two runs of
tests/benchmarks/explorer.py --ways, the canvas 115 and 131) and sends less; the canvas was taken because it has arrow keys,
marks the cell before the server has answered, cuts words to their cells, and takes its colours from the page.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.components.v2 import component

COLUMNS = 64
"""Tokens that are sent at once; more are turned over like pages."""


def heatmap(
    picture: dict[str, Any],
    *,
    key: str,
    selected: tuple[int, int] | None,
    on_select: Callable[[int, int], None],
    first: int = 0,
    diverging: bool = False,
    square: bool = False,
    name: str = "heatmap",
) -> None:
    """Draw it; a click, or arrow keys after one, give row and column to `on_select`, counted in the figure's own data.

    Args:
        selected: The marked cell, as row and column.
        first: The first column that is shown, of `COLUMNS`.
        square: Cells without text, as wide as high.
    """
    trace = next(one for one in picture["data"] if one["type"] == "heatmap")
    layout = picture["layout"]
    across = _axis(trace, layout, "x")
    upwards = layout.get("yaxis", {}).get("autorange") != "reversed"
    shown = slice(first, first + COLUMNS)
    hover = trace.get("hovertext") or trace.get("text")
    data = {
        "values": [row[shown] for row in trace["z"]],
        "rows": _axis(trace, layout, "y"),
        "columns": across[shown],
        "text": None if square else _cut(trace.get("text"), shown),
        "hover": _cut(hover, shown),
        "lowest": trace.get("zmin"),
        "highest": trace.get("zmax"),
        "unit": _words((trace.get("colorbar") or {}).get("title")),
        "diverging": diverging,
        "upwards": upwards,
        "square": square,
        "first": first,
        "selected": None if selected is None else [selected[0], selected[1] - first],
        "rowName": _words(layout.get("yaxis", {}).get("title")),
        "name": name,
    }

    def choose() -> None:
        # None: the page was left at the same moment, and its state with it.
        if (cell := st.session_state.get(key, {}).get("cell")) is not None:
            on_select(int(cell[0]), int(cell[1]) + first)

    _component()(key=key, data=data, on_cell_change=choose)


def cells(picture: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """What the rows and columns of a heatmap stand for, as the figure has them: the coordinates of its cells."""
    trace = next(one for one in picture["data"] if one["type"] == "heatmap")
    return list(trace["y"]), list(trace["x"])


@cache
def _script() -> str:
    return (Path(__file__).parent / "heatmap.js").read_text(encoding="utf-8")


def _component() -> Any:
    # Registered anew in each run: a registration belongs to the running server, and tests start several in a process.
    return component("workbench_heatmap", js=_script(), isolate_styles=False)


def _axis(trace: dict[str, Any], layout: dict[str, Any], name: str) -> list[str]:
    """Labels of the rows or columns: the axis's own texts, where it has some."""
    axis = layout.get(f"{name}axis", {})
    named = dict(zip(map(str, axis.get("tickvals") or ()), axis.get("ticktext") or (), strict=True))
    return [_words(named.get(str(one), one)) for one in trace[name]]


def _cut(lines: list[list[str]] | None, shown: slice) -> list[list[str]] | None:
    return None if lines is None else [[_words(one) for one in line[shown]] for line in lines]


def _words(text: Any) -> str:
    """As letters: plotly's little HTML becomes line breaks and plain characters."""
    text = text.get("text", "") if isinstance(text, dict) else "" if text is None else str(text)
    return unescape(text.replace("<br>", "\n"))
