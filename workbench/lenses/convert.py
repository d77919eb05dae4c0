"""A lens that others published, read into ours: once, for the model that the user names, and without running what is in it.

What can be held against the model is: its width, its layers, and its unembedding where the file has a hash of it. A model of
another name may be the same one, so that is a warning.
"""

from __future__ import annotations

import logging
from pathlib import Path

from workbench.errors import BadArtifact
from workbench.lenses.foreign import KNOWN, Published, lens_file, read_values
from workbench.lenses.jacobian_lens_file import is_jacobian_lens, jacobian_lens
from workbench.lenses.lens import Lens
from workbench.lenses.tuned_lens_file import is_tuned_lens, tuned_lens
from workbench.manifest import file_hash
from workbench.model import LanguageModel
from workbench.sites import state
from workbench.transports.transport import Transport, of_model

log = logging.getLogger("workbench")


def convert_lens(path: str | Path, model: LanguageModel) -> Lens:
    """The lens of a file or folder that tuned-lens, TransformerLens or the Jacobian lens's authors wrote.

    Numbers are the file's own, in its precision, turned to maps of rows; a tuned lens's have the identity added, in float64.
    `lens.settings["converted"]` has the file's name and SHA-256, its format, and what it says of itself.

    Args:
        model: The model that it was made for.
    Raises:
        BadArtifact: if the file is missing, damaged, not of a known format, or asks for code to be run.
        NotComparable: if it was made for another model.
        NotFinite: if there is NaN or infinity in it.
    """
    file = lens_file(Path(path))
    values = read_values(file)
    if is_jacobian_lens(values):
        found = jacobian_lens(file, values, model)
    elif is_tuned_lens(values):
        found = tuned_lens(file, values, model)
    else:
        names = ", ".join(map(str, list(values)[:4])) or "nothing"
        raise BadArtifact(f"{str(file)!r} holds {names}, which no known lens does. Known are {KNOWN}.")
    named = _is_named(found.base_model, model)
    if not named:
        log.warning("%s; it is converted for %s.", _doubt(file, found), model.name)
    converted = {
        "file": file.name,
        "sha256": file_hash(file),
        "format": found.format,
        "base_model": found.base_model,
        "names_this_model": named,
    } | found.says
    settings = of_model(model) | {"kind": found.kind, "affine": found.affine, "converted": converted}
    last = state(model.n_layers, model.n_layers)
    maps = [Transport(source, last, left, None, bias, settings) for source, (left, bias) in found.maps.items()]
    return Lens.of(maps, found.kind, settings)


def _is_named(base_model: str | None, model: LanguageModel) -> bool | None:
    """Whether it is the model's own name, whoever published it and wherever it lies; None if there is no name."""
    return Path(base_model).name.lower() == Path(model.name).name.lower() if base_model else None


def _doubt(file: Path, found: Published) -> str:
    return f"{file} says that it was made for {found.base_model}" if found.base_model else f"{file} names no model"
