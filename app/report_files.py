"""A report as a file: one HTML page that works offline, or a notebook that makes its numbers again."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from app.card import provenance
from app.lines import Question

ROWS = 40
"""Of a table, in a page."""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
body {{font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #20242c}}
section {{border: 1px solid #dde2e9; border-radius: 8px; padding: 1rem 1.2rem; margin: 1.2rem 0; overflow-x: auto}}
table {{border-collapse: collapse; font-size: 13px}} td, th {{padding: 2px 9px; text-align: left; border-bottom: 1px solid #eef1f5}}
td {{font-family: ui-monospace, monospace; white-space: pre}} pre {{background: #f4f6f9; padding: .7rem; overflow-x: auto; font-size: 13px}}
footer {{color: #66707c; font-size: 12.5px}} summary {{cursor: pointer; color: #66707c}}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def html_report(title: str, cards: dict[str, dict[str, Any]], notes: dict[str, str]) -> bytes:
    """Plotly's script is in it once."""
    from plotly.offline import get_plotlyjs

    parts = [f"<script>{get_plotlyjs()}</script>"] if any(one["answer"]["figures"] for one in cards.values()) else []
    parts += [_section(name, one, notes.get(name, "")) for name, one in cards.items()]
    return _PAGE.format(title=escape(title), body="\n".join(parts)).encode("utf-8", "replace")


def notebook_report(title: str, cards: dict[str, dict[str, Any]], notes: dict[str, str]) -> bytes:
    """A cell of words and one of code a card."""
    cells: list[dict[str, Any]] = [_markdown(f"# {title}")]
    for name, one in cards.items():
        said = [f"## {one['title']}", notes.get(name, ""), f"*{provenance(one['answer']['settings'])}*"]
        cells.append(_markdown("\n\n".join(part for part in said if part)))
        code = Question(one["task"], one["arguments"]).python()
        cells.append({"cell_type": "code", "id": name, "metadata": {}, "execution_count": None, "outputs": [], "source": code})
    for place, cell in enumerate(cells):
        cell["id"] = f"cell-{place}"
    notebook = {
        "cells": cells, "nbformat": 4, "nbformat_minor": 5,
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    }  # fmt: skip
    return json.dumps(notebook, indent=1, ensure_ascii=False).encode("utf-8", "replace")


def _section(name: str, one: dict[str, Any], note: str) -> str:
    answer, question = one["answer"], Question(one["task"], one["arguments"])
    parts = [f"<h2>{escape(one['title'])}</h2>"]
    parts += [f"<p>{escape(note)}</p>"] if note else []
    for place, picture in enumerate(answer["figures"].values()):
        # Inside a script, `</` would end it.
        drawn = json.dumps(picture, ensure_ascii=False).replace("</", "<\\/")
        parts.append(f'<div id="{name}-{place}"></div><script>Plotly.newPlot("{name}-{place}", {drawn})</script>')
    for title, columns in answer["tables"].items():
        parts.append(
            f"<details{'' if answer['figures'] else ' open'}><summary>{escape(title)}</summary>{_table(columns)}</details>"
        )
    line = question.cli()
    parts += [f"<pre>{escape(line)}</pre>"] if line else []
    parts.append(f"<pre>{escape(question.python())}</pre><footer>{escape(provenance(answer['settings']))}</footer>")
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
