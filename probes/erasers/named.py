"""Erasers by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from workbench.errors import UnknownOption

ERASERS = {
    "leace": "LEACE",
    "inlp": "INLP",
    "mean": "MeanProjection",
    "sal": "SAL",
    "rlace": "RLACE",
    "random": "RandomSubspace",
}
"""Those that are maps of rows alone; OracleLEACE needs labels too."""
_HOMES = {"INLP": "inlp", "RLACE": "rlace"}


def class_of(kind: str) -> Any:
    """The class of that name."""
    return getattr(import_module(f"probes.erasers.{_HOMES.get(kind, 'closed_forms')}"), kind)


def eraser_named(name: str, **options: Any) -> Any:
    """An eraser that is not fitted.

    Raises:
        UnknownOption: if there is no such eraser, or it has no such option.
    """
    if name not in ERASERS:
        raise UnknownOption(f"There is no eraser {name!r}. Use one of {', '.join(ERASERS)}.")
    try:
        return class_of(ERASERS[name])(**options)
    except TypeError as error:
        raise UnknownOption(f"The eraser {name!r} does not take these options: {error}.") from None
