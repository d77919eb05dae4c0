"""Transports on disk: transports.safetensors and run.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from workbench.artifacts import output_folder, settings_of, staged, write_json
from workbench.errors import BadArtifact
from workbench.transports.transport import Transport

KIND, FILE = "transports", "transports.safetensors"


def save_transports(maps: Sequence[Transport], settings: dict[str, Any], folder: str | Path) -> Path:
    """
    Raises:
        CannotWrite: if the folder cannot be written, or the disk has no room.
    """
    folder = output_folder(Path(folder))
    (folder / "run.json").unlink(missing_ok=True)
    arrays = {
        f"{one.pair}/{name}": array.cpu().contiguous()
        for one in maps
        for name in ("left", "right", "bias")
        if (array := getattr(one, name)) is not None
    }
    with staged(folder / FILE) as beside:
        save_file(arrays, beside)
    said = [
        {"source": one.source, "target": one.target, "settings": _differing(one.settings, settings), "scores": one.scores}
        for one in maps
    ]
    write_json(folder / "run.json", {"kind": KIND, "settings": settings, "maps": said})
    return folder


def load_transports(folder: str | Path) -> tuple[list[Transport], dict[str, Any]]:
    """
    Raises:
        BadArtifact: if the folder holds no transports, or damaged ones.
    """
    folder = Path(folder)
    saved = settings_of(folder, KIND, "wb.fit_transports")
    try:
        arrays, maps = load_file(folder / FILE), []
        for one in saved["maps"]:
            pair = f"{one['source']}>{one['target']}"
            maps.append(
                Transport(
                    one["source"],
                    one["target"],
                    arrays[f"{pair}/left"],
                    arrays.get(f"{pair}/right"),
                    arrays[f"{pair}/bias"],
                    saved["settings"] | one["settings"],
                    {name: _number(value) for name, value in one["scores"].items()},
                )
            )
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise BadArtifact(f"The transports in {str(folder)!r} are damaged ({error}). Fit them again.") from None
    return maps, saved["settings"]


def load_one(folder: str | Path) -> Transport:
    """
    Raises:
        BadArtifact: if the folder holds none, several, or a damaged one.
    """
    maps, _ = load_transports(folder)
    if len(maps) != 1:
        raise BadArtifact(f"{str(folder)!r} holds {len(maps)} transports. Read them with Transports.load, and choose one.")
    return maps[0]


def _differing(own: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in own.items() if name not in common or common[name] != value}


def _number(value: float | None) -> float:
    """JSON has no NaN: null stands for it."""
    return float("nan") if value is None else value
