"""A neuron map on disk, and the finished layers of one that is being made."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.artifacts import output_folder, settings_of, staged
from workbench.errors import BadArtifact
from workbench.tokens import fold

if TYPE_CHECKING:
    import pandas as pd

    from workbench.projection import Projection

KIND, VERB = "neuron map", "map-neurons"
PARTS = ".neuron-map-parts"
TABLES = ("neurons.parquet", "neurons_bottom.parquet", "null.parquet", "tokens.parquet")
"""What a map consists of, beside run.json."""
ROW_GROUP = 1 << 16
"""Rows. Small groups: a search for one token reads one or two of them."""
_KEYS = ["side", "layer", "neuron", "rank"]


def write(
    folder: Path, table: pd.DataFrame, bottom: pd.DataFrame, null: pd.DataFrame, tokens: list[str], settings: dict[str, Any]
) -> Path:
    """Write the tables and run.json: a folder with a run.json is whole.

    All files are written beside their places before the first is renamed, so a map that was there before survives a full
    disk. Rows are sorted by token, so that a search reads only the row groups that hold it (and then as they come: by side,
    layer, neuron and rank).
    """
    output_folder(folder)
    with ExitStack() as stack:
        # Renamed in reverse: run.json, entered first, last.
        run = stack.enter_context(staged(folder / "run.json"))
        paths = [stack.enter_context(staged(folder / f"{name}.parquet")) for name in ("neurons", "neurons_bottom")]
        with ThreadPoolExecutor() as pool:  # pyarrow works outside Python's lock
            list(pool.map(_write_by_token, paths, (table, bottom)))
        _write_parquet(stack.enter_context(staged(folder / "null.parquet")), null)
        _write_parquet(stack.enter_context(staged(folder / "tokens.parquet")), token_table(tokens))
        run.write_text(json.dumps({"kind": KIND} | settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "run.json").unlink(missing_ok=True)
    return folder


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, list[str], dict[str, Any]]:
    """
    Raises:
        BadArtifact: if the folder holds no complete neuron map.
    """
    import pandas as pd

    settings = settings_of(folder, KIND, f"workbench {VERB}")
    try:
        table, bottom = (
            pd.read_parquet(folder / f"{name}.parquet").sort_values(_KEYS, ignore_index=True)
            for name in ("neurons", "neurons_bottom")
        )
        null = pd.read_parquet(folder / "null.parquet")
        tokens = pd.read_parquet(folder / "tokens.parquet")["token"].tolist()
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors of a damaged file are among them
        raise BadArtifact(f"The neuron map in {str(folder)!r} is damaged ({error}). Make it again.") from None
    return table, bottom, null, tokens, settings


def token_table(tokens: list[str]) -> pd.DataFrame:
    """Columns token_id, token and folded, as `neuron_search` reads them."""
    import pandas as pd

    return pd.DataFrame({"token_id": range(len(tokens)), "token": tokens, "folded": [fold(token) for token in tokens]})


class Parts:
    """Finished layers of a map in the making, in a folder of their own: files that are whole or not there.

    A file's name holds a hash of the job's settings, so parts of another job (another model, k, decoder, version, …) are
    never taken for this one's.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder / PARTS
        output_folder(self.folder)
        job = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self._file = lambda side, layer: self.folder / f"{job}-{side}-{layer}.safetensors"

    def get(self, side: str, layer: int) -> Projection | None:
        """A layer that was finished before, if it was."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from workbench.projection import Projection

        file = self._file(side, layer)
        try:
            return Projection(**load_file(file)) if file.exists() else None
        except (SafetensorError, TypeError):  # damaged: made again
            return None

    def put(self, side: str, layer: int, found: Projection) -> None:
        """Keep a finished layer."""
        from dataclasses import asdict

        from safetensors.torch import save_file

        tensors = {name: tensor.cpu().contiguous() for name, tensor in asdict(found).items() if tensor is not None}
        with staged(self._file(side, layer)) as beside:
            save_file(tensors, beside)


def remove_parts(folder: Path) -> None:
    """Remove the parts in a folder, whichever job's: the map is saved."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _write_by_token(path: Path, frame: pd.DataFrame) -> None:
    """As `_write_parquet` of the sorted frame, in two thirds of the time: one stable sort of integers, columns gathered by
    pyarrow, and no dictionaries for numbers that hardly repeat (they also cost a quarter of the file)."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    sorted_rows = pa.Table.from_pandas(frame, preserve_index=False).take(
        np.argsort(frame["token_id"].to_numpy(), kind="stable")
    )
    repeating = ["side", "layer", "token_id", "token"]
    pq.write_table(
        sorted_rows,
        path,
        compression="zstd",
        row_group_size=ROW_GROUP,
        use_dictionary=repeating,  # pyright: ignore[reportArgumentType]  # its stub knows True and False alone
    )


def _write_parquet(path: Path, frame: pd.DataFrame) -> None:
    frame.to_parquet(path, index=False, compression="zstd", row_group_size=ROW_GROUP)
