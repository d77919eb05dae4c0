"""Verbs about runs: runs, replay."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench import run_log
from workbench.artifacts import output_folder, read_json
from workbench.cli.options import Json
from workbench.cli.show import emit_json, say, table
from workbench.errors import BadArtifact, NotReproduced, UnknownOption
from workbench.manifest import file_hash

if TYPE_CHECKING:
    from workbench.cli.rerun import Rerun

OWN = {"id", "arguments", "folder", "started", "timings", "peak_bytes", "outputs", "stdout"}
"""Of a record, what is another in each run, or is compared by itself."""
AROUND = {"versions", "machine"}
"""What may be another though the run is reproduced."""


def runs(
    limit: Annotated[int, typer.Option("-n", min=1, help="Lines to show.")] = 20,
    json: Json = False,
) -> None:
    """List the runs of the command line, the newest first ($WORKBENCH_RUNS, or runs in $WORKBENCH_HOME; the last 1,000)."""
    found = run_log.newest(limit)
    if json:
        emit_json({"folder": str(run_log.folder()), "runs": found})
        return
    rows = [
        (
            record["id"],
            f"{datetime.fromisoformat(record['started']).astimezone():%Y-%m-%d %H:%M}",
            record["verb"],
            f"{record['timings']['total_seconds']:.1f}",
            record["outcome"],
            record.get("model", {}).get("model", ""),
            _out(record) or "",
        )
        for record in found
    ]
    columns = ["id", "when", "verb", "seconds", "outcome", "model", "out"]
    table("", columns, rows, left=["id", "when", "verb", "outcome", "model", "out"])


def replay(
    run: Annotated[str, typer.Argument(help="Id of a run or its beginning, a folder of results, or its run.json.")],
    keep: Annotated[Path | None, typer.Option(help="New folder for what the replay writes; deleted, if not given.")] = None,
    json: Json = False,
) -> None:
    """Run a recorded run again, elsewhere, and compare every file and what was printed. Exit code 2 if something differs."""
    from workbench.cli import app
    from workbench.cli.rerun import rerun
    from workbench.file_differences import changed, listed

    found = run_log.find(run)
    record, verbs = found.record, typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    if record["verb"] not in verbs:
        raise BadArtifact(f"Run {record['id']} is of {record['verb']!r}, which is no verb of this version of the workbench.")
    with _folder(keep) as folder:
        say(f"Running {record['id']} again, in {folder}.")
        again = rerun(verbs[record["verb"]], record, folder)
        files = _compared(found, again)
    records = (record, again.record)
    around = changed(*({key: one.get(key) for key in AROUND} for one in records))
    facts = changed(*({key: one[key] for key in ("outcome", *one) if key not in OWN | AROUND} for one in records))
    differing = [f"{file['file']} {file['verdict']}" for file in files if file["verdict"] != "same"]
    reproduced = not differing and not facts
    if json:
        emit_json({"run": record["id"], "reproduced": reproduced, "files": files, "facts": facts, "around": around})
    else:
        rows = [(file["file"], _hash(file["recorded"]), _hash(file["found"]), file["verdict"], file["why"]) for file in files]
        columns = ["file", "recorded", "now", "verdict", "why"]
        table(f"{record['id']}, run again", columns, rows, left=["file", "verdict", "why"])
        for key, (old, new) in sorted((facts | around).items()):
            print(f"{key}: {old} -> {new}")
    if keep is not None:
        say(f"\nWritten to {keep}.")
    if not reproduced:
        what = ", ".join(differing) or "what is written and printed is the same"
        causes = f"; made of something else: {listed(facts)}" if facts else ""
        elsewhere = f" Beside that, {listed(around)}." if around else ""
        raise NotReproduced(
            f"Run {record['id']} was not reproduced: {what}{causes}.{elsewhere} "
            "Give it the model, files and versions that it was recorded with; --keep DIR keeps the new files to look at."
        )
    if not json:
        say(f"\nReproduced: {len(files) - 1} files and what was printed are the same.")


def _compared(found: run_log.Found, again: "Rerun") -> list[dict[str, Any]]:
    """A row for each file that either run wrote, and one for what was printed."""
    old, new = found.record["outputs"], again.record["outputs"]
    rows = [_row(found, again, Path(name), old.get(name), new.get(name)) for name in sorted(old | new)]
    printed = [one["stdout"]["sha256"] for one in (found.record, again.record)]
    verdict = "same" if printed[0] == printed[1] else "differs"
    return [*rows, {"file": "stdout", "recorded": printed[0], "found": printed[1], "verdict": verdict, "why": ""}]


def _row(
    found: run_log.Found, again: "Rerun", file: Path, old: dict[str, Any] | None, new: dict[str, Any] | None
) -> dict[str, Any]:
    from workbench.file_differences import describe

    recorded, now = (None if one is None else one["sha256"] for one in (old, new))
    there, why = _on_disk(found, file), ""
    whole = there is not None and file_hash(there) == recorded
    if old is None or new is None:
        verdict = "is not written any more" if new is None else "was not written before"
    elif recorded != now:
        why = describe(there, again.place(file)) if there is not None and whole else "the recorded one is not there to compare"
        verdict = "differs" if why else "same"
    elif there is not None and not whole:
        verdict, why = "was altered", f"on disk, since it was written: {describe(again.place(file), there)}"
    else:
        verdict = "same"
    return {"file": file.name, "recorded": recorded, "found": now, "verdict": verdict, "why": why}


def _on_disk(found: run_log.Found, file: Path) -> Path | None:
    """The file that the run wrote, if it is there and no later run wrote over it; its folder may have moved."""
    out = _out(found.record)
    if out is not None and file.is_relative_to(out):
        home = found.beside or Path(out)
        try:
            owner = read_json(home / "run.json")["run"]["id"]
        except (BadArtifact, KeyError, TypeError):
            return None
        file = home / file.relative_to(out)
        return file if owner == found.record["id"] and file.is_file() else None
    return file if file.is_file() and file_hash(file) == found.record["outputs"].get(str(file), {}).get("sha256") else None


def _out(record: dict[str, Any]) -> str | None:
    out = record["arguments"].get("out")
    return out and str(Path(record["folder"], out))


def _hash(sha256: str | None) -> str:
    return "-" if sha256 is None else sha256[:12]


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Where the replay writes.

    Raises:
        UnknownOption: if it holds files: those of the run itself may be among them.
    """
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    if any(output_folder(keep, "Name another with --keep").iterdir()):
        raise UnknownOption(f"--keep {str(keep)!r} holds files, which a replay might write over. Name a new or empty folder.")
    yield keep.absolute()


VERBS = {"runs": runs, "replay": replay}
