"""The log of runs: a JSON file for each, of which the newest thousand stay."""

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.artifacts import output_folder, read_json, write_json
from workbench.errors import BadArtifact, UnknownRun
from workbench.home import home

KEPT = 1000
"""Runs that the log holds; a record takes about 3 kB."""
_FILE = re.compile(r"\d{8}-\d{6}-\d{3}-[a-z-]+-[0-9a-f]{4}\.json")
_NEEDED = {"id", "verb", "arguments", "folder", "started", "outcome", "timings", "outputs", "stdout"}


@dataclass(frozen=True)
class Found:
    """A record, and where it was found."""

    record: dict[str, Any]
    beside: Path | None = None
    """The folder of results whose run.json it is from; None if it is from the log."""


def folder() -> Path | None:
    """`$WORKBENCH_RUNS`, or `runs` in the workbench's home; None where the variable is empty: no log is kept."""
    chosen = os.environ.get("WORKBENCH_RUNS")
    if chosen is None:
        return home() / "runs"
    return Path(chosen).expanduser() if chosen else None


def new_id(verb: str, started: datetime) -> str:
    """Ids sort by time. The last four digits keep two runs of one millisecond apart."""
    utc = started.astimezone(UTC)
    return f"{utc:%Y%m%d-%H%M%S}-{utc.microsecond // 1000:03}-{verb}-{os.urandom(2).hex()}"


def keep(record: dict[str, Any]) -> None:
    """Add a record, and let go of the oldest beyond those that are kept.

    Raises:
        CannotWrite: if the log's folder cannot be written.
    """
    log = folder()
    if log is None:
        return
    output_folder(log, "Set WORKBENCH_RUNS to another")
    write_json(log / f"{record['id']}.json", record)
    for old in _files(log)[KEPT:]:
        old.unlink(missing_ok=True)  # another process may have been faster


def newest(limit: int) -> list[dict[str, Any]]:
    """The last runs, the newest first. A file that is no record is passed over.

    Raises:
        UnknownRun: if no log is kept.
    """
    found = []
    for file in _files(_log()):
        if len(found) == limit:
            break
        try:
            found.append(_record(file))
        except BadArtifact:
            continue
    return found


def find(reference: str) -> Found:
    """The run that a word names: a folder with a run.json, such a file, an id of the log, or the beginning of one.

    Raises:
        UnknownRun: if there is none, or several begin so.
        BadArtifact: if the file holds no record of a run.
    """
    path = Path(reference).expanduser()
    if reference and path.is_dir():
        return Found(_record(path / "run.json"), path.absolute())
    if path.is_file():
        return Found(_record(path), path.parent.absolute() if path.name == "run.json" else None)
    log = _log()
    matches = [file for file in _files(log) if file.stem.startswith(reference)] if reference else []
    if not matches:
        raise UnknownRun(
            f"Run {reference!r} is no folder with a run.json, and no id in {str(log)!r} begins so. "
            "Take an id from workbench runs."
        )
    if len(matches) > 1:
        some = ", ".join(file.stem for file in matches[:3])
        raise UnknownRun(f"Run {reference!r} could be any of {len(matches)}: {some}, …. Write more of the id.")
    return Found(_record(matches[0]))


def _log() -> Path:
    log = folder()
    if log is None:
        raise UnknownRun("No log of runs is kept: WORKBENCH_RUNS is set but empty. Unset it, or name a folder with a run.json.")
    return log


def _files(log: Path) -> list[Path]:
    """The log's records, the newest first; other files in that folder are none of ours."""
    names = (name for name in os.listdir(log) if _FILE.fullmatch(name)) if log.is_dir() else ()
    return [log / name for name in sorted(names, reverse=True)]


def _record(file: Path) -> dict[str, Any]:
    """
    Raises:
        BadArtifact: if it is missing, or holds none.
    """
    value = read_json(file)
    record = value.get("run", value) if isinstance(value, dict) else None
    if not isinstance(record, dict) or not record.keys() >= _NEEDED:
        raise BadArtifact(f"{str(file)!r} holds no record of a run: no verb of the command line wrote it. Name another run.")
    return record
