"""The explorer as its users have it: a server in a process of its own, a real browser, and what is done and timed in its page.

Shared by `tests/browser` and `explorer.py`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlparse

import psutil
from playwright.sync_api import Browser, Locator, Page, Playwright, expect

from workbench.home import home

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
"""No sandbox, as in a container there is none; and no name is ever looked up."""
HEATMAP = 'canvas[role="grid"][aria-label^="{name}:"]'
EXPLORER = ("-c", "from workbench.cli import main; main()", "app", "--no-browser")


class Server:
    """A Streamlit server in a process of its own, with a home of its own in which the user's models are."""

    def __init__(self, folder: Path, arguments: Sequence[str], port: int):
        own = folder / "home"
        own.mkdir(parents=True, exist_ok=True)
        if not (own / "models").exists():
            (own / "models").symlink_to(home() / "models")
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        self.started = time.time()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"WORKBENCH_HOME": str(own), "WORKBENCH_RUNS": str(own / "runs")},
            )  # fmt: skip

    @classmethod
    def explorer(cls, folder: Path, runs: Path) -> Server:
        """The explorer of a runs folder; `folder` is for its log and its own files."""
        port = free_port()
        return cls(folder, [*EXPLORER, f"--port={port}", f"--runs={runs}"], port)

    def __enter__(self) -> Server:
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self, seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/_stcore/health", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.01)
        raise RuntimeError(f"The server did not start. Its log:\n{self.log.read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        """End it and all that it started."""
        try:
            own = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            own = []
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for child in own:
            if child.is_running():
                child.kill()

    def worker(self) -> psutil.Process | None:
        """The process that holds the model."""
        for child in psutil.Process(self.process.pid).children():
            if "app.worker_process" in child.cmdline():
                return child
        return None

    def page(self, path: str = "", **view: object) -> str:
        """The link of a screen."""
        return f"{self.url}/{path}{'?' if view else ''}{urlencode(view)}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def browser_file(playwright: Playwright) -> str | None:
    """The program of a Chromium: the system's, or the one that playwright has fetched."""
    own = playwright.chromium.executable_path
    return next((found for name in BROWSERS if (found := shutil.which(name))), own if Path(own).is_file() else None)


def launch(playwright: Playwright) -> Browser:
    """
    Raises:
        FileNotFoundError: if there is no browser on this machine.
    """
    if (program := browser_file(playwright)) is None:
        raise FileNotFoundError(
            "No Chromium is on this machine. Install one: apt-get install chromium, or python -m playwright install chromium."
        )
    return playwright.chromium.launch(executable_path=program, args=list(FLAGS))


def is_foreign(address: str) -> bool:
    """Whether a request leaves this machine."""
    there = urlparse(address)
    return there.scheme not in ("data", "blob", "about", "file") and there.hostname != "127.0.0.1"


def settle(page: Page) -> None:
    """Until the script has run, and all that it sent is drawn."""
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for(timeout=60_000)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def write(page: Page, field: Locator, text: str) -> None:
    """Fill a text area, and send it."""
    field.fill(text)
    field.press("Control+Enter")


class Cells:
    """The cells of a heatmap, lines counted from the top: a canvas tells where they lie by its tooltip alone."""

    def __init__(self, page: Page, name: str = "lens"):
        self.page, self.canvas = page, page.locator(HEATMAP.format(name=name))
        self.canvas.wait_for(timeout=90_000)
        self.left, self.top, self.width, self.height, self.lines, self.columns = self.canvas.evaluate(_GEOMETRY)

    def place(self, line: int, column: int) -> dict[str, float]:
        """The middle of a cell, from the canvas's corner."""
        return {"x": self.left + (column + 0.5) * self.width, "y": self.top + (line + 0.5) * self.height}

    def click(self, line: int, column: int) -> None:
        self.canvas.click(position=self.place(line, column))  # pyright: ignore[reportArgumentType]

    def hover(self, line: int, column: int) -> str:
        """What the tooltip then says."""
        self.canvas.hover(position=self.place(line, column))  # pyright: ignore[reportArgumentType]
        tip = self.canvas.locator("xpath=../../div[last()]")
        expect(tip).to_be_visible()
        return tip.text_content() or ""


_GEOMETRY = """canvas => {
  const box = canvas.getBoundingClientRect();
  const tip = canvas.parentElement.parentElement.lastElementChild;
  const over = (x, y) => {
    canvas.dispatchEvent(new MouseEvent("mousemove", { clientX: box.left + x, clientY: box.top + y }));
    return tip.style.display === "block";
  };
  const edge = (inside, outside, test) => {
    while (Math.abs(inside - outside) > 0.25) {
      const middle = (inside + outside) / 2;
      if (test(middle)) inside = middle; else outside = middle;
    }
    return inside;
  };
  let at = null;
  for (let y = 3; y < box.height && !at; y += 6) for (let x = 3; x < box.width && !at; x += 6) if (over(x, y)) at = [x, y];
  const [x, y] = at;
  const left = edge(x, 0, one => over(one, y)), right = edge(x, box.width, one => over(one, y));
  const top = edge(y, 0, one => over(x, one)), bottom = edge(y, box.height, one => over(x, one));
  canvas.dispatchEvent(new MouseEvent("mouseleave"));
  const [rows, columns] = canvas.getAttribute("aria-label").match(/: (\\d+) rows, (\\d+) columns/).slice(1).map(Number);
  return [left, top, (right - left) / columns, (bottom - top) / rows, rows, columns];
}"""


def timed(page: Page, act: Callable[[], object], event: str, until: str, limit: float = 30.0, **given: Any) -> float:
    """Milliseconds, by the page's own clock, from the user's event until the page shows what was asked for, painted.

    Args:
        event: The event's type: "click", or "keydown", of which Enter alone counts.
        until: A function of JavaScript that says whether it is there, of `given`. Asked at every frame.
    """
    page.evaluate(_ARM.replace("UNTIL", until), {"event": event, "given": given})
    act()
    page.wait_for_function("() => window.measured !== null", timeout=limit * 1000)
    return page.evaluate("() => window.measured")


_ARM = """({ event, given }) => {
  window.measured = null;
  const there = UNTIL;
  const begin = (one) => {
    if (one.type === "keydown" && one.key !== "Enter") return;
    window.removeEventListener(event, begin, true);
    const started = performance.now();
    const look = () => {
      if (!there(given)) requestAnimationFrame(look);
      else requestAnimationFrame(() => { window.measured = performance.now() - started; });
    };
    requestAnimationFrame(look);
  };
  window.addEventListener(event, begin, true);
}"""


def received(page: Page) -> Mapping[str, int]:
    """Counts from now on what the page's websockets bring and send: `bytes`, `frames`, `sent`."""
    counts = {"bytes": 0, "frames": 0, "sent": 0}

    def came(frame: str | bytes) -> None:
        counts["bytes"] += len(frame)
        counts["frames"] += 1

    def went(_: str | bytes) -> None:
        counts["sent"] += 1

    def opened(socket: Any) -> None:
        socket.on("framereceived", came)
        socket.on("framesent", went)

    page.on("websocket", opened)
    return counts
