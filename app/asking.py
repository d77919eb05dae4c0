"""Asking the worker from a page: what is known at once, else progress, a way to cancel, and a plain word when it fails."""

from __future__ import annotations

import time
from typing import Any
from weakref import ref

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app import url
from app.worker import Asked, Worker

AT_ONCE = 1.0
"""Seconds in which an answer is not worth a word of progress."""


@st.cache_resource(show_spinner=False)
def the_worker() -> Worker:
    """One for all tabs."""
    return Worker()


def model_asked() -> dict[str, Any]:
    """The model of the view, as tasks take it."""
    dtype, device = url.get("dtype"), url.get("device")
    return {
        "name": url.get("model"),
        "dtype": None if dtype == "as stored" else dtype,
        "device": None if device == "as it is" else device,
    }


def ask(task: str, **arguments: Any) -> dict[str, Any] | None:
    """The answer, or None where there is none: the page then says why, and goes on with its other cards.

    A rerun of the page (a click on Cancel, or on anything) ends the waiting, not the work.
    """
    worker = the_worker()
    asked = worker.ask(task, **arguments)
    place = st.empty()  # waited for or not, there is one: what follows keeps its place on the page, and a heatmap the keyboard
    if not asked.done.wait(AT_ONCE):
        _wait(worker, asked, place)
    if asked.error is None:
        return asked.answer
    kind, text = asked.error
    if kind == "Cancelled":
        st.info("Cancelled.", icon=":material/block:")
    else:
        st.error(text, icon=":material/error:")
    if kind in ("Cancelled", "WorkerDied") or "memory" in text:
        st.button("Ask again", key=_key("again", asked), icon=":material/refresh:")
    return None


def _wait(worker: Worker, asked: Asked, place: DeltaGenerator) -> None:
    with place.container(key=_key("wait", asked)):
        words, button = st.columns([5, 1], vertical_alignment="center")
        said = words.empty()
        # Streamlit keeps what a button was given until its tab is closed: that is not to be the answer.
        button.button("Cancel", key=_key("cancel", asked), on_click=_cancel, args=(worker, ref(asked)))
        while not asked.done.wait(0.25):
            what, share = _progress(worker, asked)
            said.progress(share, text=f"{what} · {time.monotonic() - asked.since:.0f} s")
    place.empty()


def _cancel(worker: Worker, known: ref[Asked]) -> None:
    if (asked := known()) is not None:
        worker.cancel(asked)


def _progress(worker: Worker, asked: Asked) -> tuple[str, float]:
    if asked is not worker.current:
        return f"Waiting for {worker.waiting} request(s) before this one", 0.0
    name = asked.arguments.get("model", {}).get("name")
    loading = name and (worker.model or {}).get("asked") != name
    doing = f"Loading {name}" if loading else f"Working: {asked.task.replace('_', ' ')}"
    if asked.progress is None:
        return doing, 0.0
    what, share = asked.progress
    return f"{doing} ({what})", share


def _key(what: str, asked: Asked) -> str:
    return f"{what}-{id(asked)}"
