"""What is carried linearly between states, pair by pair, and how linear layers are."""

from __future__ import annotations

import shlex
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
    """A run of transport or linearity, and of the former the pair that was chosen."""
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
    first = rows_of(answer["tables"]["transport"])[-1]
    pair = url.get("pair") or f"{first['from']}>{first['to']}"
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
        curves, directions = (_of_pair(answer, name, one) for name in ("curves", "directions"))
        if not curves:
            st.caption("Curves and directions are measured of 16 pairs or fewer:")
            own = answer["settings"]
            named = {"model": own["model"], "dtype": own["dtype"], "corpus": own["corpus"], "max-tokens": own["max_tokens"]}
            options = [f"--{name}={value}" for name, value in named.items() if value is not None]
            st.code(shlex.join(["workbench", "transport", f"--pairs={pair}", *options, "--out=out/pair"]), language="bash")
            return
        st.caption("R² by rank, held out")
        _curve(curves)
        st.caption("Directions: carried, made anew, or both; null: other documents")
        shown_ = ["kind", "name", "verdict", "r2", "null", "variance_share", "correlation", "slope", "low", "high"]
        table({column: [row[column] for row in directions] for column in shown_}, height=300)


def _of_pair(answer: dict[str, Any], name: str, pair: dict[str, Any]) -> list[dict[str, Any]]:
    rows = rows_of(answer["tables"].get(name, {}))
    return [row for row in rows if row["source"] == pair["source"] and row["target"] == pair["target"]]


def _curve(rows: list[dict[str, Any]]) -> None:
    """A line a metric and truncation, and the null of the first."""
    data = []
    for metric, truncation in dict.fromkeys((row["metric"], row["truncation"]) for row in rows):
        own = [row for row in rows if (row["metric"], row["truncation"]) == (metric, truncation)]
        line = {"type": "scatter", "x": [row["rank"] for row in own], "mode": "lines"}
        data.append(line | {"y": [row["held_out"] for row in own], "name": f"{metric}, {truncation}"})
        if len(data) == 1:
            data.append(line | {"y": [row["null"] for row in own], "name": "null", "line": {"dash": "dot", "color": "#9a9a9a"}})
    layout = {
        "height": 340, "xaxis": {"title": {"text": "rank"}, "type": "log"}, "margin": {"t": 10},
        "legend": {"orientation": "h", "y": -0.3},
    }  # fmt: skip
    figure({"data": data, "layout": layout}, key="rank-curve")
