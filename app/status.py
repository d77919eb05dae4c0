"""The sidebar: which model, whether it is there, what it takes; and its being loaded before anybody asks."""

from __future__ import annotations

import threading
from importlib import import_module

import streamlit as st

from app import url
from app.asking import model_asked, the_worker
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


def link() -> None:
    """All that is seen is in the address: this is it, to be copied."""
    with st.popover("Link to this view", icon=":material/link:", type="tertiary"):
        base = (st.context.url or "").partition("?")[0]
        query = url.link()
        st.code(f"{base}?{query}" if query else base, language=None, wrap_lines=True)
        st.caption("Opens the same view in any browser on this machine.")


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
    """Behind the first page: what the next ones import, and the model. What goes wrong is said by the first card that needs
    it."""
    _imports()
    if url.get("model") in {one.name for one in models() if one.state == "ready"}:
        the_worker().ask("load", model=model_asked())


@st.cache_resource(show_spinner=False)
def _imports() -> None:
    """Of what draws tables, pictures and searches: half a second that the first page does not wait for."""
    names = ("pandas", "duckdb", "plotly.graph_objects", "pyarrow.parquet")
    threading.Thread(target=lambda: [import_module(name) for name in names], daemon=True).start()
