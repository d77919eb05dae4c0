"""A server with a small map, and a real browser. Run by `pytest tests/browser -p no:xdist`: one server, one browser, one model.

A browser that is not there is a failure, never a skip. $WORKBENCH_SCREENSHOTS names where the pictures go, and
$WORKBENCH_BROWSER_RUNS a folder whose runs are shown, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.browsing import Server, is_foreign, launch
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

MAP = ("map-neurons", "--layers", "28:30", "--side", "all", "--no-plot", "--show", "0")
VIEW = {"width": 1440, "height": 1500}
Opener = Callable[..., Page]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a map of two layers."""
    folder = tmp_path_factory.mktemp("explorer") / "runs"
    if more := os.environ.get("WORKBENCH_BROWSER_RUNS"):
        shutil.copytree(more, folder)
    made = subprocess.run(
        [sys.executable, "-c", "from workbench.cli import main; main()", *MAP, "--out", str(folder / "demo")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="session")
def server(runs: Path) -> Iterator[Server]:
    with Server.explorer(runs.parent, runs) as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        try:
            started = launch(playwright)
        except FileNotFoundError as error:
            pytest.fail(str(error), pytrace=False)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Browser, server: Server) -> Iterator[Opener]:
    """Opens a screen in a browser of its own: nothing is shared with another but the server. Whatever is opened has to stay
    free of Streamlit's red boxes, and of requests to any other machine."""
    contexts: list[BrowserContext] = []
    foreign: list[str] = []

    def open_(path: str = "", view: dict[str, Any] | None = None, **options: Any) -> Page:
        context = browser.new_context(viewport=VIEW, accept_downloads=True, **options)
        context.set_default_timeout(60_000)
        context.on("request", lambda request: is_foreign(request.url) and foreign.append(request.url))
        contexts.append(context)
        page = context.new_page()
        page.goto(server.page(path, **(view or {})))
        page.get_by_role("heading", level=1).wait_for()
        return page

    yield open_
    broken = [page.url for context in contexts for page in context.pages if page.get_by_test_id("stException").count()]
    for context in contexts:
        context.close()
    assert not foreign
    assert not broken


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Where pictures of the screens go; printed at the end."""
    named = os.environ.get("WORKBENCH_SCREENSHOTS")
    folder = Path(named).expanduser() if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"\nScreenshots: {folder}")
