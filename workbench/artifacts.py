"""Files on disk: JSON, Parquet and HTML, written beside their place and renamed, so that none is ever half-written."""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import BadArtifact, CannotWrite

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def output_folder(path: Path, advice: str = "Name another with --out") -> Path:
    """The folder, made if it is not there, and found to be writable before any work is done.

    Raises:
        CannotWrite: if it is a file, or cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise CannotWrite(
            f"Output folder {str(path)!r} cannot be written ({error.strerror or error}). {advice}, "
            "or give yourself the right to write there."
        ) from None
    return path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path beside the final one; renamed to it when the block ends well, deleted when it does not.

    Raises:
        CannotWrite: if the disk refuses, a full one included.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        raise CannotWrite(
            f"{str(path)!r} could not be written ({error.strerror or error}). "
            "Nothing half-written was left; make room or name another place, and run it again."
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final line break."""
    with staged(path) as beside:
        beside.write_text(json.dumps(strict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_page(path: Path, figure: "go.Figure") -> Path:
    """A picture as a page that works offline, the same bytes each time: plotly would draw the id of its place at random."""
    with staged(path) as beside:
        figure.write_html(beside, div_id="figure")
    return path


def write_html(path: Path, page: str) -> Path:
    """A page of text and tables."""
    with staged(path) as beside:
        beside.write_text(page, encoding="utf-8")
    return path


def write_tables(folder: str | Path, kind: str, settings: dict[str, Any], tables: "dict[str, pd.DataFrame | None]") -> Path:
    """A result in a folder: a Parquet file a table (of those that are not None; an older one of that name goes), and, last,
    run.json.

    Raises:
        CannotWrite: if the folder cannot be written.
    """
    folder = output_folder(Path(folder))
    (folder / "run.json").unlink(missing_ok=True)
    for name, table in tables.items():
        (folder / f"{name}.parquet").unlink(missing_ok=True)
        if table is not None:
            with staged(folder / f"{name}.parquet") as beside:
                table.to_parquet(beside, index=False, compression="zstd")
    write_json(folder / "run.json", {"kind": kind} | settings)
    return folder


def read_tables(
    folder: str | Path, kind: str, maker: str, names: Sequence[str]
) -> "tuple[pd.DataFrame, dict[str, pd.DataFrame | None], dict[str, Any]]":
    """The table of the kind's own name, which must be there, the others, where they are, and the settings.

    Args:
        maker: As `settings_of`.
    Raises:
        BadArtifact: if the folder holds no such result, or a damaged one.
    """
    import pandas as pd

    folder = Path(folder)
    settings = settings_of(folder, kind, maker)
    try:
        own = pd.read_parquet(folder / f"{kind}.parquet")
        files = {name: folder / f"{name}.parquet" for name in names}
        others = {name: pd.read_parquet(file) if file.is_file() else None for name, file in files.items()}
    except (OSError, ValueError) as error:  # pyarrow's errors of a damaged file are among them
        raise BadArtifact(f"The {kind} in {str(folder)!r} is damaged ({error}). Make it again.") from None
    return own, others, settings


def strict(value: Any) -> Any:
    """As JSON can hold it: keys are strings, NumPy's scalars Python's, and NaN and infinity null."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def settings_of(folder: Path, kind: str, maker: str) -> dict[str, Any]:
    """run.json of a result of this kind, without the record of the run that wrote it.

    Args:
        maker: What makes such results, as a user writes it.
    Raises:
        BadArtifact: if there is none, or it is of another kind.
    """
    settings = read_json(folder / "run.json")
    settings.pop("run", None)
    if settings.pop("kind", None) != kind:
        raise BadArtifact(f"{str(folder)!r} holds another kind of result, no {kind}. Make it with {maker}.")
    return settings


def read_json(path: Path) -> Any:
    """
    Raises:
        BadArtifact: if the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadArtifact(f"{str(path)!r} does not exist. Is this the folder that the job wrote to?") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise BadArtifact(f"{str(path)!r} cannot be read as JSON ({error}). Run the job that wrote it again.") from None
