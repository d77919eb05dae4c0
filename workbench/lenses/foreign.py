"""Lens files of other packages: which file is meant, and how its numbers are taken from it without running what else is in it.

A `.pt` file is a pickle, and a pickle is a program: it can call whatever it names. torch's restricted reader builds tensors and
plain values only; a file that asks for more is refused.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import BadArtifact, NotFinite

KNOWN = (
    "a folder with config.json and params.pt, as tuned-lens writes them since 0.1; and a .pt file of a Jacobian lens (J) or of "
    "its unfinished fit (jacobian_sum), as TransformerLens and the lens's authors write them"
)
"""The formats that are read."""


class Published(NamedTuple):
    """What a file of others says, its matrices as ours are: rows h ↦ h @ left + bias."""

    kind: Literal["tuned", "jacobian"]
    format: str
    maps: Mapping[str, tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"]]]
    """Left and bias by the site that is read."""
    affine: bool
    base_model: str | None
    """The name of the model that it was made for, where the file has one."""
    says: dict[str, Any]
    """What else it says of itself, and how that was checked."""


def lens_file(path: Path) -> Path:
    """The file that holds the weights: the path itself, or the one `.pt` file of a folder.

    Raises:
        BadArtifact: if there is none, or several.
    """
    if not path.exists():
        raise BadArtifact(f"{str(path)!r} does not exist. Name a lens file or its folder; known are {KNOWN}.")
    if not path.is_dir():
        return path
    found = [path / "params.pt"] if (path / "params.pt").is_file() else sorted(path.glob("*.pt"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:6]) or "none"
        raise BadArtifact(f"Folder {str(path)!r} should hold one .pt file; it has {names}. Name the file; known are {KNOWN}.")
    return found[0]


def read_values(file: Path) -> dict[Any, Any]:
    """Tensors and plain values of a `.pt` file, in memory.

    Raises:
        BadArtifact: if it asks for code to be run, is damaged, or holds no dictionary.
    """
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that are no pickle, an unpickler may stumble in any way
        if isinstance(error, pickle.UnpicklingError) and (asked := re.search(r"GLOBAL (\S+)", str(error))):
            raise BadArtifact(
                f"{str(file)!r} is not read: it is a pickle that asks for {asked[1]!r}, and opening it would run that. A lens "
                "needs tensors and plain values only; ask whoever made it for a file of these."
            ) from None
        # Where torch says more than what is broken, it advises to let the file run what it likes.
        said = "" if "weights_only" in str(error) else str(error).partition("\n")[0][:120]
        why = f" ({said})" if said else ""
        raise BadArtifact(
            f"{str(file)!r} cannot be read: it is cut short, damaged, or no file that torch.save writes{why}. Fetch it again, "
            f"whole; known are {KNOWN}."
        ) from None
    if not isinstance(values, dict):
        raise BadArtifact(f"{str(file)!r} holds a {type(values).__name__}, which no known lens is. Known are {KNOWN}.")
    return values


def numbers(file: Path, name: str, value: object, shape: tuple[int, ...]) -> Tensor:
    """The value, if it is a tensor of numbers of that shape.

    Raises:
        BadArtifact: if it is none.
        NotFinite: if there is NaN or infinity in it.
    """
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided):
        raise BadArtifact(f"{str(file)!r}: {name} should be a tensor of floating-point numbers. The file is damaged.")
    if tuple(value.shape) != shape:
        raise BadArtifact(f"{str(file)!r}: {name} has shape {list(value.shape)}, not {list(shape)}. The file is damaged.")
    if not value.isfinite().all():
        raise NotFinite(f"{str(file)!r}: {name} holds NaN or infinity, so what is read through it is noise. Use another lens.")
    return value.detach()


def require_own(path: Path) -> None:
    """
    Raises:
        BadArtifact: if it is a `.pt` file, or a folder that has one and no result of ours.
    """
    if path.suffix == ".pt" or (not (path / "run.json").exists() and any(path.glob("*.pt"))):
        raise BadArtifact(
            f"{str(path)!r} is a file of another package, a pickle, and nothing is unpickled here. Read it into ours once: "
            f"workbench convert-lens {path} --model M --out DIR."
        )
