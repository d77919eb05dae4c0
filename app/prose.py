"""Tokens and texts as HTML, every letter of theirs escaped."""

from collections.abc import Sequence
from html import escape
from typing import Any

import streamlit as st

from workbench.tokens import shown


def tokens(all_of_them: Sequence[dict[str, Any]], chosen: int | None = None) -> None:
    """A text's tokens with their ids, spaces visible; special ones set apart."""
    parts = [
        f'<span class="token{" special" if one["special"] else ""}{" chosen" if pos == chosen else ""}" '
        f'title="position {pos}, id {one["id"]}">{escape(shown(one["token"]))}<small>{one["id"]}</small></span>'
        for pos, one in enumerate(all_of_them)
    ]
    st.html(f"<div>{''.join(parts)}</div>")


def words(some: Sequence[str]) -> str:
    """Tokens on a line."""
    return "  ".join(shown(one) for one in some)


def lit(texts: Sequence[str], values: Sequence[float]) -> str:
    """Tokens, each as dark as its value is high (blue above zero, orange below)."""
    most = max((abs(one) for one in values), default=0.0) or 1.0
    parts = []
    for text, value in zip(texts, values, strict=True):
        colour = "42,111,187" if value >= 0 else "200,112,42"
        parts.append(
            f'<span style="background:rgba({colour},{0.6 * abs(value) / most:.2f})" title="{value:.3g}">{escape(text)}</span>'
        )
    return f'<div class="text">{"".join(parts)}</div>'


def marked(before: str, token: str, after: str) -> str:
    """A token in its text."""
    return f'<div class="text">{escape(before)}<mark>{escape(token)}</mark>{escape(after)}</div>'
