"""All state of the view, and its place in the URL: what a page shows is what its link says.

Defaults are left out, and a long prompt is named by its hash, its text kept beside the runs' log. A value that a link gets
wrong is the default. State outlives a change of page: the layer and token that are chosen on one are chosen on all.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from app.places import first_model, own_folder

LONG = 160
"""Letters of a text that still stand in the URL themselves."""
_STATE, _SEEN = "_view", "_url"


@dataclass(frozen=True)
class Param:
    """A part of the view."""

    default: Any
    read: Callable[[str], Any] = str
    """From the URL. May raise ValueError."""
    write: Callable[[Any], str] = str


def _text(text: str) -> str:
    if len(text) <= LONG and not text.startswith("~"):
        return text
    name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    (own_folder("texts") / f"{name}.txt").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    return f"~{name}"


def _read_text(text: str) -> str:
    if not text.startswith("~"):
        return text
    if not re.fullmatch(r"~[0-9a-f]{16}", text):
        raise ValueError(text)
    file = own_folder("texts") / f"{text[1:]}.txt"
    if not file.is_file():
        st.toast("This link names a long text by its hash, and the text is not on this machine.")
        raise ValueError(text)
    return file.read_bytes().decode("utf-8", "surrogatepass")


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def _flag(text: str) -> bool:
    return text == "1"


def _ids(text: str) -> tuple[str, ...]:
    found = tuple(text.split(".")) if text else ()
    if not all(re.fullmatch(r"[0-9a-f]{12}", one) for one in found):
        raise ValueError(text)
    return found


TEXT = {"read": _read_text, "write": _text}
FLAG = {"read": _flag, "write": lambda value: str(int(value))}
PARAMS: dict[str, Param] = {
    "model": Param(None), "dtype": Param("as stored"), "device": Param("as it is"),
    "prompt": Param("The capital of France is", **TEXT), "other": Param("The capital of Italy is", **TEXT),
    "target": Param(""), "lens": Param("logit"), "other_lens": Param("logit"), "measure": Param("target_rank"),
    "compare": Param("nothing"), "inside": Param("nothing"), "layer": Param(None, int), "pos": Param(None, int),
    "map": Param(None), "q": Param(""), "match": Param("folded"), "side": Param("all"), "bottom": Param(False, **FLAG),
    "within": Param(10, int), "neuron": Param(""), "decoder": Param("none"), "examples": Param(None),
    "start": Param("My dog is", **TEXT), "value": Param(8.0, _number), "clamp_side": Param("up"), "answer": Param(" Rome"),
    "matrix": Param("W_out"), "step": Param(0.0, _number), "run": Param(None), "pair": Param(""),
    "eraser": Param(None), "verb": Param("map-neurons"), "job": Param(None), "cards": Param((), _ids, ".".join),
}  # fmt: skip
"""Every part of the view, by its name in the URL."""


def open_view() -> None:
    """At the beginning of every run of the script: take up a link, or put the view into the URL after a change of page.

    A URL that differs from the view's own is taken up only where the browser went back or forth: that of any other run may be
    late, from before the last change arrived there.
    """
    asked = st.query_params.to_dict()
    if _STATE not in st.session_state:
        st.session_state[_STATE] = {}
        _take_up(asked)
    elif asked != st.session_state[_SEEN] and _through_history():
        _take_up(asked)
    _show()


def get(name: str) -> Any:
    """The value of a part of the view."""
    if name == "model":
        return st.session_state[_STATE].get(name) or first_model()
    return st.session_state[_STATE].get(name, PARAMS[name].default)


def put(**values: Any) -> None:
    """Change the view and the URL."""
    for name, value in values.items():
        if value == PARAMS[name].default:
            st.session_state[_STATE].pop(name, None)
        else:
            st.session_state[_STATE][name] = value
    _show()


def link(**others: Any) -> str:
    """The query of this view, with some values changed."""
    return urlencode(_written(st.session_state[_STATE] | others))


def widget(make: Callable[..., Any], name: str, label: str, **options: Any) -> Any:
    """A widget of Streamlit's whose value is a part of the view, here and on every other page."""
    key, value = f"w.{name}", get(name)
    for limit, inside in (("min_value", max), ("max_value", min)):  # a link may say what no slider does
        value = value if options.get(limit) is None else inside(value, options[limit])
    if value != get(name):
        put(**{name: value})
    st.session_state[key] = value
    make(label, key=key, on_change=_take, args=(name, key), **options)
    return get(name)


def choice(make: Callable[..., Any], name: str, label: str, among: Sequence[Any], **options: Any) -> Any:
    """The same for one of several; a value that is not among them any more is the first."""
    if not among:
        return None
    if get(name) not in among:
        default = PARAMS[name].default
        st.session_state[_STATE][name] = default if default in among else among[0]
    return widget(make, name, label, options=list(among), **options)


def _through_history() -> bool:
    context = get_script_run_ctx()
    return context is not None and context.is_history_navigation


def _take(name: str, key: str) -> None:
    put(**{name: st.session_state[key]})


def _take_up(asked: dict[str, str]) -> None:
    found = {}
    for name, text in asked.items():
        if name in PARAMS:
            try:
                found[name] = PARAMS[name].read(text)
            except ValueError:
                st.toast(f"The link's {name} = {text!r} is not understood: it is left out.")
    st.session_state[_STATE] = found


def _written(view: dict[str, Any]) -> dict[str, str]:
    return {
        name: param.write(view[name])
        for name, param in PARAMS.items()
        if name in view and view[name] is not None and view[name] != param.default
    }


def _show() -> None:
    wanted = _written(st.session_state[_STATE])
    st.session_state[_SEEN] = wanted
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)
