"""Results in the runs folder: what is there, whether it is whole, how much it takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.places import name_of, named_maps, run_at, runs_folder
from workbench.artifacts import read_json
from workbench.errors import BadArtifact

DEPTH = 3
"""Folders below the runs folder that are looked into."""


@dataclass(frozen=True)
class FoundRun:
    """A folder with a run.json, or one that a job began."""

    folder: Path
    kind: str
    state: str
    """`whole`, `unfinished`, or `damaged: ` and why."""
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return name_of(self.folder)

    @property
    def verb(self) -> str:
        return str(self.settings.get("run", {}).get("verb", ""))

    @property
    def started(self) -> str:
        return str(self.settings.get("run", {}).get("started", ""))[:16].replace("T", " ")

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())


def found_runs(*kinds: str) -> list[FoundRun]:
    """All, the newest first; of some kinds alone, those that are whole."""
    some = [_run(folder) for folder in (*_below(runs_folder(), DEPTH), *named_maps())]
    some = [one for one in some if not kinds or (one.kind in kinds and one.state == "whole")]
    return sorted(some, key=lambda one: (one.started, one.name), reverse=True)


def delete(name: str) -> int:
    """Delete a run and all below it; its bytes.

    Raises:
        BadArtifact: if it lies outside of the runs folder, or holds no run: nothing is deleted then.
    """
    folder = run_at(name)
    if not folder.is_relative_to(runs_folder()) or not _holds_run(folder):
        raise BadArtifact(f"{str(folder)!r} is no run of the runs folder: it is left alone.")
    size = _run(folder).bytes
    shutil.rmtree(folder)
    return size


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if depth == 0 or not folder.is_dir():
        return
    for one in sorted(folder.iterdir()):
        if one.is_dir() and not one.is_symlink() and not one.name.startswith("."):
            if _holds_run(one):
                yield one
            yield from _below(one, depth - 1)


def _holds_run(folder: Path) -> bool:
    return (folder / "run.json").exists() or any(folder.glob(".*-parts"))


def _run(folder: Path) -> FoundRun:
    if not (folder / "run.json").exists():
        return FoundRun(folder, "", "unfinished", {})
    try:
        settings = read_json(folder / "run.json")
        if not isinstance(settings, dict) or not isinstance(settings.get("run", {}), dict):
            raise BadArtifact("its run.json is no record.")
    except BadArtifact as error:
        return FoundRun(folder, "", f"damaged: {error}", {})
    settings = settings.get("settings", {}) | settings if isinstance(settings.get("settings"), dict) else settings
    return FoundRun(folder, str(settings.get("kind", "")), "whole", settings)
