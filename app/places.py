"""Where things lie: the runs folder, out of which no name may lead, and the app's own files."""

import os
from pathlib import Path

from workbench.embedded import DEFAULT
from workbench.errors import BadArtifact
from workbench.home import home

RUNS, MAPS, MODEL = "WORKBENCH_APP_RUNS", "WORKBENCH_APP_MAPS", "WORKBENCH_APP_MODEL"
"""Environment variables by which `workbench app` tells the page what it was asked."""


def runs_folder() -> Path:
    """Results that the app shows lie here, and those of its jobs are written here."""
    return Path(os.environ.get(RUNS) or "out").expanduser().resolve()


def named_maps() -> list[Path]:
    """Folders of maps elsewhere that were named at the start."""
    return [Path(one).expanduser().resolve() for one in os.environ.get(MAPS, "").split(os.pathsep) if one]


def first_model() -> str:
    """The model that the app opens with."""
    return os.environ.get(MODEL) or DEFAULT


def own_folder(name: str) -> Path:
    """A folder for what the app itself keeps: texts of links, cards, jobs, uploads."""
    folder = home() / "app" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def written(named: object) -> int | None:
    """When the run or the file that this names was last written, in nanoseconds; None where it names none."""
    if not isinstance(named, str) or not os.path.isabs(named):
        return None
    for file in (Path(named) / "run.json", Path(named)):
        try:
            return file.stat().st_mtime_ns
        except (OSError, ValueError):
            continue
    return None


def run_at(name: str) -> Path:
    """The folder of a run that a page or a link names.

    Raises:
        BadArtifact: if it is none below the runs folder, nor one that was named at the start.
    """
    try:
        folder = (runs_folder() / name).resolve()
        there = folder.is_dir()
    except (OSError, ValueError):  # too long, or with a zero byte
        raise BadArtifact(f"{name[:80]!r} is no name of a folder. Choose a run from Home.") from None
    named = folder in named_maps()
    if not named and (folder == runs_folder() or not folder.is_relative_to(runs_folder())):
        raise BadArtifact(f"{name!r} lies outside of the runs folder {str(runs_folder())!r}. Choose a run from Home.")
    if not there:
        raise BadArtifact(
            f"There is no run {name!r} in {str(runs_folder())!r}: it may have been deleted. Choose one from Home."
        )
    return folder


def name_of(folder: Path) -> str:
    """As a page or a link names it."""
    return str(folder.relative_to(runs_folder())) if folder.is_relative_to(runs_folder()) else str(folder)
