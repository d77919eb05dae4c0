"""The screens: a file each, imported when it is first shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import streamlit as st

from workbench.errors import WorkbenchError


@dataclass(frozen=True)
class Screen:
    """A page: its file's name is its path in the URL."""

    path: str
    title: str
    icon: str


SCREENS = (
    Screen("home", "Home", ":material/home:"),
    Screen("model_map", "Model map", ":material/account_tree:"),
    Screen("prompt_lab", "Prompt lab", ":material/science:"),
    Screen("neurons", "Neurons", ":material/hub:"),
    Screen("backward_lens", "Backward lens", ":material/undo:"),
    Screen("probes_and_erasure", "Probes and erasure", ":material/ink_eraser:"),
    Screen("transport", "Transport and linearity", ":material/conversion_path:"),
    Screen("jobs", "Jobs", ":material/pending_actions:"),
    Screen("report", "Report", ":material/article:"),
)


def draw(screen: Screen) -> Callable[[], None]:
    """What draws it. An error that a user can mend becomes a line on the page."""

    def run() -> None:
        try:
            import_module(f"app.screens.{screen.path}").draw()
        except WorkbenchError as error:
            st.error(str(error), icon=":material/error:")

    run.__name__ = screen.path
    return run


def page_link(path: str, label: str, *, key: str = "", **view: object) -> None:
    """A button that goes to another screen with some of the view changed.

    Args:
        key: Tells apart those of one label.
    """
    from app import url

    screen = next(one for one in SCREENS if one.path == path)
    if st.button(label, key=f"to-{path}-{label}{key}", icon=screen.icon, type="tertiary"):
        url.put(**view)
        st.switch_page(st.Page(draw(screen), title=screen.title, icon=screen.icon, url_path=path, default=path == "home"))
