"""How results reach the terminal: JSON on stdout, or a table."""

import json
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from workbench.artifacts import strict


def emit_json(value: Any) -> None:
    """One JSON object, strict: NaN and infinity become null."""
    print(json.dumps(strict(value), ensure_ascii=False))


def say(text: str) -> None:
    """Words for the person at the terminal."""
    print(text, file=sys.stderr)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, left: Sequence[str] = ()) -> None:
    """A table on stdout. Columns named in `left` are set flush left, the others (numbers) right; lines are cut to the
    terminal, or to 150 columns in a pipe.

    Not by rich: its import alone would take an eighth of the half second that a search of a large map may take.
    """
    lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(_width, cells)) for cells in zip(*lines, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 150
    print(title)
    for line in lines:
        cells = [_padded(cell, width, name in left) for cell, width, name in zip(line, widths, columns, strict=True)]
        print(_cut("  ".join(cells).rstrip(), room))


def _width(text: str) -> int:
    """Terminal cells: East Asian wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _padded(text: str, width: int, left: bool) -> str:
    gap = " " * (width - _width(text))
    return text + gap if left else gap + text


def _cut(text: str, room: int) -> str:
    while _width(text) > room:
        text = text[: room - (_width(text) - len(text)) - 1].rstrip() + "…"
    return text
