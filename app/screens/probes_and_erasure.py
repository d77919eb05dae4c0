"""Sweeps of probes with their controls, what erasing leaves, and a continuation without the concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from app import look, url
from app.asking import ask, model_asked
from app.card import card, figure, rows_of, table
from app.lines import Question
from app.places import run_at
from app.runs import found_runs
from app.screens import page_link

KINDS = ("probe_sweep", "erasure", "scrubbing", "followed")
TITLES = {
    "layers": "Layer by layer, beside its controls", "confusion": "What is taken for what",
    "directions": "Examples along two directions",
    "map": "Places", "leaks": "What is left after erasing", "curve": "Accuracy as directions go", "scatter": "Before and after",
    "bars": "What the model then misses", "profile": "By layer", "followed": "Is it back further up?",
}  # fmt: skip


def draw() -> None:
    """A run of probes or of erasure, and a continuation with the concept erased."""
    runs = [one.name for one in found_runs(*KINDS)]
    if not runs:
        look.empty("No probe or erasure has been run. Start one: the shipped set `number` at one site takes a minute.")
        page_link("jobs", "Probe a concept", verb="probe")
        page_link("jobs", "Erase a concept", verb="erase")
        return
    with st.container(border=True):
        url.choice(st.selectbox, "run", "Run", runs)
        with st.container(horizontal=True):
            page_link("jobs", "Probe another concept", verb="probe")
            page_link("jobs", "Erase one", verb="erase")
    folder = run_at(url.get("run"))
    question = Question("open_run", {"folder": str(folder)})
    answer = ask(question.task, **question.arguments)
    if answer is None:
        return
    with card(
        url.get("run"), question, answer, key="probe-run", note="Every score is held out: of groups that were not learnt from."
    ):
        st.code(answer.get("text", ""), language=None)
        with st.expander("Table"):
            table(answer["tables"]["table"])
    _pictures(question, answer)
    if answer.get("erasers"):
        st.fragment(_generate)(folder, answer["erasers"])


def _pictures(question: Question, answer: dict[str, Any]) -> None:
    for name, picture in answer["figures"].items():
        with card(TITLES.get(name) or name, question, answer, key=f"probe-{name}"):
            figure(picture, key=f"probe-figure-{name}")


def _generate(folder: Path, erasers: list[str]) -> None:
    with st.container(border=True):
        st.markdown(
            "**Go on without the concept**", help="The eraser changes the model's own states, from the second token on."
        )
        url.choice(st.selectbox, "eraser", "Eraser", erasers)
        url.widget(st.text_input, "start", "Prompt")
    if not url.get("start").strip():
        look.empty("The prompt is empty. Write some words.", ":material/edit:")
        return
    question = Question("generate", {"model": model_asked(), "prompt": url.get("start"),
                                     "erasers": str(folder / "erasers.safetensors"), "name": url.get("eraser")})  # fmt: skip
    answer = ask(question.task, **question.arguments)
    with card(f"With and without {url.get('eraser')}", question, answer, key="erased"):
        if answer is not None:
            own = rows_of(answer["tables"]["table"])[0]
            left, right = st.columns(2)
            for place, title, text in ((left, "As it is", own["text"]), (right, "Erased", own["edited"])):
                place.caption(title)
                place.code(text, language=None, wrap_lines=True)
