"""Whether a model fits into memory, asked before it is loaded."""

import os
from pathlib import Path

from workbench.embedded import EMBEDDED
from workbench.errors import UnknownModel, WorkbenchError
from workbench.model_files import find, weight_bytes

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
WORKING = 1.25
"""Beside the weights: activations, the projection's tiles, tables."""


class TooLarge(WorkbenchError):
    """A model that would not fit into the memory that is free."""


def available_bytes() -> int | None:
    """Memory that a new process could have; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def needed_bytes(folder: Path, dtype: str | None) -> int:
    """What a model takes when it is loaded and used: an estimate by the size of its files and their width."""
    stored = _stored_width(folder)
    return int(weight_bytes(folder) * (WIDTHS[dtype] / stored if dtype else 1) * WORKING)


def require_room(name: str, revision: str | None, dtype: str | None, device: str | None, freed: int = 0) -> int:
    """The estimate, in bytes.

    Args:
        freed: What is given back before it is loaded: the model before it.
    Raises:
        TooLarge: if it is to lie in main memory, and there is less.
        UnknownModel: if there is no such model on this machine.
    """
    if name in EMBEDDED and not EMBEDDED[name].is_pulled:
        raise UnknownModel(f"{name} is not here yet, and the explorer fetches nothing. Fetch it: workbench pull {name}")
    needed, free = needed_bytes(find(name, revision), dtype), available_bytes()
    if (device or "cpu") == "cpu" and free is not None and needed > free + freed:
        raise TooLarge(
            f"{name} would take about {needed / 1e9:.1f} GB{f' as {dtype}' if dtype else ''}, and "
            f"{(free + freed) / 1e9:.1f} GB are free. Choose bfloat16, a smaller model or another "
            "device, or end what else is running."
        )
    return needed


def _stored_width(folder: Path) -> int:
    """Bytes of a number, by the dtype that the config names; 4 if it names none."""
    from workbench.artifacts import read_json

    config = read_json(folder / "config.json")
    named = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    return WIDTHS.get(str(named).removeprefix("torch."), 4)
