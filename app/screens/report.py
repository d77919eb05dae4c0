"""Cards that were put aside, in order, with notes: as one HTML file, or as a notebook."""

from __future__ import annotations

import streamlit as st

from app import look, url
from app.card import figure, provenance, saved, table
from app.lines import Question
from app.report_files import html_report, notebook_report


def draw() -> None:
    cards = {name: found for name in url.get("cards") if (found := saved(name)) is not None}
    if missing := len(url.get("cards")) - len(cards):
        st.warning(f"{missing} cards of this link are not on this machine.")
    if not cards:
        look.empty('The report is empty. "Add to report" stands in the menu (…) of every card.', ":material/note_add:")
        return
    title = st.text_input("Title", "What the model does", key="report-title")
    notes = {name: st.session_state.get(f"note-{name}", "") for name in cards}
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
            st.text_area("Note", key=f"note-{name}", height=68, label_visibility="collapsed", placeholder="What does it show?")
            pictures = one["answer"]["figures"]
            if pictures:
                first = next(iter(pictures))
                figure(pictures[first], key=f"report-{name}-{first}")
            else:
                table(next(iter(one["answer"]["tables"].values())), key=f"report-table-{name}")
            st.code(Question(one["task"], one["arguments"]).python(), language="python")
            st.caption(provenance(one["answer"]["settings"]))


def _move(name: str, by: int) -> None:
    order = list(url.get("cards"))
    at = order.index(name)
    order.insert(at + by, order.pop(at))
    url.put(cards=tuple(order))


def _drop(name: str) -> None:
    url.put(cards=tuple(one for one in url.get("cards") if one != name))
