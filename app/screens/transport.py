"""What is carried linearly between states, pair by pair, and how linear layers are."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import look, url
from app.asking import ask
from app.card import card, figure, rows_of, table
from app.heatmap import cells, heatmap
from app.lines import Question
from app.places import run_at
from app.runs import found_runs
from app.screens import page_link

KINDS = ("transport", "linearity", "shortcuts")
SCORES = ("held_out", "null", "in_sample", "whitened_held_out", "efficiency", "fisher", "readers", "size")


def draw() -> None:
    runs = {one.name: one.kind for one in found_runs(*KINDS)}
    if not runs:
        look.empty("Nothing has been measured yet. Start with linearity, a minute or two; transport of all pairs takes longer.")
        page_link("jobs", "Measure linearity", verb="linearity")
        page_link("jobs", "Measure transport", verb="transport")
        return
    with st.container(border=True):
        url.choice(st.selectbox, "run", "Run", list(runs), format_func=lambda name: f"{name} ({runs[name]})")
    question = Question("open_run", {"folder": str(run_at(url.get("run")))})
    answer = ask(question.task, **question.arguments)
    if answer is None:
        return
    if runs[url.get("run")] == "transport" and "transport" in answer["figures"]:
        st.fragment(_matrix)(question, answer)
        return
    with card(url.get("run"), question, answer, key="linear-run"):
        st.write(answer.get("text", ""))
        for name, picture in answer["figures"].items():
            figure(picture, key=f"linear-{name}")
        with st.expander("Table"):
            table(answer["tables"].get("overview") or next(iter(answer["tables"].values())))


def _matrix(question: Question, answer: dict[str, Any]) -> None:
    picture = answer["figures"]["transport"]
    sources, targets = ([int(one) for one in axis] for axis in cells(picture))
    pair = url.get("pair") or f"{sources[0]}>{targets[-1]}"
    source, _, target = pair.partition(">")
    selected = None
    if source.isdecimal() and target.isdecimal() and int(source) in sources and int(target) in targets:
        selected = sources.index(int(source)), targets.index(int(target))
    left, right = st.columns([3, 2])
    with (
        left,
        card("From state to state", question, answer, key="pairs", note="Held-out R². Rows: from; columns: to. Click a pair."),
    ):
        heatmap(picture, key="pair-cells", selected=selected, square=True, name="transport",
                on_select=lambda r, c: url.put(pair=f"{sources[r]}>{targets[c]}"))  # fmt: skip
        st.write(answer.get("text", ""))
    with right:
        _pair(question, answer, pair)
    for name in ("decay", "directions"):
        if name in answer["figures"]:
            with card({"decay": "By distance", "directions": "Directions"}[name], question, answer, key=f"pairs-{name}"):
                figure(answer["figures"][name], key=f"pairs-figure-{name}")


def _pair(question: Question, answer: dict[str, Any], pair: str) -> None:
    source, _, target = pair.partition(">")
    own = [one for one in rows_of(answer["tables"]["transport"]) if str(one["from"]) == source and str(one["to"]) == target]
    with card(f"From state {source} to {target}", question, answer, key="pair"):
        if not own:
            look.empty("This pair was not measured: choose a cell that is coloured.")
            return
        one = own[0]
        names = [name for name in SCORES if one.get(name) is not None]
        table({"score": [name.replace("_", " ") for name in names], "value": [one[name] for name in names]})
        for name, title in (("curves", "R² by rank"), ("directions", "Directions that are carried, or made anew")):
            rows = [
                row
                for row in rows_of(answer["tables"].get(name, {}))
                if row.get("source") == one["source"] and row.get("target") == one["target"]
            ]
            st.caption(title)
            if not rows:
                st.caption("Not measured for this pair: workbench transport --closely --pairs " + pair)
                continue
            if name == "curves":
                _curve(rows)
            table({column: [row[column] for row in rows] for column in rows[0]}, height=240)


def _curve(rows: list[dict[str, Any]]) -> None:
    """Lines by rank, as the run has them."""
    numbers = [name for name in rows[0] if name not in ("rank",) and isinstance(rows[0][name], float)]
    data = [
        {"type": "scatter", "x": [row["rank"] for row in rows], "y": [row[name] for row in rows], "name": name}
        for name in numbers[:5]
    ]
    figure(
        {"data": data, "layout": {"height": 260, "xaxis": {"title": "rank", "type": "log"}, "margin": {"t": 10}}},
        key="rank-curve",
    )
