"""The folder where the workbench keeps what it fetched."""

import os
from pathlib import Path


def home() -> Path:
    """`$WORKBENCH_HOME`, or `mi-workbench` in the user's cache folder."""
    if chosen := os.environ.get("WORKBENCH_HOME"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mi-workbench"
