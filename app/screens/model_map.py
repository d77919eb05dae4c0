"""Blocks and sites: what each name means, its shape, its other names, and whether the promises hold."""

from __future__ import annotations

import streamlit as st

from app import look
from app.asking import ask, model_asked
from app.card import card, rows_of, table
from app.lines import Question


def draw() -> None:
    """The model's sizes, the lamp of the self-check, and the catalogue of sites."""
    question = Question("load", {"model": model_asked()})
    answer = ask(question.task, **question.arguments)
    if answer is None:
        return
    about = answer["about"]
    with st.container(horizontal=True):
        for name, value in {
            "layers": about["n_layers"], "d_model": about["d_model"], "neurons a layer": about["d_mlp"],
            "heads": about["n_heads"], "vocabulary": about["d_vocab"], "family": about["family"],
        }.items():  # fmt: skip
            st.metric(name, f"{value:,}" if isinstance(value, int) else value, border=True)
    _lamp()
    rows = rows_of(answer["tables"]["table"])
    only = st.toggle("Only sites that this model has", True, key="only-available")
    shown = [row for row in rows if row["available"] or not only]
    with card(
        "Sites", question, answer, key="sites", note="Spelled as in TransformerLens. A range: resid_post.4:8, half-open."
    ):
        columns = ["site", "layers", "meaning", "shape", "module", "transformer_lens", "nnterp", "writable", "why"]
        chosen = table(
            {name: [row[name] for row in shown] for name in columns}, key="site-table", on_select="rerun",
            selection_mode="single-row", height=38 * (len(shown) + 1),
        )  # fmt: skip
        picked = chosen["selection"]["rows"]
        if not picked:
            look.empty("Choose a site to copy its names.", ":material/content_copy:")
            return
        row = shown[picked[0]]
        layer = "" if not row["layers"] else f".{str(row['layers']).partition(':')[0]}"
        for title, text in {
            "here": f"{row['site']}{layer}", "TransformerLens": row["transformer_lens"], "nnterp": row["nnterp"],
            "Hugging Face": row["module"],
            "read it": f'wb.capture(model, "The capital of France is", ["{row["site"]}{layer}"])',
        }.items():  # fmt: skip
            if text:
                left, right = st.columns([1, 8], vertical_alignment="center")
                left.caption(title)
                right.code(text, language=None)


def _lamp() -> None:
    """Every identity that the names promise: asked for once a model, as it takes some seconds."""
    question = Question("verify", {"model": model_asked()})
    if st.session_state.get("verify-asked") != model_asked():
        st.button("Verify the model", key="verify", icon=":material/fact_check:", on_click=_ask_verify)
        return
    answer = ask(question.task, **question.arguments)
    with card("Self-check", question, answer, key="verify", note="Parts sum to the stream; the head gives HF's own logits; …"):
        if answer is not None:
            (st.success if answer["passed"] else st.error)(answer["headline"])
            with st.expander("Each identity"):
                table(answer["tables"]["table"])


def _ask_verify() -> None:
    st.session_state["verify-asked"] = model_asked()
