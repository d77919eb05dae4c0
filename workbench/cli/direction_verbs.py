"""Verbs about directions of the residual stream: decode."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.options import WRITTEN, DecoderOption, Device, DType, Json, Layers, Model, Revision, Stream, load_model
from workbench.cli.show import emit_json, say
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import note, wrote


def decode(
    what: Annotated[
        str,
        typer.Argument(help="heads; a matrix (W_O, W_out, W_in, W_gate, W_Q, W_K, W_V, OV); or a .safetensors or .npy file."),
    ],
    model: Model = DEFAULT_MODEL,
    layers: Layers = None,
    head: Annotated[int | None, typer.Option(help="Of an attention matrix, one head's part; needed for OV.")] = None,
    vectors: Annotated[int | None, typer.Option(min=1, help="Singular vectors of a matrix; 10, if not given.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Top and bottom tokens of each.")] = 10,
    decoder: Annotated[DecoderOption, typer.Option(help="How much of the head rows go through.")] = DecoderOption.none,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the tables and the picture."), WRITTEN] = None,
    show: Annotated[int, typer.Option(min=0, help="Directions in the JSON answer.")] = 20,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    stream: Stream = False,
    check: Annotated[bool, typer.Option(help="The short self-check; a streamed model is read once for it.")] = True,
    json: Json = False,
) -> None:
    """Read directions in the vocabulary: attention's output rows, a matrix's singular vectors, or vectors from a file."""
    from workbench.analyses.decoded_directions import decode_directions
    from workbench.analyses.direction_folder import TABLES
    from workbench.artifacts import output_folder, write_page

    if out is not None:
        output_folder(out)
    loaded = load_model(model, revision, device, dtype, stream=stream, check=check)
    found = decode_directions(loaded, _directions(loaded, what, layers, head, vectors), k=top_k, decoder=decoder.value)
    note(seed=found.settings["seed"])
    if out is not None:
        found.save(out)
        wrote(*(out / name for name in TABLES))
        wrote(write_page(out / "directions.html", found.plot()))
    if json:
        emit_json(
            {
                "settings": found.settings,
                "summary": found.summary().to_dict("records"),
                "specialised": found.specialised(show).to_dict("records"),
            }
        )
        return
    print(found)
    if out is not None:
        say(f"\nWritten to {out}: {', '.join(TABLES)}, run.json, directions.html.")


def _directions(model, what: str, layers: str | None, head: int | None, n: int | None):
    """What the argument means: heads, a matrix, or a file."""
    from workbench.analyses.directions import READS, WRITES, head_directions, singular_directions
    from workbench.errors import UnknownOption
    from workbench.sites import parse_layers

    matrices = (*READS, *WRITES, "OV")
    given = {"--layers": layers if what not in (*matrices, "heads") else None}
    given |= {} if what in matrices else {"--head": head, "--vectors": n}
    if unused := [option for option, value in given.items() if value is not None]:
        raise UnknownOption(f"{' and '.join(unused)} mean nothing for {what!r}. Leave them out.")
    if what == "heads":
        return head_directions(model, layers)
    if what in matrices:
        chosen = [] if layers is None else parse_layers(layers, model.n_layers)
        if len(chosen) != 1:
            raise UnknownOption(f"The singular vectors of {what} are one layer's. Name it: --layers 10.")
        return singular_directions(model, what, chosen[0], n or 10, head)
    if Path(what).suffix not in (".safetensors", ".npy"):
        known = f"heads, a matrix ({', '.join(matrices)}), or a .safetensors or .npy file of vectors"
        raise UnknownOption(f"{what!r} is not understood. Give {known}.")
    return what


VERBS = {"decode": decode}
