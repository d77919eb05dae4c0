"""A form for a verb of the command line, made of the verb's own options: what is filled in is the line that is run."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import streamlit as st

from app.places import runs_folder
from app.uploads import upload
from workbench.errors import UnknownOption

VERBS = {
    "map-neurons": "Which words do all neurons speak for?",
    "top-activations": "Where is each neuron most active?",
    "word-activations": "Do neurons fire on the words they decode to?",
    "compare-maps": "Which neurons have other words in another model?",
    "probe": "Is a concept linearly there, layer by layer?",
    "erase": "Can it be erased, and does the model then miss it?",
    "transport": "What is carried linearly from state to state?",
    "linearity": "How linear is each layer?",
    "shortcuts": "What would jumping to the last layer cost?",
    "lens-quality": "How near do lenses come to the output?",
    "fit-lens": "Fit a lens.",
    "decode": "Words of heads, singular directions, or directions of a file.",
    "edit-facts": "Can facts be edited, layer by layer?",
}  # fmt: skip
"""Verbs that have a form, and what they ask."""
FIRST = {
    "map-neurons": ("side", "layers"), "top-activations": ("corpus", "sites", "max_tokens"),
    "word-activations": ("map", "corpus", "max_tokens"), "compare-maps": ("a", "b"),
    "probe": ("data", "site", "probe", "examples"),
    "erase": ("data", "site", "eraser", "curve", "follow"), "transport": ("corpus", "pairs", "max_tokens", "closely"),
    "linearity": ("corpus", "max_tokens"), "shortcuts": ("corpus", "max_tokens"),
    "lens-quality": ("corpus", "kind", "max_tokens"),
    "fit-lens": ("corpus", "kind", "max_tokens"), "decode": ("what", "layers"), "edit-facts": ("facts", "n"),
}  # fmt: skip
"""Options that stand before "More options"."""
START = {"corpus": "wikipedia", "max_tokens": 20_000, "data": "number", "sites": "mlp_post.20", "closely": None}
"""What a form begins with where the verb has no default: small enough for a laptop."""
NAME = re.compile(r"[\w][\w. -]{0,80}")


@cache
def command(verb: str) -> Any:
    """The verb, as click has it."""
    import typer

    from workbench.cli import app

    return typer.main.get_command(app).commands[verb]  # pyright: ignore[reportAttributeAccessIssue]


def form(verb: str, model: str) -> list[str] | None:
    """Draw it. The words of the command when it is sent, else None.

    Raises:
        UnknownOption: if the command line would refuse it.
    """
    options = {one.name: one for one in command(verb).params if one.name not in ("out", "json", "help", "plot")}
    first = [name for name in ("model", *FIRST[verb]) if name in options]
    _uploads(options)
    with st.form(f"form-{verb}", border=False):
        given = {name: _field(verb, options[name], model) for name in first}
        with st.expander("More options"):
            given |= {name: _field(verb, options[name], model) for name in options if name not in first}
        name = st.text_input("Name of the run", verb, key=f"form-{verb}-name", help="A folder of the runs folder.")
        sent = st.form_submit_button("Run", type="primary", icon=":material/play_arrow:")
    if not sent:
        return None
    if not NAME.fullmatch(name) or ".." in name:
        raise UnknownOption(f"{name!r} is no name for a run. Use letters, digits, spaces, dots and dashes.")
    return checked(verb, words(verb, given, name))


def words(verb: str, given: dict[str, Any], name: str) -> list[str]:
    """The command's words: options that are given and are no defaults, then positional ones."""
    options, positional = [], []
    for one in command(verb).params:
        if one.name == "out":
            options.append(f"--out={runs_folder() / name}")
            continue
        value = given.get(one.name)
        if value is None or value == "" or value == one.default:
            continue
        longest = max(one.opts, key=len)
        if one.param_type_name == "argument":
            positional.append(str(value))
        elif one.is_flag:
            options.append(longest if value else one.secondary_opts[0])
        else:
            values = [part for part in str(value).split("\n") if part] if one.multiple else [value]
            joint = "=" if longest.startswith("--") else ""  # in one word, so that a value may begin with a dash
            options += [f"{longest}{joint}{part}" for part in values]
    return [verb, *options, *(["--", *positional] if positional else [])]


def checked(verb: str, line: list[str]) -> list[str]:
    """The words, if the command line takes them.

    Raises:
        UnknownOption: if not, with its own reason.
    """
    try:
        command(verb).make_context(verb, line[1:])
    except Exception as error:  # click's errors, of whichever click typer brings along
        said = getattr(error, "format_message", None)
        raise UnknownOption(said() if said else str(error)) from None
    return line


def _uploads(options: dict[str, Any]) -> None:
    kinds = {"corpus": ("txt", "parquet"), "data": ("csv", "parquet"), "what": ("safetensors",)}
    for name, endings in kinds.items():
        if name in options:
            upload(f"Or a file of your own for {name}", endings, key=f"upload-{name}")


def _field(verb: str, option: Any, model: str) -> Any:
    """The widget of an option, by its type."""
    key, label = f"form-{verb}-{option.name}", f"--{option.name.replace('_', '-')}"
    if all(len(one) == 2 for one in option.opts):
        label = option.opts[0]
    told = getattr(option, "help", None)
    default = model if option.name == "model" else option.default
    if default is None or callable(default) or str(default) == "Sentinel.UNSET":
        default = START.get(option.name) if option.required or option.name == "max_tokens" else None
    choices = getattr(option.type, "choices", None)
    if getattr(option, "is_flag", False) and default is None:  # the verb itself decides
        return {"yes": True, "no": False}.get(st.selectbox(label, ["", "yes", "no"], key=key, help=told) or "")
    if getattr(option, "is_flag", False):
        return st.checkbox(label, bool(default), key=key, help=told)
    if choices and not option.multiple:
        names = [getattr(one, "value", str(one)) for one in choices]
        chosen = getattr(default, "value", default)
        among = names if chosen in names else ["", *names]
        return st.selectbox(label, among, among.index(chosen) if chosen in among else 0, key=key, help=told)
    kind = next((one for one in (int, float) if option.type.name.startswith(one.__name__)), None)  # "int range", "integer"
    if kind is not None and not option.multiple:
        step: Any = 1 if kind is int else 0.1
        value: Any = None if default is None else kind(default)
        return st.number_input(label, value=value, step=step, key=key, help=told)
    if option.multiple:
        return st.text_area(label, "", key=key, help=f"{told} One a line.", height=68)
    return st.text_input(label, "" if default is None else str(default), key=key, help=told)
