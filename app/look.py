"""The one look of all screens, in light and dark."""

from pathlib import Path

import streamlit as st

THEME = {
    "theme.light.primaryColor": "#2a6fbb", "theme.light.backgroundColor": "#ffffff",
    "theme.light.secondaryBackgroundColor": "#f4f6f9", "theme.light.textColor": "#20242c",
    "theme.dark.primaryColor": "#6fb0f2", "theme.dark.backgroundColor": "#14181f",
    "theme.dark.secondaryBackgroundColor": "#1d222b", "theme.dark.textColor": "#e8ebf0",
    "theme.baseRadius": "6px",
}  # fmt: skip
"""Streamlit's options, set when the app is started."""


def apply() -> None:
    """Into every page."""
    st.html(Path(__file__).with_name("look.css"))


def empty(text: str, icon: str = ":material/info:") -> None:
    """A state in which there is nothing to show: says what to do."""
    st.info(text, icon=icon)
