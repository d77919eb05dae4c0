"""Cards that were put aside, in order, with notes: as one HTML file, or as a notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from app import look, url
from app.card import figure, provenance, saved, table
from app.report_files import html_report, notebook_report


def draw() -> None:
    """The cards that the link names, with their notes, and both files to download."""
    cards = {name: found for name in url.get("cards") if (found := saved(name)) is not None}
    if missing := len(url.get("cards")) - len(cards):
        st.warning(f"{missing} cards of this link are not on this machine.")
    if not cards:
        look.empty('The report is empty. "Add to report" stands in the menu (…) of every card.', ":material/note_add:")
        return
    _kept(st.text_input, "report-title", "Title", "What the model does")
    title, notes = _words()["report-title"], {name: _words().get(f"note-{name}", "") for name in cards}
    with st.container(horizontal=True):
        st.download_button("One HTML file", lambda: html_report(title, cards, notes), "report.html", "text/html",
                           key="report-html", icon=":material/download:", on_click="ignore", type="primary")  # fmt: skip
        st.download_button("Notebook", lambda: notebook_report(title, cards, notes), "report.ipynb", "application/x-ipynb+json",
                           key="report-notebook", icon=":material/download:", on_click="ignore")  # fmt: skip
    for place, (name, one) in enumerate(cards.items()):
        with st.container(border=True):
            words, up, down, gone = st.columns([12, 1, 1, 1])
            words.markdown(f"**{one['title']}**")
            up.button(
                "",
                key=f"up-{name}",
                icon=":material/arrow_upward:",
                on_click=_move,
                args=(name, -1),
                disabled=place == 0,
                type="tertiary",
            )
            down.button("", key=f"down-{name}", icon=":material/arrow_downward:", on_click=_move, args=(name, 1),
                        disabled=place == len(cards) - 1, type="tertiary")  # fmt: skip
            gone.button("", key=f"gone-{name}", icon=":material/close:", on_click=_drop, args=(name,), type="tertiary")
            _kept(st.text_area, f"note-{name}", "Note", height=68, label_visibility="collapsed",
                  placeholder="What does it show?")  # fmt: skip
            pictures = one["answer"]["figures"]
            if pictures:
                first = next(iter(pictures))
                figure(pictures[first], key=f"report-{name}-{first}")
            else:
                table(next(iter(one["answer"]["tables"].values())), key=f"report-table-{name}")
            st.code(one["python"], language="python")
            st.caption(provenance(one["answer"]["settings"]))


def _words() -> dict[str, str]:
    """Title and notes of this tab: a widget's own state is gone when another screen is drawn."""
    return st.session_state.setdefault("_report", {})


def _kept(make: Callable[..., Any], key: str, label: str, first: str = "", **options: Any) -> None:
    st.session_state[key] = _words().setdefault(key, first)
    make(label, key=key, on_change=_take, args=(key,), **options)


def _take(key: str) -> None:
    _words()[key] = st.session_state[key]


def _move(name: str, by: int) -> None:
    order = list(url.get("cards"))
    at = order.index(name)
    order.insert(at + by, order.pop(at))
    url.put(cards=tuple(order))


def _drop(name: str) -> None:
    url.put(cards=tuple(one for one in url.get("cards") if one != name))
