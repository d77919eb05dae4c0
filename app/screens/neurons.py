"""Neurons by their words: a search over a whole map, and a page for each."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import streamlit as st

from app import look, prose, url
from app.asking import ask, model_asked
from app.card import card, figure, rows_of, table
from app.lines import Question
from app.places import run_at, written
from app.runs import found_runs
from app.screens import page_link
from workbench.errors import WorkbenchError
from workbench.tokens import shown

LISTED = 200
"""Hits on screen; the search counts them all."""
ENDS = {"top": "stands for", "bottom": "and least for"}


def draw() -> None:
    """The search over a map, and the page of the neuron that was chosen in it."""
    maps = [one.name for one in found_runs("neuron map")]
    left, right = st.columns([3, 2])
    with left, st.container(border=True):
        if maps:
            st.fragment(_search)(maps)
        else:
            look.empty("There is no map of neurons yet. Make one: a minute or two for the embedded model, and it is kept.")
            page_link("jobs", "Map all neurons", verb="map-neurons")
    with right, st.container(border=True):
        url.widget(st.text_input, "neuron", "Neuron", placeholder="29.808", help="Layer and number, both counted from 0.")
        url.choice(
            st.selectbox,
            "decoder",
            "Head",
            ["none", "gain", "norm"],
            help="none: the unembedding alone; norm: the model's head.",
        )
        if url.get("map"):
            page_link("home", "All about the map", run=url.get("map"))
    if not url.get("neuron"):
        look.empty("Choose a neuron from the search, or write its number: 29.808.", ":material/hub:")
        return
    if not re.fullmatch(r"\d+\.\d+", url.get("neuron").strip()):
        st.error(f"Neuron {url.get('neuron')!r} is not understood. Write its layer and number: 12.345, both counted from 0.")
        return
    layer, neuron = map(int, url.get("neuron").strip().split("."))
    _words(layer, neuron, maps)
    st.fragment(_clamp)(layer, neuron)
    st.fragment(_on_text)(layer, neuron)


def _search(maps: list[str]) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        url.choice(st.selectbox, "map", "Map", maps)
        url.widget(st.text_input, "q", "Word", placeholder="dog")
        url.choice(st.selectbox, "match", "Match", ["folded", "exact", "regex"])
        url.choice(st.selectbox, "side", "Side", ["all", "up", "gate", "down"])
        url.widget(st.number_input, "within", "Among the first", min_value=1, max_value=1000)
        url.widget(st.toggle, "bottom", "Bottom words")
    if not url.get("q").strip():
        look.empty("Which neurons speak for a word? Write one: dog.", ":material/search:")
        return
    asked = {"map": str(run_at(url.get("map"))), "text": url.get("q"), "match": url.get("match"),
             "side": None if url.get("side") == "all" else url.get("side"), "max_rank": url.get("within") - 1,
             "bottom": url.get("bottom")}  # fmt: skip
    started = time.perf_counter()
    try:
        columns, total, settings = _found(**asked, made=written(asked["map"]))
    except WorkbenchError as error:
        st.warning(str(error), icon=":material/search_off:")
        return
    seconds = time.perf_counter() - started
    question = Question("find", asked)
    answer = {"settings": settings, "tables": {"table": columns}, "figures": {}}
    with card(f"{total:,} hits for `{url.get('q')}`", question, answer, key="find",
              note="Score: standard deviations above the other neurons for that word."):  # fmt: skip
        if not total:
            look.empty("No neuron has it among its words with these limits.")
            return
        names = [f"{layer}.{neuron}" for layer, neuron in zip(columns["layer"], columns["neuron"], strict=True)]
        chosen = table(
            {"neuron": names, "side": columns["side"], "rank": columns["rank"],
             "token": [shown(one) for one in columns["token"]], "score": columns["score"],
             "probability": columns["probability"]},
            key="hits", on_select="rerun", selection_mode="single-row", height=300,
            column_config={"score": st.column_config.NumberColumn(format="%.1f"),
                           "probability": st.column_config.NumberColumn(format="%.2e")},
        )  # fmt: skip
        st.caption(f"{min(total, LISTED)} of {total:,} shown · {_took(seconds)}")
        picked = chosen["selection"]["rows"]
        if picked and picked[0] < len(names) and names[picked[0]] != url.get("neuron"):
            url.put(neuron=names[picked[0]])
            st.rerun()


def _took(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds > 0.002 else "asked before"


@st.cache_data(max_entries=64, show_spinner=False)
def _found(map: str, bottom: bool, made: int | None, **query: Any) -> tuple[dict[str, list[Any]], int, dict[str, Any]]:
    """The first hits, how many there are, and of which map."""
    from workbench.analyses.neuron_folder import KIND, VERB
    from workbench.analyses.neuron_search import Query, search_folder
    from workbench.artifacts import settings_of

    settings = settings_of(Path(map), KIND, f"workbench {VERB}")
    found = search_folder(Path(map), Query(**query), bottom=bottom)
    names, rows = found.columns, found.fetchall()
    columns = {name: [row[i] for row in rows[:LISTED]] for i, name in enumerate(names)}
    return (
        columns,
        len(rows),
        {name: one for name, one in settings.items() if not isinstance(one, (list, dict)) or name == "versions"},
    )


def _words(layer: int, neuron: int, maps: list[str]) -> None:
    own = {"model": model_asked(), "layer": layer, "neuron": neuron, "decoder": url.get("decoder")}
    question = Question("neuron", own)
    answer = ask(question.task, **question.arguments)
    with card(f"Neuron {layer}.{neuron}: its words", question, answer, key="neuron",
              note="Of its rows through the LM head. What it reads (up, gate) and writes (down), both signs."):  # fmt: skip
        if answer is None:
            return
        tokens, sides = rows_of(answer["tables"]["table"]), rows_of(answer["tables"]["sides"])
        scores = {(one["side"], one["end"]): one for one in rows_of(answer["tables"]["scores"])}
        for place, side in zip(st.columns(len(sides)), sides, strict=True):
            with place:
                st.markdown(
                    f"**{side['side']}** · norm {side['norm']:.2f}, longer than {side['longer_fraction']:.0%} of its layer"
                )
                for end, title in ENDS.items():
                    some = [one for one in tokens if one["side"] == side["side"] and one["end"] == end]
                    score = scores.get((side["side"], end))
                    null = (
                        "" if score is None or score["null_score"] is None else f", 99 % of random: {score['null_score']:.1f}"
                    )
                    said = "" if score is None else f" · best `{shown(score['word'])}` {score['score']:.1f}{null}"
                    st.caption(f"{title}{said}")
                    st.dataframe(
                        {"token": [shown(one["token"]) for one in some], "logit": [one["logit"] for one in some],
                         "probability": [one["probability"] for one in some]},
                        hide_index=True, height=213,
                        column_config={"logit": st.column_config.NumberColumn(format="%.2f"),
                                       "probability": st.column_config.NumberColumn(format="%.1e")},
                    )  # fmt: skip
        near, cosines = st.tabs(["Nearest neurons", "Does it write what it reads?"])
        with near:
            rows = rows_of(answer["tables"]["nearest"])
            table({
                "side": [one["side"] for one in rows], "end": [one["end"] for one in rows],
                "neuron": [f"{one['layer']}.{one['neuron']}" for one in rows], "cosine": [one["cosine"] for one in rows],
                "tokens": [one["tokens"] for one in rows],
            })  # fmt: skip
            nulls = ", ".join(f"{one['side']} {one['null_nearest']:.2f}" for one in sides)
            st.caption(f"99 % of random directions have no neuron nearer than: {nulls}")
        with cosines:
            table(answer["tables"]["cosines"])


def _clamp(layer: int, neuron: int) -> None:
    with st.container(border=True):
        st.markdown(
            "**Clamp it**", help="Its number is set at every token of prompt and continuation, and so are 20 random neurons'."
        )
        url.widget(st.text_input, "start", "Prompt")
        left, right = st.columns([3, 1])
        with left:
            url.widget(st.slider, "value", "Value", min_value=-60.0, max_value=60.0, step=0.5)
        with right:
            url.choice(st.selectbox, "clamp_side", "Which number", ["up", "gate", "down"])
    if not url.get("start").strip():
        look.empty("The prompt is empty. Write some words.", ":material/edit:")
        return
    question = Question("clamp", {"model": model_asked(), "layer": layer, "neuron": neuron, "prompt": url.get("start"),
                                  "value": url.get("value"), "side": url.get("clamp_side")})  # fmt: skip
    answer = ask(question.task, **question.arguments)
    with card(f"Neuron {layer}.{neuron} clamped to {url.get('value'):g}", question, answer, key="clamp"):
        if answer is None:
            return
        texts = [one for one in rows_of(answer["tables"]["generations"]) if not one["random"]]
        before = next(one for one in texts if one["neuron"] is None)
        after = next(one for one in texts if one["neuron"] is not None)
        own = rows_of(answer["tables"]["summary"])[0]
        left, right = st.columns(2)
        for place, title, one in ((left, "As it is", before), (right, "Clamped", after)):
            place.caption(f"{title}: {one['words']} of its words")
            place.code(f"{url.get('start')}{one['text']}", language=None, wrap_lines=True)
        usual = answer["settings"]["usual"][0]
        st.markdown(
            f"Its words `{prose.words(answer['settings']['words'])}`: **{own['change']:+.2f} nats** a word; random neurons "
            f"{own['null_low']:+.2f} to {own['null_high']:+.2f} (p {own['p']:.3f}), and say {own['words_null']:.1f} of them. "
            f"Its own value at the last token: {usual:+.2f}."
        )
        figure(answer["figures"]["change"], key="clamp-change")


def _on_text(layer: int, neuron: int) -> None:
    runs = [one for one in found_runs("top activations") if f"mlp_post.{layer}" in one.settings.get("sites", ())]
    with st.container(border=True):
        st.markdown("**On text**", help="Where it is most active, and how its values are spread.")
        names = [one.name for one in runs]
        if names:
            url.choice(st.selectbox, "examples", "From a run", names)
        else:
            st.caption(
                f"No run of top-activations has `mlp_post.{layer}`. Watch this one neuron on text, or start a run for all."
            )
        watch = st.button("Watch it on 30,000 tokens of Wikipedia", key=f"watch-{layer}.{neuron}", icon=":material/visibility:")
    if watch:
        st.session_state["watched"] = (layer, neuron)
    if st.session_state.get("watched") == (layer, neuron):
        _watched(layer, neuron)
    elif names:
        _of_run(run_at(url.get("examples")), layer, neuron)


def _of_run(folder: Path, layer: int, neuron: int) -> None:
    question = Question("examples", {"folder": str(folder), "site": f"mlp_post.{layer}", "index": neuron})
    answer = ask(question.task, **question.arguments)
    with card(f"Neuron {layer}.{neuron} in {folder.name}", question, answer, key="examples"):
        if answer is None:
            return
        layout = answer["figures"]["histogram"]["layout"] | {"annotations": [], "height": 340, "margin": {"b": 40}}
        figure({"data": answer["figures"]["histogram"]["data"], "layout": layout}, key="examples-histogram")
        _listed(rows_of(answer["tables"]["table"]), "kind")


def _watched(layer: int, neuron: int) -> None:
    question = Question("neuron", {"model": model_asked(), "layer": layer, "neuron": neuron, "corpus": "wikipedia"})
    answer = ask(question.task, **question.arguments)
    with card(f"Neuron {layer}.{neuron} on text", question, answer, key="watched"):
        if answer is None:
            return
        figure(answer["figures"]["histogram"], key="watched-histogram")
        st.caption("Does it fire on its words? AUC of 0.5 is chance; null: words of other neurons of its layer.")
        table(answer["tables"]["words"])
        _listed(rows_of(answer["tables"]["examples"]), "end")


def _listed(rows: list[dict[str, Any]], kind: str) -> None:
    for name in dict.fromkeys(one[kind] for one in rows):
        st.caption(str(name))
        for one in [one for one in rows if one[kind] == name][:12]:
            left, right = st.columns([1, 10])
            left.markdown(f"`{one['activation']:.2f}`")
            if one.get("tokens") is not None and one.get("values") is not None:
                right.html(prose.lit(one["tokens"], one["values"]))
            else:
                right.html(prose.marked(str(one["before"]), str(one["token"]), str(one["after"])))
