"""Erasers on disk: one safetensors file, what they are in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.utils.validation import check_is_fitted

from probes.erasers.eraser import Eraser
from probes.erasers.named import ERASERS, class_of
from workbench.artifacts import output_folder, staged, strict
from workbench.errors import BadArtifact, UnknownOption

FORMAT = "workbench erasers 1"
PARTS = ("center_", "read_", "write_")


def save_erasers(erasers: Mapping[str, Eraser], path: str | Path) -> Path:
    """Write erasers, by name, to one file.

    Raises:
        UnknownOption: for an OracleLEACE, which is no map of rows alone.
        CannotWrite: if the file cannot be written.
    """
    path = Path(path)
    output_folder(path.absolute().parent, "Name another place")
    tensors, said = {}, {}
    for name, eraser in erasers.items():
        kind = type(eraser).__name__
        if kind == "OracleLEACE":
            raise UnknownOption("An OracleLEACE needs each row's label, so it is no map that a file could hold. Save a LEACE.")
        check_is_fitted(eraser, "write_")
        tensors |= {f"{name}/{part}": getattr(eraser, part) for part in PARTS}
        options = {key: value for key, value in eraser.get_params(deep=False).items() if _plain(value)}
        classes = getattr(eraser, "classes_", None)
        said[name] = {
            "kind": kind, "options": options, "settings": getattr(eraser, "settings_", {}),
            "classes": None if classes is None else np.asarray(classes).tolist(),
        }  # fmt: skip
    with staged(path) as beside:
        save_file(
            {name: value.contiguous().clone() for name, value in tensors.items()}, beside,
            {"format": FORMAT, "erasers": json.dumps(strict(said))},
        )  # fmt: skip
    return path


def load_erasers(path: str | Path) -> dict[str, Eraser]:
    """Read what `save_erasers` wrote.

    Raises:
        BadArtifact: if the file is missing, damaged, or holds no erasers.
    """
    try:
        with safe_open(str(path), "pt") as file:
            header: dict[str, str] = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise BadArtifact(f"{str(path)!r} holds no erasers. Make some with probes.fit_erasers, or workbench erase.")
            said: dict[str, Any] = json.loads(header["erasers"])
            return {name: _read(one, [file.get_tensor(f"{name}/{part}") for part in PARTS]) for name, one in said.items()}
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadArtifact):
            raise
        raise BadArtifact(f"The erasers in {str(path)!r} are missing or damaged ({error}). Make them again.") from None


def load_eraser(path: str | Path, name: str | None = None) -> Eraser:
    """The eraser of a file that is named (`resid_post.20/leace`), or the only one.

    Raises:
        UnknownOption: if there is none of that name, or there are several and none is named.
        BadArtifact: as `load_erasers`.
    """
    found = load_erasers(path)
    if name is None and len(found) > 1:
        raise UnknownOption(f"{str(path)!r} holds several erasers: {', '.join(found)}. Name one with --name, or name=.")
    if name is not None and name not in found:
        raise UnknownOption(f"{str(path)!r} has no eraser {name!r}. It has {', '.join(found)}.")
    return found[name or next(iter(found))]


def _read(said: dict[str, Any], parts: list[torch.Tensor]) -> Eraser:
    if said["kind"] not in ERASERS.values():
        raise BadArtifact(f"An eraser of the kind {said['kind']!r} is not known. Kinds are {', '.join(ERASERS.values())}.")
    center, read, write = parts
    fits = center.dim() == 1 and read.dim() == 2
    if (
        not fits
        or read.shape != write.shape
        or read.shape[:1] != center.shape
        or not all(bool(one.isfinite().all()) for one in parts)
    ):
        raise ValueError("its tensors do not fit together, or are no numbers")
    found: Any = class_of(said["kind"])(**said["options"])
    if said["classes"] is not None:
        found.classes_ = np.asarray(said["classes"])
    return found._set(center, read, write, said["settings"])


def _plain(value: Any) -> bool:
    """Whether JSON holds it; a classifier of one's own is left out."""
    return value is None or isinstance(value, (str, int, float, bool))
