"""One prompt: what each layer predicts at each token, where heads look, how long states are, and another beside it."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import look, prose, url
from app.asking import ask, model_asked
from app.card import card, figure, where
from app.heatmap import COLUMNS, cells, heatmap
from app.lines import Question
from app.places import run_at
from app.runs import found_runs
from workbench.tokens import shown

MEASURES = {
    "target_rank": "rank of the target", "target_log_probability": "log-probability of the target",
    "kl_to_final_nats": "KL to the output", "entropy_nats": "entropy", "surprisal_nats": "surprisal",
}  # fmt: skip
HOVER = "%{text}<br>layer %{x}: %{y:.3f}<extra></extra>"
INSIDE = ("nothing", "attention", "lengths of states")
COMPARE = ("nothing", "another prompt", "another lens")


def draw() -> None:
    """The tokens and the lens of one prompt, with what is asked of the chosen cell."""
    with st.container(border=True):
        url.widget(st.text_area, "prompt", "Prompt", height=80, placeholder="The capital of France is")
        left, middle, right = st.columns([2, 2, 2])
        with left:
            url.choice(st.selectbox, "lens", "Lens", _lenses(), format_func=_lens_name)
        with middle:
            url.widget(
                st.text_input, "target", "Target token", placeholder="the text's own next token",
                help="A leading space is a part of it; or id:250.",
            )  # fmt: skip
        with right:
            url.choice(st.selectbox, "compare", "Compare with", COMPARE)
        if url.get("compare") == "another prompt":
            url.widget(st.text_input, "other", "The other prompt, of equally many tokens")
        elif url.get("compare") == "another lens":
            url.choice(st.selectbox, "other_lens", "The other lens", _lenses(), format_func=_lens_name)
    if not url.get("prompt").strip():
        look.empty("The prompt is empty. Write some words above.", ":material/edit:")
        return
    st.fragment(_read)()


def _read() -> None:
    """All that follows from the chosen cell is drawn again at a click, and nothing else."""
    question = Question("lens", {"model": model_asked(), "prompt": url.get("prompt"), "lens": _folder(url.get("lens")),
                                 "k": 10, "target": url.get("target") or None})  # fmt: skip
    answer = ask(question.task, **question.arguments)
    if answer is None:
        return
    picture = answer["figures"]["heatmap"]
    layers, places = [int(one) if _whole(one) else one for one in cells(picture)[0]], cells(picture)[1]
    row, pos = _selected(layers, len(places))
    with card(f"What each layer predicts: {_lens_name(url.get('lens'))} lens", question, answer, key="lens",
              note="Colour: KL to the model's own output, in nats. Click a cell, then use the arrow keys."):  # fmt: skip
        prose.tokens(answer["tokens"], pos)
        first = _window(len(places), pos)
        heatmap(picture, key="lens-cells", selected=(row, pos), first=first, name="lens",
                on_select=lambda r, c: url.put(layer=layers[r], pos=c))  # fmt: skip
    left, right = st.columns(2)
    with left:
        _cell(question, answer, layers[row], pos)
    with right:
        _lines(question.arguments, pos)
    _difference(layers, row, pos, first)
    _inside(layers[row])


def _cell(question: Question, answer: dict[str, Any], layer: int, pos: int) -> None:
    token = shown(answer["tokens"][pos]["token"])
    with card(f"{_named(layer)}, position {pos} `{token}`: likeliest tokens", question, answer, key="cell"):
        rows = where(answer["tables"]["table"], layer=layer, pos=pos)
        st.dataframe(
            {
                "rank": [one["rank"] for one in rows], "token": [shown(one["token"]) for one in rows],
                "id": [one["token_id"] for one in rows], "probability": [one["probability"] for one in rows],
                "logit": [one["logit"] for one in rows],
            },
            hide_index=True, height=385,
            column_config={"probability": st.column_config.ProgressColumn(format="percent", min_value=0.0, max_value=1.0)},
        )  # fmt: skip
        own = where(answer["tables"]["positions"], layer=layer, pos=pos)[0]
        st.caption(
            f"target `{shown(own['target'])}`: rank {own['target_rank']:,} (the likeliest: 0), "
            f"log p {own['target_log_probability']:.2f} · "
            f"entropy {own['entropy_nats']:.2f} nats · KL to output {own['kl_to_final_nats']:.3f} nats"
        )


def _lines(arguments: dict[str, Any], pos: int) -> None:
    measure = url.get("measure") if url.get("measure") in MEASURES else "target_rank"
    question = Question("lens_lines", arguments | {"measure": measure})
    answer = ask(question.task, **question.arguments)
    with card(
        "From layer to layer",
        question,
        answer,
        key="lines",
        note="The chosen token in blue, the others in grey. Ranks are drawn from 1, as the axis is logarithmic.",
    ):
        url.choice(st.selectbox, "measure", "Measure", list(MEASURES), format_func=MEASURES.get, label_visibility="collapsed")
        if answer is None:
            return
        picture = answer["figures"][measure]
        data = [_grey([one for i, one in enumerate(picture["data"]) if i != pos]), _chosen(picture["data"][pos])]
        layout = picture["layout"] | {"height": 390, "title": None, "margin": {"t": 10, "r": 10}}
        figure({"data": data, "layout": layout}, key="lens-lines")


def _grey(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """All of them as one trace: a trace each takes a tenth of a second to draw, at every click."""
    apart = [(x, y, one["name"]) for one in lines for x, y in [*zip(one["x"], one["y"], strict=True), (None, None)]]
    x, y, text = zip(*apart, strict=True) if apart else ((), (), ())
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "text": text, "hovertemplate": HOVER, "opacity": 0.45,
            "line": {"color": "#8a8f98", "width": 1}, "showlegend": False}  # fmt: skip


def _chosen(line: dict[str, Any]) -> dict[str, Any]:
    return line | {"text": [line["name"]] * len(line["x"]), "hovertemplate": HOVER, "showlegend": False,
                   "line": {"color": "#3b82c4", "width": 4}}  # fmt: skip


def _difference(layers: list[Any], row: int, pos: int, first: int) -> None:
    compare = url.get("compare")
    if compare == "nothing":
        return
    same = {"prompt": url.get("prompt"), "lens": _folder(url.get("lens"))}
    other = {"other": url.get("other") if compare == "another prompt" else same["prompt"],
             "other_lens": same["lens"] if compare == "another prompt" else _folder(url.get("other_lens"))}  # fmt: skip
    if not other["other"].strip():
        look.empty("The other prompt is empty. Write one above.", ":material/edit:")
        return
    measure = url.get("measure")
    own = {"model": model_asked()} | same | other | {"measure": measure, "target": url.get("target") or None}
    question = Question("lens_difference", own)
    answer = ask(question.task, **question.arguments)
    note = "Blue: less in the first; orange: more. Cells hold the likeliest token, or both where they differ."
    with card(f"The first less the second: {MEASURES[measure]}", question, answer, key="difference", note=note):
        if answer is not None:
            picture = answer["figures"]["heatmap"]
            heatmap(picture, key="difference-cells", selected=(row, pos), diverging=True, name="difference",
                    first=first,
                    on_select=lambda r, c: url.put(layer=layers[r], pos=c))  # fmt: skip


def _inside(layer: int) -> None:
    """Drawn on demand: pictures of many heads would make every click slow."""
    url.choice(st.segmented_control, "inside", "Look inside", INSIDE, required=True)
    if url.get("inside") == "attention":
        block = max(int(layer), 0)
        question = Question("attention", {"model": model_asked(), "prompt": url.get("prompt"), "layer": block})
        answer = ask(question.task, **question.arguments)
        with card(f"Where the heads of layer {block} look", question, answer, key="attention"):
            if answer is not None:
                figure(answer["figures"]["heads"], key="attention-heads")
    elif url.get("inside") == "lengths of states":
        question = Question("norms", {"model": model_asked(), "prompt": url.get("prompt")})
        answer = ask(question.task, **question.arguments)
        with card("How long states are", question, answer, key="norms", note="Massive activations stand out."):
            if answer is not None:
                figure(answer["figures"]["heatmap"], key="norms-heatmap")


def _selected(layers: list[Any], n: int) -> tuple[int, int]:
    """Row and column of the view's layer and token; the last ones where it names none that there is."""
    layer, pos = url.get("layer"), url.get("pos")
    row = layers.index(layer) if layer in layers else len(layers) - 1
    return row, pos if pos is not None and 0 <= pos < n else n - 1


def _window(n: int, pos: int) -> int:
    """The first token on screen; long prompts are turned over like pages."""
    if n <= COLUMNS:
        return 0
    pages = [*range(0, n, COLUMNS)]
    names = [f"{one} to {min(one + COLUMNS, n) - 1}" for one in pages]
    at = st.segmented_control(
        "Tokens", names, default=names[pos // COLUMNS], key=f"tokens-{pos // COLUMNS}", label_visibility="collapsed"
    )
    return pages[names.index(at)] if at else (pos // COLUMNS) * COLUMNS


def _lenses() -> list[str]:
    """Those that are shipped for the model, and fitted ones in the runs folder."""
    from workbench.lenses.kinds import KINDS, shipped_kinds

    return [
        *shipped_kinds(url.get("model")),
        *(one.name for one in found_runs("transports") if one.settings.get("lens") in KINDS),
    ]


def _folder(lens: str) -> str:
    from workbench.lenses.kinds import KINDS

    return lens if lens in KINDS else str(run_at(lens))


def _named(layer: Any) -> str:
    return "Embedding" if layer == -1 else f"Layer {layer}"


def _lens_name(name: str) -> str:
    return name.replace("_", " ")


def _whole(text: Any) -> bool:
    return str(text).lstrip("-").isdecimal()
