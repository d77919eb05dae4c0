"""What every analysis returns: a frozen result with a tidy table and the settings that would make it again."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """A table, one row an observation, and the settings: model, revision, dtype and options."""

    table: pd.DataFrame
    settings: dict[str, Any]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{type(self).__name__} of {self.settings.get('model')}\n{self.table}"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def wrapped(text: str) -> str:
    """A paragraph in lines of 120 characters."""
    return fill(text, 120, break_on_hyphens=False)


def versions(*more: str) -> dict[str, str]:
    """Versions of what a number may depend on, and of more packages."""
    return {"python": platform.python_version()} | {
        package: _version(package) for package in ("mi-workbench", "torch", "transformers", *more)
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return "not installed"
