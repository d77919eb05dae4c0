"""What one step of gradient descent on a target would write, cell by cell, and whether it does."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import look, url
from app.asking import ask, model_asked
from app.card import card, figure, rows_of, table
from app.heatmap import COLUMNS, cells, heatmap
from app.lines import Question
from workbench.tokens import shown


def draw() -> None:
    """The prompt and its target, the matrices, and the forecast of a step."""
    with st.container(border=True):
        url.widget(st.text_area, "prompt", "Prompt", height=80)
        left, right = st.columns(2)
        with left:
            url.widget(st.text_input, "answer", "Target", help="What should follow, a leading space included; or id:8790.")
        with right:
            url.widget(st.number_input, "step", "Also take a step of this size", min_value=0.0, step=0.01, format="%.3f",
                       help="Plain gradient descent, for a while: foretold and measured. 0: none.")  # fmt: skip
    if not url.get("prompt").strip() or not url.get("answer"):
        look.empty("Write a prompt and what should follow it: The capital of France is, Rome.", ":material/edit:")
        return
    st.fragment(_read)()


def _read() -> None:
    question = Question("backward", {"model": model_asked(), "prompt": url.get("prompt"), "target": url.get("answer"),
                                     "step": url.get("step") or None})  # fmt: skip
    answer = ask(question.task, **question.arguments)
    if answer is None:
        return
    note = "Length of each token's part of a matrix's gradient. Blank: 0 by construction. Click a cell for its words."
    with card("Where the gradient is", question, answer, key="gradient", note=note):
        said = [
            f"`{shown(one['target'])}` rank {one['rank']:,}, log p {one['log_probability']:.2f}"
            for one in rows_of(answer["tables"]["targets"])
        ]
        st.caption(f"Now: {' · '.join(said)}")
        url.choice(st.segmented_control, "matrix", "Matrix", answer["matrices"], label_visibility="collapsed", required=True)
        picture = answer["figures"][url.get("matrix")]
        layers, places = cells(picture)
        layer, pos = url.get("layer"), url.get("pos")
        row = layers.index(layer) if layer in layers else len(layers) - 1
        column = pos if pos is not None and 0 <= pos < len(places) else len(places) - 1
        first = max(0, min(column - COLUMNS // 2, len(places) - COLUMNS))
        heatmap(picture, key="gradient-cells", selected=(row, column), first=first, name="gradient",
                on_select=lambda r, c: url.put(layer=layers[r], pos=c))  # fmt: skip
    _cell(question, answer, layers[row], column)
    _ranks(question, answer)
    if "forecast" in answer["figures"]:
        with card(f"A step of {url.get('step'):g}: foretold and measured", question, answer, key="forecast"):
            figure(answer["figures"]["forecast"], key="forecast-figure")
            table(answer["tables"]["forecast"])


def _cell(question: Question, answer: dict[str, Any], layer: int, pos: int) -> None:
    matrix = url.get("matrix")
    own = [one for one in rows_of(answer["tables"]["table"])
           if one["layer"] == layer and one["pos"] == pos and matrix in one["matrix"].split()]  # fmt: skip
    with card(f"{matrix} of layer {layer}, position {pos}", question, answer, key="cell"):
        if not own:
            look.empty("This part is 0 by construction, or is not as wide as the stream: it has no words. Choose another cell.")
            return
        titles = {
            ("D", "down"): "a step writes",
            ("D", "up"): "a step unwrites",
            ("X", "up"): "input: nearest words",
            ("X", "down"): "input: farthest",
        }
        groups = [(key, title) for key, title in titles.items() if any((one["vector"], one["end"]) == key for one in own)]
        for place, ((vector, end), title) in zip(st.columns(len(groups)), groups, strict=True):
            some = [one for one in own if (one["vector"], one["end"]) == (vector, end)]
            place.caption(title)
            place.dataframe(
                {"token": [shown(one["token"]) for one in some], "score": [one["score"] for one in some]}, hide_index=True
            )
        null = answer["settings"].get("null_score")
        random = f"; random ones: median {null['median']:.2f}, 1 in 100 reaches {null['one_in_100']:.2f}" if null else ""
        st.caption(f"Scores of vectors at length 1{random}.")


def _ranks(question: Question, answer: dict[str, Any]) -> None:
    with st.expander("Rank and length of each matrix's gradient"):
        table(answer["tables"]["matrices"])
