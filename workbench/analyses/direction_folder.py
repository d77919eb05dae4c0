"""Decoded directions on disk."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.artifacts import output_folder, settings_of, staged
from workbench.errors import BadArtifact

if TYPE_CHECKING:
    import pandas as pd

KIND = "decoded directions"
TABLES = ("directions.parquet", "directions_bottom.parquet", "null.parquet")


def write(folder: Path, table: pd.DataFrame, bottom: pd.DataFrame, null: pd.DataFrame, settings: dict[str, Any]) -> Path:
    """All files are written beside their places before the first is renamed; run.json, renamed last, says that it is whole."""
    output_folder(folder)
    with ExitStack() as stack:
        run = stack.enter_context(staged(folder / "run.json"))
        for name, frame in zip(TABLES, (table, bottom, null), strict=True):
            frame.to_parquet(stack.enter_context(staged(folder / name)), index=False, compression="zstd")
        run.write_text(json.dumps({"kind": KIND} | settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "run.json").unlink(missing_ok=True)
    return folder


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """
    Raises:
        BadArtifact: if the folder holds no complete result of this kind.
    """
    import pandas as pd

    settings = settings_of(folder, KIND, "workbench decode")
    try:
        table, bottom, null = (pd.read_parquet(folder / name) for name in TABLES)
    except (OSError, ValueError, KeyError) as error:
        raise BadArtifact(f"The {KIND} in {str(folder)!r} are damaged ({error}). Make them again.") from None
    return table, bottom, null, settings
