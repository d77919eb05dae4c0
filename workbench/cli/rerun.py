"""A recorded run, made again in this process and in another place."""

import inspect
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from workbench.artifacts import output_folder, read_json
from workbench.cli.options import WRITTEN
from workbench.cli.show import say
from workbench.cli.verb import STOPPED
from workbench.errors import BadArtifact
from workbench.manifest import Heard


@dataclass(frozen=True)
class Rerun:
    """A run that repeats another."""

    record: dict[str, Any]
    """Of this run, with the paths of the other where it wrote to its own."""
    places: dict[Path, Path]
    """Where the other wrote, and where this one did."""

    def place(self, file: Path) -> Path:
        """Where this run wrote what the other wrote there."""
        for old, new in self.places.items():
            if file.is_relative_to(old):
                return new / file.relative_to(old)
        return file


def rerun(command: Any, record: dict[str, Any], folder: Path) -> Rerun:
    """Run a verb once more with the arguments of a record, writing below a folder and nowhere else.

    Args:
        command: The verb, as click's command.
        folder: An absolute path.
    Raises:
        BadArtifact: if the verb of this version does not take the arguments.
    """
    asked = record["arguments"]
    typed = {name: asked[name] for name in _written(command) if asked.get(name) is not None}
    theirs = {name: Path(record["folder"], path) for name, path in typed.items()}
    ours = {name: folder / name / Path(path).name for name, path in typed.items()}
    for path in ours.values():
        output_folder(path.parent)
    line = command_line(command, record | {"arguments": asked | {name: str(path) for name, path in ours.items()}})
    spelling = {str(ours[name]): typed[name] for name in typed}
    columns = record["stdout"]["columns"]
    heard = Heard(_Unseen(columns is not None), spelling)
    with tempfile.TemporaryDirectory() as log:
        width = None if columns is None else str(columns)
        with (
            _environment(WORKBENCH_RUNS=log, COLUMNS=width),
            _chdir(record["folder"]),
            redirect_stdout(heard),  # pyright: ignore[reportArgumentType]
        ):
            try:
                command.main(line, prog_name=f"workbench {record['verb']}")
            except SystemExit as end:  # how it ended is in its record
                if end.code == STOPPED:
                    raise
        records = [read_json(file) for file in Path(log).glob("*.json")]
    if not records:
        raise _other_version(record, "takes other values (see above)")
    again = records[0] | {"stdout": heard.fingerprint()}
    for name, text in spelling.items():
        again["error"] = again["error"] and again["error"].replace(name, text)
    for name, path in ours.items():
        outputs = again["outputs"].items()
        again["outputs"] = {file.replace(str(path), str(theirs[name]), 1): found for file, found in outputs}
    return Rerun(again, {theirs[name]: ours[name] for name in ours})


def command_line(command: Any, record: dict[str, Any]) -> list[str]:
    """The words that give a verb its recorded arguments.

    Raises:
        BadArtifact: if it has no parameter of such a name.
    """
    parameters = {parameter.name: parameter for parameter in command.params}
    options, positional = [], []
    for name, value in record["arguments"].items():
        if name not in parameters:
            raise _other_version(record, f"has no {name!r}")
        parameter = parameters[name]
        if value is None:
            continue
        values = [str(item) for item in (value if isinstance(value, list) else [value])]
        if parameter.param_type_name == "argument":
            positional += values
        elif parameter.is_flag:
            options += (parameter.opts if value else parameter.secondary_opts)[:1]
        else:
            longest = max(parameter.opts, key=len)
            joint = "=" if longest.startswith("--") else ""
            options += [f"{longest}{joint}{item}" for item in values]  # in one word, so that a value may begin with a dash
    return [*options, "--", *positional]


def _written(command: Any) -> list[str]:
    """The verb's options that say where it writes: of this version's verb, so that no record can have us write elsewhere."""
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    return [name for name, hint in hints.items() if WRITTEN in getattr(hint, "__metadata__", ())]


def _other_version(record: dict[str, Any], found: str) -> BadArtifact:
    version = record.get("versions", {}).get("mi-workbench", "unknown")
    return BadArtifact(
        f"Run {record['id']} cannot be run again: workbench {record['verb']} of this version {found}. "
        f"It was recorded with mi-workbench {version}: install that one."
    )


class _Unseen(io.TextIOBase):
    """Where words go that nobody is to see; a terminal, if tables are to be cut as for one."""

    def __init__(self, terminal: bool):
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def _environment(**variables: str | None) -> Iterator[None]:
    """Variables that are set for a while; None leaves one as it is."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _chdir(folder: str) -> Iterator[None]:
    """Relative paths are those of the recorded folder, if it is here."""
    if Path(folder).is_dir():
        with chdir(folder):
            yield
    else:
        say(f"The run was made in {folder}, which is not here: relative paths are taken from this folder.")
        yield
