"""The verb that reads lenses of other packages into ours."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.options import Device, DType, Json, Model, Out, Revision, load_model
from workbench.cli.show import emit_json, say
from workbench.manifest import wrote


def convert_lens(
    file: Annotated[Path, typer.Argument(help="Folder of a tuned lens (tuned-lens), or .pt file of a Jacobian lens.")],
    model: Model,
    out: Out,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Read a lens that others published into ours, for the model that it was made for."""
    from workbench.artifacts import output_folder
    from workbench.lenses.convert import convert_lens as convert

    output_folder(out)
    found = convert(file, load_model(model, revision, device, dtype))
    wrote(found.save(out))
    if json:
        emit_json({"out": str(out), "kind": found.kind, "maps": list(found.maps), "settings": found.settings})
        return
    print(found)
    for name, value in found.settings["converted"].items():
        print(f"  {name:18}  {value}")
    say(f"\nWritten to {out}. Use it: workbench lens --lens {out} --model {model} --prompt TEXT")


VERBS = {"convert-lens": convert_lens}
"""By the name on the command line."""
