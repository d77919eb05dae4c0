"""The sidebar: which model, whether it is there, what it takes; and its being loaded before anybody asks."""

from __future__ import annotations

import streamlit as st

from app import url
from app.asking import ask, model_asked, the_worker
from workbench.model_files import models

NOT_CHOSEN = "as stored"


def model_chooser() -> None:
    """One model is in memory at a time; choosing another lets it go."""
    names = [one.name for one in models() if one.state == "ready"]
    chosen = url.get("model")
    url.widget(
        st.selectbox, "model", "Model", options=names if chosen in names else [*names, chosen], accept_new_options=True,
        help="Embedded and cached ones, or type a folder. Nothing is fetched.",
    )  # fmt: skip
    with st.expander("Precision and device"):
        url.choice(st.selectbox, "dtype", "Numbers", [NOT_CHOSEN, "float32", "bfloat16", "float16"])
        url.choice(st.selectbox, "device", "Device", ["as it is", "cpu", "cuda", "mps"])


def lamp() -> None:
    """Whether the model is there. While it is being loaded, or works, the lamp looks again every second."""
    worker = the_worker()
    busy = worker.current is not None
    st.fragment(_lamp, run_every=1.0 if busy or worker.model is None else None)()


def _lamp() -> None:
    worker = the_worker()
    model, current = worker.model, worker.current
    if current is not None and (model or {}).get("asked") != url.get("model"):
        st.caption(f":orange[●] Loading {url.get('model')} …")
    elif model is None or model["asked"] != url.get("model"):
        st.caption(":gray[●] Not loaded yet: the first question loads it.")
    else:
        st.caption(
            f":green[●] {model['model']} · {model['dtype']} on {model['device']} · {model['bytes'] / 1e9:.2f} GB · "
            f"{model['n_layers']} layers × {model['d_mlp']:,} neurons",
        )
    if current is not None and current.task != "load":
        st.caption(f"Working: {current.task.replace('_', ' ')}")


def warm_up() -> None:
    """Load the model behind the first page. What goes wrong is said by the first card that needs it."""
    if url.get("model") in {one.name for one in models() if one.state == "ready"}:
        the_worker().ask("load", model=model_asked())


def need_model() -> bool:
    """Whether the model of the view can be had; else the page says why not."""
    return ask("load", model=model_asked()) is not None
