"""The one look of all screens, in light and dark."""

import streamlit as st

THEME = {
    "theme.light.primaryColor": "#2a6fbb", "theme.light.backgroundColor": "#ffffff",
    "theme.light.secondaryBackgroundColor": "#f4f6f9", "theme.light.textColor": "#20242c",
    "theme.dark.primaryColor": "#6fb0f2", "theme.dark.backgroundColor": "#14181f",
    "theme.dark.secondaryBackgroundColor": "#1d222b", "theme.dark.textColor": "#e8ebf0",
    "theme.baseRadius": "6px",
}  # fmt: skip
"""Streamlit's options, set when the app is started."""

_CSS = """
<style>
.block-container {padding-top: 2.6rem; padding-bottom: 3rem; max-width: 1500px}
h1 {font-size: 1.6rem !important; padding: .2rem 0 .4rem 0 !important}
.token {font-family: ui-monospace, monospace; font-size: .82rem; white-space: pre; padding: 1px 3px; margin: 1px; border-radius: 4px;
  border: 1px solid color-mix(in srgb, currentColor 22%, transparent); display: inline-block}
.token small {opacity: .55; font-size: .68rem; margin-left: 3px}
.token.special {font-style: italic; opacity: .65}
.token.chosen {outline: 2px solid var(--st-primary-color, #2a6fbb)}
.text {font-family: ui-monospace, monospace; font-size: .82rem; white-space: pre-wrap; line-height: 1.5}
</style>
"""


def apply() -> None:
    """Into every page."""
    st.html(_CSS)


def empty(text: str, icon: str = ":material/info:") -> None:
    """A state in which there is nothing to show: says what to do."""
    st.info(text, icon=icon)
