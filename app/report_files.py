"""A report as a file: one HTML page that works offline, or a notebook that makes its numbers again."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from app.card import provenance

ROWS = 40
"""Of a table, in a page."""


def html_report(title: str, cards: dict[str, dict[str, Any]], notes: dict[str, str]) -> bytes:
    """Plotly's script is in it once."""
    from plotly.offline import get_plotlyjs

    parts = [f"<script>{get_plotlyjs()}</script>"] if any(one["answer"]["figures"] for one in cards.values()) else []
    parts += [_section(name, one, notes.get(name, "")) for name, one in cards.items()]
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return page.substitute(title=escape(title), body="\n".join(parts)).encode("utf-8", "replace")


def notebook_report(title: str, cards: dict[str, dict[str, Any]], notes: dict[str, str]) -> bytes:
    """A cell of words and one of code a card."""
    cells: list[dict[str, Any]] = [_markdown(f"# {title}")]
    for name, one in cards.items():
        said = [f"## {one['title']}", notes.get(name, ""), f"*{provenance(one['answer']['settings'])}*"]
        cells.append(_markdown("\n\n".join(part for part in said if part)))
        cells.append(
            {"cell_type": "code", "id": name, "metadata": {}, "execution_count": None, "outputs": [], "source": one["python"]}
        )
    for place, cell in enumerate(cells):
        cell["id"] = f"cell-{place}"
    notebook = {
        "cells": cells, "nbformat": 4, "nbformat_minor": 5,
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    }  # fmt: skip
    return json.dumps(notebook, indent=1, ensure_ascii=False).encode("utf-8", "replace")


def _section(name: str, one: dict[str, Any], note: str) -> str:
    answer = one["answer"]
    parts = [f"<h2>{escape(one['title'])}</h2>"]
    parts += [f"<p>{escape(note)}</p>"] if note else []
    for place, picture in enumerate(answer["figures"].values()):
        # Inside a script, `</` would end it, and after `<!--` a `<script` would hide its end.
        drawn = json.dumps(picture, ensure_ascii=False).replace("<", "\\u003c")
        parts.append(f'<div id="{name}-{place}"></div><script>Plotly.newPlot("{name}-{place}", {drawn})</script>')
    for title, columns in answer["tables"].items():
        parts.append(
            f"<details{'' if answer['figures'] else ' open'}><summary>{escape(title)}</summary>{_table(columns)}</details>"
        )
    parts += [f"<pre>{escape(one['cli'])}</pre>"] if one["cli"] else []
    parts.append(f"<pre>{escape(one['python'])}</pre><footer>{escape(provenance(answer['settings']))}</footer>")
    return f"<section>{''.join(parts)}</section>"


def _table(columns: dict[str, list[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = list(zip(*columns.values(), strict=True))
    body = "".join("<tr>" + "".join(f"<td>{escape(_cell(one))}</td>" for one in row) + "</tr>" for row in rows[:ROWS])
    more = f"<p>{len(rows) - ROWS:,} more rows: run the program.</p>" if len(rows) > ROWS else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _markdown(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": text}
