"""Kinds of lenses, and which of them are shipped for a model: known without torch."""

from pathlib import Path
from typing import Literal

Kind = Literal["logit", "shortcut", "tuned", "jacobian", "jacobian_same_position"]
KINDS = ("logit", "shortcut", "tuned", "jacobian", "jacobian_same_position")
SHIPPED = Path(__file__).parents[2] / "data" / "lenses"
"""A folder a model, and in it one a kind. Empty where they are not installed: they lie in the project's own checkout."""


def shipped_kinds(model: str) -> list[str]:
    """Of a model's name; the logit lens needs no fitting."""
    return ["logit", *(kind for kind in KINDS if (SHIPPED / model / kind / "run.json").is_file())]
