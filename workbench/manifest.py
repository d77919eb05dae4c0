"""What a run of a verb was: what was asked, what it was made of, what it wrote. Enough to run it again and compare."""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench import run_log
from workbench.artifacts import read_json, strict, write_json
from workbench.errors import WorkbenchError
from workbench.results import versions

log = logging.getLogger("workbench")

_PASSING = re.compile(r'("(?:\w+_)?(?:seconds|peak_bytes)": )[-+.\de]+')


@dataclass
class Run:
    """A run that is being recorded."""

    verb: str
    arguments: dict[str, Any]
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    facts: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)

    def record(self, error: BaseException | None, stdout: dict[str, Any]) -> dict[str, Any]:
        """All that is known of the run, for JSON: what was noted, and what every run has."""
        outcome, why = _outcome(error)
        return _plain(self.facts) | {
            "id": run_log.new_id(self.verb, self.started),
            "verb": self.verb,
            "arguments": self.arguments,
            "folder": str(Path.cwd()),
            "started": self.started.isoformat(timespec="milliseconds"),
            "outcome": outcome,
            "error": why,
            "versions": versions("safetensors", "numpy"),
            "machine": _machine(),
            "timings": self.timings,
            "peak_bytes": peak_bytes(),
            "outputs": {str(file): _fingerprint(file) for file in _files(self.written)},
            "stdout": stdout,
        }


_OPEN: ContextVar[Run | None] = ContextVar("run", default=None)


def note(**facts: Any) -> None:
    """Add facts to the record of the run that is open: model, corpus, sites, seed, … Without one, nothing happens."""
    if (run := _OPEN.get()) is not None:
        run.facts |= facts


def wrote(*paths: Path) -> None:
    """Name what the open run wrote: files, or folders whose top level holds nothing else (hidden files do not count).

    Hashes are taken when the run ends. Without an open run, nothing happens.
    """
    if (run := _OPEN.get()) is not None:
        run.written += [path.absolute() for path in paths]


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the block's seconds to the timings of the open run, as `{name}_seconds`."""
    started = time.perf_counter()
    yield
    if (run := _OPEN.get()) is not None:
        run.timings[f"{name}_seconds"] = round(time.perf_counter() - started, 3)


@contextmanager
def recording(verb: str, arguments: dict[str, Any]) -> Iterator[None]:
    """Record the block as a run of a verb, however it ends: in the log, and if it is done in run.json where it wrote.

    A record that cannot be written is a warning: the run itself is not harmed.

    Args:
        arguments: All of the verb's parameters with their values, as they were typed.
    """
    run, heard, clock = Run(verb, _plain(arguments)), Heard(sys.stdout), time.perf_counter()
    error, token = None, _OPEN.set(run)
    try:
        with redirect_stdout(heard):  # pyright: ignore[reportArgumentType]
            yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        _OPEN.reset(token)
        run.timings["total_seconds"] = round(time.perf_counter() - clock, 3)
        try:
            record = run.record(error, heard.fingerprint())
            try:
                _write_beside_results(record)
            finally:
                run_log.keep(record)
        except (OSError, RuntimeError, WorkbenchError) as refused:  # RuntimeError: there is no home folder
            log.warning("This run was not recorded. %s", refused)


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class Heard:
    """A stream that hashes what passes through it, line by line.

    Numbers of JSON keys that end in `seconds` or `peak_bytes` are left out, as no two runs take the same.
    """

    def __init__(self, stream: Any, spelling: dict[str, str] | None = None):
        """`spelling` has texts that are hashed as another: where this run writes, as the run before it spelled that."""
        self._stream, self._spelling = stream, spelling or {}
        self._digest, self._line, self._bytes = hashlib.sha256(), "", 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._hash(line + "\n")
        return self._stream.write(text)

    def fingerprint(self) -> dict[str, Any]:
        """SHA-256, bytes, and to how many columns tables were cut: None if that was no terminal."""
        self._hash(self._line)
        self._line = ""
        columns = shutil.get_terminal_size().columns if self._stream.isatty() else None
        return {"sha256": self._digest.hexdigest(), "bytes": self._bytes, "columns": columns}

    def _hash(self, text: str) -> None:
        for ours, theirs in self._spelling.items():
            text = text.replace(ours, theirs)
        heard = _PASSING.sub(r"\1_", text).encode("utf-8", "surrogateescape")
        self._digest.update(heard)
        self._bytes += len(heard)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As it will be read again: paths, enums and dtypes are strings."""
    return json.loads(json.dumps(strict(values), default=str))


def _outcome(error: BaseException | None) -> tuple[str, str | None]:
    """How a run ended, in two words at most, and the line that says why."""
    if error is None or not getattr(error, "exit_code", getattr(error, "code", 1)):  # typer.Exit(), SystemExit()
        return "done", None
    if isinstance(error, WorkbenchError):
        return "bad input", str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped", None
    return "failed", f"{type(error).__name__}: {error}"


def _files(written: list[Path]) -> list[Path]:
    """What was written and is there; run.json tells times and is never compared."""
    found = set()
    for path in written:
        beneath = path.iterdir() if path.is_dir() else [path]
        found |= {file for file in beneath if file.is_file() and file.name != "run.json" and not file.name.startswith(".")}
    return sorted(found)


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"sha256": file_hash(file), "bytes": file.stat().st_size}


def _write_beside_results(record: dict[str, Any]) -> None:
    """Under the key `run` of run.json in the verb's `out` folder, whatever else it says, if the run is done and wrote there.

    A job that was stopped leaves no run.json: a folder that has one is whole.
    """
    folder = Path(record["folder"], record["arguments"].get("out") or "")
    wrote_there = any(Path(file).is_relative_to(folder) for file in record["outputs"])
    if record["arguments"].get("out") and record["outcome"] == "done" and wrote_there:
        file = folder / "run.json"
        settings = read_json(file) if file.exists() else {}
        if isinstance(settings, dict):  # else it is not ours to change
            write_json(file, settings | {"run": record})


def _machine() -> dict[str, Any]:
    system = " ".join([platform.system(), platform.release(), platform.machine()])  # platform.platform() starts a process
    found: dict[str, Any] = {"platform": system, "cpus": os.cpu_count()}
    torch = sys.modules.get("torch")  # never imported for this: a search of a map does without
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_initialized():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def peak_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
