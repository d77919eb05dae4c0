"""What there is on disk, and where to go."""

from __future__ import annotations

import shlex

import streamlit as st

from app import look, url
from app.asking import ask
from app.card import card, figure, table
from app.lines import Question
from app.places import runs_folder
from app.runs import FoundRun, delete, found_runs
from app.screens import page_link
from workbench.errors import BadArtifact

SCREEN_OF = {
    "neuron map": ("neurons", "map"), "probe_sweep": ("probes_and_erasure", "run"), "erasure": ("probes_and_erasure", "run"),
    "scrubbing": ("probes_and_erasure", "run"), "followed": ("probes_and_erasure", "run"), "transport": ("transport", "run"),
    "linearity": ("transport", "run"), "top activations": ("neurons", "examples"),
}  # fmt: skip
"""Where a kind of run is opened, and the part of the view that names it. Others are opened here."""


def draw() -> None:
    """The runs of the folder: one chosen is opened or deleted, several are compared."""
    runs = found_runs()
    free = sum(one.bytes for one in runs)
    st.caption(f"{len(runs)} run{'s' * (len(runs) != 1)} in `{runs_folder()}`, {free / 1e6:,.0f} MB")
    if not runs:
        look.empty(
            "No run yet. Map the neurons of the model (Jobs, map-neurons: a minute or two), or ask about a prompt at once: "
            "the Prompt lab needs no run."
        )
        _beginnings(runs)
        return
    listed = {
        "run": [one.name for one in runs], "kind": [one.kind or one.state for one in runs],
        "model": [one.settings.get("model") for one in runs],
        "revision": [one.settings.get("revision") for one in runs],
        "made by": [one.verb for one in runs], "when (UTC)": [one.started for one in runs],
        "seconds": [one.settings.get("run", {}).get("timings", {}).get("total_seconds") for one in runs],
        "MB": [round(one.bytes / 1e6, 1) for one in runs], "state": [one.state for one in runs],
    }  # fmt: skip
    chosen = table(listed, key="runs", on_select="rerun", selection_mode="multi-row")
    picked = [runs[row] for row in chosen["selection"]["rows"] if row < len(runs)]
    if not picked and url.get("run") in listed["run"]:
        picked = [runs[listed["run"].index(url.get("run"))]]
    if not picked:
        st.caption("Choose a run to open or delete it, two to compare them. Or begin here:")
        _beginnings(runs)
    elif len(picked) == 1:
        _one(picked[0])
    else:
        _compare(picked)


def _beginnings(runs: list[FoundRun]) -> None:
    maps = [one.name for one in runs if one.kind == "neuron map" and one.state == "whole"]
    page_link("prompt_lab", "Ask about a prompt")
    if maps:
        page_link("neurons", "Search the neurons for a word", map=maps[0], q="dog")
    else:
        page_link("jobs", "Map all neurons", verb="map-neurons")
    page_link("model_map", "See what can be read, and check that it is read rightly")


def _one(run: FoundRun) -> None:
    left, right = st.columns([1, 6])
    if run.state == "whole" and run.kind in SCREEN_OF:
        screen, part = SCREEN_OF[run.kind]
        with left:
            page_link(screen, "Open", **{part: run.name})
    with right:
        if st.button("Delete …", key="delete", icon=":material/delete:", type="tertiary"):
            _sure(run)
    if run.state.startswith("damaged"):
        st.error(f"{run.name} is {run.state}")
        return
    if run.state == "unfinished":
        look.empty(f"{run.name} was begun and not finished. Give its command again (Jobs): it goes on where it was.")
        return
    st.json({name: value for name, value in run.settings.items() if name != "run"}, expanded=False)
    if run.kind in SCREEN_OF or not run.kind:
        return
    question = Question("open_run", {"folder": str(run.folder)})
    answer = ask("open_run", **question.arguments)
    with card(f"{run.name}: {run.kind.replace('_', ' ')}", question, answer, key="run"):
        if answer is not None:
            for name, picture in answer["figures"].items():
                figure(picture, key=f"run-{name}")
            for name, columns in answer["tables"].items():
                st.caption(name)
                table(columns)


@st.dialog("Delete this run?")
def _sure(run: FoundRun) -> None:
    st.write(f"**{run.name}**, {run.bytes / 1e6:,.1f} MB, made {run.started or 'at an unknown time'}. It cannot be had back.")
    st.code(str(run.folder), language=None)
    if st.button("Delete", type="primary", key="really-delete"):
        try:
            delete(run.name)
        except BadArtifact as error:  # another tab was faster
            st.error(str(error))
            return
        st.rerun()


def _compare(runs: list[FoundRun]) -> None:
    """What differs in their settings."""
    settings = [_flat(one.settings) for one in runs]
    names = sorted({name for one in settings for name in one})
    differing = [name for name in names if len({str(one.get(name)) for one in settings}) > 1]
    st.caption(f"{len(differing)} of {len(names)} settings differ")
    columns = {"setting": differing}
    columns |= {
        run.name: [str(one.get(name, "–"))[:200] for name in differing] for run, one in zip(runs, settings, strict=True)
    }
    table(columns, key="compared")
    maps = [one for one in runs if one.kind == "neuron map"]
    if len(maps) == len(runs) == 2:
        line = shlex.join(["workbench", "compare-maps", *(str(one.folder) for one in runs)])
        st.caption("How many neurons keep their words, beside nulls:")
        st.code(line, language="bash")


def _flat(value: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, one in value.items():
        if name in ("outputs", "stdout", "timings", "machine"):
            continue
        found |= _flat(one, f"{prefix}{name}.") if isinstance(one, dict) else {f"{prefix}{name}": one}
    return found
