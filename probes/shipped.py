"""The probe sets that come with the project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[1] / "data" / "probes"
"""A Parquet file a set, and `probes.json`. They lie in the project's own checkout."""


def shipped_sets() -> dict[str, dict[str, Any]]:
    """What is known of each set, by name: what it asks, rows, classes, groups, sources and licence. Empty where they are not
    installed."""
    about = SHIPPED / "probes.json"
    return json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
