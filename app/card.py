"""A card: a title, what it shows, what its numbers are of, and how to have them elsewhere."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import streamlit as st

from app import url
from app.lines import Question
from app.places import own_folder
from workbench.artifacts import write_json

Answer = dict[str, Any]


@contextmanager
def card(title: str, question: Question, answer: Answer | None, *, key: str, note: str | None = None) -> Iterator[None]:
    """A box with a menu: command, program, downloads, report.

    Args:
        key: Of its own on the page; its name in downloads, too.
        note: What is to be known to read it.
    """
    with st.container(border=True, key=f"card-{key}"):
        words, menu = st.columns([12, 1], vertical_alignment="center")
        words.markdown(f"**{title}**", help=note)
        with menu.popover("", icon=":material/more_horiz:", type="tertiary", help="Copy, download, report"):
            _menu(title, question, answer, key)
        yield
        if answer is not None:
            st.caption(provenance(answer["settings"]))


def provenance(settings: dict[str, Any]) -> str:
    """What the numbers are of, in a line. The workbench never folds weights: they are as stored."""
    own = settings.get("versions", {})
    found = [
        settings.get("model"), _named("revision", settings.get("revision")), settings.get("dtype"),
        settings.get("device"), _named("attention", settings.get("attention")), "raw weights",
        _counted(settings.get("tokens")), _named("seed", settings.get("seed")), _named("mi-workbench", own.get("mi-workbench")),
    ]  # fmt: skip
    return " · ".join(str(one) for one in found if one)


def table(columns: dict[str, list[Any]], *, key: str | None = None, **options: Any) -> Any:
    """A table as Streamlit shows it."""
    import pandas as pd

    options = {"hide_index": True, "width": "stretch"} | options
    return st.dataframe(pd.DataFrame(columns), key=key, **options)


def figure(picture: dict[str, Any], *, key: str) -> None:
    """A picture of plotly's, in the colours of the page."""
    layout = {name: value for name, value in picture["layout"].items() if name not in ("template", "width")}
    st.plotly_chart({"data": picture["data"], "layout": layout}, key=key, width="stretch", config=_CONFIG)


def rows_of(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """A table row by row."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def where(columns: dict[str, list[Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows of a table in which some columns have these values."""
    names, values = list(wanted), tuple(wanted.values())
    keys = zip(*(columns[name] for name in names), strict=True)
    return [{name: column[i] for name, column in columns.items()} for i, key in enumerate(keys) if key == values]


def put_aside(title: str, question: Question, answer: Answer) -> dict[str, Any]:
    """A card as a report has it."""
    return {"title": title, "task": question.task, "arguments": question.arguments, "answer": answer,
            "cli": question.cli(), "python": question.python()}  # fmt: skip


def saved(card_id: str) -> dict[str, Any] | None:
    """A card that was put into a report, with its lines as they were then: a run of it may be gone since."""
    file = own_folder("cards") / f"{card_id}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


_CONFIG = {"displaylogo": False, "toImageButtonOptions": {"scale": 2}}


def _menu(title: str, question: Question, answer: Answer | None, key: str) -> None:
    line = question.cli()
    st.caption("Command line")
    st.code(line or "# No verb of the command line does this; the program does.", language="bash", wrap_lines=True)
    st.caption("Python")
    st.code(question.python(), language="python", wrap_lines=True)
    if answer is None:
        return
    with st.container(horizontal=True):
        for name, columns in answer["tables"].items():
            st.download_button(
                f"{name}.csv",
                partial(_csv, columns),
                f"{key}-{name}.csv",
                "text/csv",
                key=f"csv-{key}-{name}",
                on_click="ignore",
            )
        st.download_button(
            "all.json",
            partial(_json, question, answer),
            f"{key}.json",
            "application/json",
            key=f"json-{key}",
            on_click="ignore",
        )
    st.caption("Pictures: the camera, or PNG, at their upper right.")
    st.button("Add to report", key=f"report-{key}", icon=":material/note_add:", on_click=_keep, args=(title, question, answer))


def _keep(title: str, question: Question, answer: Answer) -> None:
    kept = put_aside(title, question, answer)
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False)
    name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    write_json(own_folder("cards") / f"{name}.json", kept)
    if name not in url.get("cards"):
        url.put(cards=(*url.get("cards"), name))
    st.toast(f"{title} is in the report.", icon=":material/note_add:")


def _csv(columns: dict[str, list[Any]]) -> bytes:
    """UTF-8 with its mark, without which some spreadsheets take it for another encoding."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue().encode("utf-8-sig", "replace")


def _json(question: Question, answer: Answer) -> bytes:
    said = {"task": question.task, "arguments": question.arguments, "settings": answer["settings"], "tables": answer["tables"]}
    return json.dumps(said, indent=1, ensure_ascii=False).encode("utf-8", "replace")


def _named(name: str, value: Any) -> str | None:
    return None if value is None or value == "" else f"{name} {value}"


def _counted(tokens: Any) -> str | None:
    return f"{tokens:,} tokens" if isinstance(tokens, int) else None
