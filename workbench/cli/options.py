"""Options that several verbs share, each said once."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from workbench.errors import UnknownOption, WorkbenchError
from workbench.manifest import note, timed

Model = Annotated[
    str, typer.Option("--model", "-m", help="Embedded model, local folder or Hugging Face id.", show_default=True)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; where the weights are, if not given.")]
Stream = Annotated[bool, typer.Option("--stream", help="Read each layer's weights from its file when it is its turn.")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; as stored, if not given.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")]
WRITTEN = "written"
"""Marks an option that says where a verb writes, so that a replay can write elsewhere."""
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.", file_okay=True), WRITTEN]
Neuron = Annotated[str, typer.Argument(help="Layer and neuron: 12.345.")]
Layers = Annotated[
    str | None, typer.Option(help="7, -1, 4:8 (half-open), 0:30:5 (every fifth) or 0,5,10:12; all, if not given.")
]


class SideOption(StrEnum):
    """Sides of a neuron, for the command line."""

    up = "up"
    gate = "gate"
    down = "down"


class SidesOption(StrEnum):
    """A side of a neuron, or all that the model has."""

    up = "up"
    gate = "gate"
    down = "down"
    all = "all"


class ReadingOption(StrEnum):
    """How a neuron's reading rows are taken."""

    raw = "raw"
    gain = "gain"


class DecoderOption(StrEnum):
    """How much of the model's head a row goes through."""

    none = "none"
    gain = "gain"
    norm = "norm"


def layer_and_neuron(text: str) -> tuple[int, int]:
    """
    Raises:
        UnknownOption: if it is spelled otherwise.
    """
    layer, dot, neuron = text.partition(".")
    if not (dot and layer.isdecimal() and neuron.isdecimal()):
        raise UnknownOption(f"Neuron {text!r} is not understood. Write its layer and number: 12.345, both counted from 0.")
    return int(layer), int(neuron)


def token_of(text: str) -> str | int:
    """A token as the user names it: its string, or `id:250`."""
    return int(text[3:]) if re.fullmatch(r"id:\d+", text) else text


def load_model(
    name: str, revision: str | None, device: str | None, dtype: str | None, *, stream: bool = False, check: bool = True
):
    """The model that the options name; the record of the run says which it was.

    Raises:
        WorkbenchError: also for a dtype or device that does not exist here.
    """
    import torch

    import workbench

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise WorkbenchError(f"--dtype {dtype!r} is not known. Use float32, bfloat16 or float16.")
    chosen = None if dtype is None else getattr(torch, dtype)
    with timed("load_model"):
        loaded = workbench.load(name, revision=revision, device=device, dtype=chosen, stream=stream, check=check)
    note(model=loaded.provenance)
    return loaded
