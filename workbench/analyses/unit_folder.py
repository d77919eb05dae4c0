"""Top activations on disk."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.artifacts import output_folder, settings_of, staged
from workbench.errors import BadArtifact

if TYPE_CHECKING:
    import pandas as pd

KIND = "top activations"


def write(folder: Path, table: pd.DataFrame, statistics: pd.DataFrame, histogram: np.ndarray, settings: dict[str, Any]) -> Path:
    """All files are written beside their places before the first is renamed; run.json, renamed last, says that it is whole."""
    from safetensors.numpy import save_file

    output_folder(folder)
    with ExitStack() as stack:
        run = stack.enter_context(staged(folder / "run.json"))
        for name, frame in (("examples", table), ("statistics", statistics)):
            frame.to_parquet(stack.enter_context(staged(folder / f"{name}.parquet")), index=False, compression="zstd")
        save_file({"counts": histogram}, stack.enter_context(staged(folder / "histograms.safetensors")))
        run.write_text(json.dumps({"kind": KIND} | settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "run.json").unlink(missing_ok=True)
    return folder


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray, dict[str, Any]]:
    """
    Raises:
        BadArtifact: if the folder holds no complete result of this kind.
    """
    import pandas as pd
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    settings = settings_of(folder, KIND, "workbench top-activations")
    try:
        table, statistics = (pd.read_parquet(folder / f"{name}.parquet") for name in ("examples", "statistics"))
        return table, statistics, load_file(folder / "histograms.safetensors")["counts"], settings
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadArtifact(f"The {KIND} in {str(folder)!r} are damaged ({error}). Make them again.") from None
