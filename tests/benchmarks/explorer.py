"""How long the explorer's users wait, in a real browser: a click, a search, a prompt, a first page; and what eight at once do.

    python tests/benchmarks/explorer.py [--tries 30 --load --minutes 2 --ways]

Prints one JSON object; times are milliseconds of the page's own clock, from the event to the paint. `--load`: eight browsers
click, ask and search at random, each with a word of its own that no other may see. `--ways`: the canvas beside plotly's heatmap
under an invisible scatter, each alone in a script.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import streamlit
from browsing import HEATMAP, Cells, Server, browser_file, free_port, launch, received, settle, timed, write
from command_line import LAYERS, NEURONS, write_map
from playwright.async_api import Page as AsyncPage
from playwright.async_api import async_playwright
from playwright.sync_api import Browser, Page, sync_playwright

MODEL_LAYERS = 30
TARGETS = {
    "cell click to panel": 300, "search to table": 300, "lens of a new prompt": 1000, "first paint": 2000,
    "bytes of a cell click": 2_000_000,
}  # fmt: skip
WORDS = [
    "red", "blue", "green", "dog", "cat", "house", "tree", "water", "fire", "stone", "bread", "milk", "king", "queen", "river",
    "road", "night", "day", "man", "child", "book", "door", "hand", "head", "heart", "food", "horse", "ship", "town", "wind",
]  # fmt: skip
"""A token each, with a space before it."""
MARKERS = ("Zarnok", "Quibex", "Vloren", "Dwimmat", "Hexapor", "Jurvane", "Kestodi", "Umbralis")
"""No model says these by itself."""
ROWS, COLUMNS = 31, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=30)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--ways", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as made, sync_playwright() as started:
        folder = Path(made)
        (folder / "runs").mkdir()
        write_large_map(folder / "runs" / "large")
        program, browser = browser_file(started), launch(started)
        named = browser.version
        if chosen.ways:
            table = ways(browser, folder, chosen.tries)
        elif chosen.load:
            table = []
        else:
            table = waits(browser, folder, chosen.tries)
        browser.close()
    if chosen.load:
        table = asyncio.run(load(str(program), chosen.minutes))
    settings = vars(chosen) | {
        "browser": named, "streamlit": streamlit.__version__, "playwright": version("playwright"), "cores": os.cpu_count(),
        "neurons": LAYERS * NEURONS,
    }  # fmt: skip
    print(json.dumps({"benchmark": "explorer", "settings": settings, "table": table}, indent=2))


def write_large_map(folder: Path) -> None:
    """A generated map of 458,752 neurons, which the explorer finds as a run."""
    write_map(folder)


def row(name: str, found: list[float], **more: Any) -> dict[str, Any]:
    """A line of the table: the median and the 95th percentile of all tries."""
    return {
        "what": name, "tries": len(found), "p50": round(statistics.median(found)),
        "p95": round(statistics.quantiles(found, n=20, method="inclusive")[18]) if len(found) > 1 else round(found[0]),
        "target": TARGETS.get(name),
    } | more  # fmt: skip


# ---- what one user waits for


def waits(browser: Browser, folder: Path, tries: int) -> list[dict[str, Any]]:
    with (
        Server.explorer(folder, folder / "runs") as server,
        opened(browser, server.page("prompt_lab", prompt=prompt(0))) as page,
    ):
        counts = received(page)
        page.reload()  # so that its websocket is counted
        clicks, frames = cell_clicks(page, tries, counts)
        prompts = new_prompts(page, tries)
        page.goto(server.page("neurons"))
        searches, own = map_searches(page, tries)
    paints, starts = first_paints(browser, folder, tries)
    return [
        row("cell click to panel", clicks),
        row("search to table", searches, of_which_the_search=row("", own)["p50"]),
        row("lens of a new prompt", prompts, tokens=COLUMNS),
        row("first paint", paints),
        row("first paint, from the start of the process", starts),
        row("bytes of a cell click", frames),
    ]


def cell_clicks(page: Page, tries: int, counts: Any) -> tuple[list[float], list[float]]:
    """Milliseconds from a click on a cell to the panel of that cell, and bytes that came for it."""
    cells = Cells(page)
    page.locator(".st-key-card-cell").wait_for()
    settle(page)
    chance, times, frames = random.Random(0), [], []
    for turn in range(tries + 1):
        line, column = chance.randrange(1, cells.lines - 1), (turn * 7) % cells.columns
        wanted = f"Layer {MODEL_LAYERS - 1 - line}, position {column} "
        before = counts["bytes"]
        until = "({ wanted }) => document.querySelector('.st-key-card-cell')?.textContent.includes(wanted)"
        took = timed(page, lambda: cells.click(line, column), "click", until, wanted=wanted)  # noqa: B023
        settle(page)
        page.wait_for_timeout(150)
        if turn:  # the first is the warm-up
            times.append(took)
            frames.append(counts["bytes"] - before)
    return times, frames


def new_prompts(page: Page, tries: int) -> list[float]:
    """Milliseconds from Ctrl-Enter to the new heatmap: a canvas with the prompt's own first word."""
    field, times = page.get_by_label("Prompt", exact=True), []
    cells = Cells(page)
    until = """({ wanted, selector, x, y }) => {
      // The tokens above it come first: a tooltip at every frame of the wait would take the worker's core.
      const token = document.querySelectorAll(".st-key-card-lens .token")[1];
      const canvas = document.querySelector(selector);
      if (!canvas || !token || !token.textContent.startsWith(wanted)) return false;
      const box = canvas.getBoundingClientRect();
      canvas.dispatchEvent(new MouseEvent("mousemove", { clientX: box.left + x, clientY: box.top + y }));
      return canvas.parentElement.parentElement.lastElementChild.textContent.split("\\n")[0].endsWith(wanted);
    }"""
    for turn in range(tries + 1):
        text = prompt(turn + 1)
        place = cells.place(cells.lines // 2, 1)
        wanted = f"·{text.split()[1]}"
        given = {"wanted": wanted, "selector": HEATMAP.format(name="lens"), **place}
        took = timed(page, lambda: write(page, field, text), "keydown", until, **given)  # noqa: B023
        settle(page)
        if turn:
            times.append(took)
    assert Cells(page).columns == COLUMNS
    return times


def map_searches(page: Page, tries: int) -> tuple[list[float], list[float]]:
    """Milliseconds from Enter to the table of a word that nobody asked for before, and of the search itself."""
    field, times, own = page.get_by_label("Word", exact=True), [], []
    until = """({ wanted }) => {
      const card = document.querySelector(".st-key-card-find");
      const still = document.querySelector('[data-testid="stApp"]').dataset.testScriptState === "notRunning";
      return still && card && card.textContent.includes(wanted) && card.querySelector('[data-testid="stDataFrame"] canvas');
    }"""
    for turn in range(tries + 1):
        word = f"word{40 + 13 * turn}"
        field.fill(word)
        took = timed(page, lambda: field.press("Enter"), "keydown", until, wanted=f"hits for {word}")
        settle(page)
        said = page.locator(".st-key-card-find").get_by_text(re.compile(r"shown · \d+ ms")).inner_text()
        if turn:
            times.append(took)
            own.append(float(said.split("·")[1].split()[0]))
    return times, own


def first_paints(browser: Browser, folder: Path, tries: int) -> tuple[list[float], list[float]]:
    """Milliseconds to the first title on the page of a fresh server: from the navigation, and from the start of the process."""
    script = """new MutationObserver((_, observer) => {
      if (!document.querySelector("h1")) return;
      observer.disconnect();
      requestAnimationFrame(() => { window.painted = performance.now(); });
    }).observe(document, { subtree: true, childList: true });"""
    paints, starts = [], []
    for _ in range(tries):
        with Server.explorer(folder, folder / "runs") as server:
            context = browser.new_context()
            context.add_init_script(script)
            page = context.new_page()
            page.goto(server.url)
            page.wait_for_function("() => window.painted")
            painted, origin = page.evaluate("() => [window.painted, performance.timeOrigin]")
            paints.append(painted)
            starts.append(origin + painted - server.started * 1000)
            context.close()
    return paints, starts


def prompt(number: int) -> str:
    """20 tokens, unlike those of other numbers from the second word on."""
    chance = random.Random(number)
    first = WORDS[number % len(WORDS)]
    return " ".join(["The", first, *chance.sample([one for one in WORDS if one != first], COLUMNS - 2)])


@contextmanager
def opened(browser: Browser, address: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1440, "height": 1200})
    page = context.new_page()
    page.goto(address)
    page.get_by_role("heading", level=1).wait_for()
    yield page
    context.close()


# ---- eight at once


async def load(program: str, minutes: float) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "runs").mkdir()
        write_large_map(folder / "runs" / "large")
        with Server.explorer(folder, folder / "runs") as server:
            async with async_playwright() as started:
                browser = await started.chromium.launch(executable_path=program, args=["--no-sandbox"])
                users = [await User.arrived(browser, server, marker) for marker in MARKERS]
                memory = [resident(server, 0)]
                until = time.monotonic() + minutes * 60
                work = [asyncio.create_task(user.work(until)) for user in users]
                for part in range(1, 5):
                    await asyncio.sleep(minutes * 15)
                    memory.append(resident(server, minutes * part / 4))
                await asyncio.gather(*work)
                await browser.close()
    done = [one for user in users for one in user.times]
    kinds = {kind: [took for one, took in done if one == kind] for kind in ("cell", "prompt", "search")}
    summary = {
        "what": "eight browsers", "minutes": minutes, "actions": len(done),
        "errors": [one for user in users for one in user.errors],
        "seen of another": [one for user in users for one in user.foreign],
    }  # fmt: skip
    return [summary, *(row(f"{kind}, eight at once", some) for kind, some in kinds.items() if some), *memory]


class User:
    """One of eight: its prompts have its own word, and no other's may ever be on its page."""

    def __init__(self, page: AsyncPage, server: Server, marker: str):
        self.page, self.server, self.marker = page, server, marker
        self.chance = random.Random(marker)
        self.times: list[tuple[str, float]] = []
        self.errors: list[str] = []
        self.foreign: list[str] = []

    @classmethod
    async def arrived(cls, browser: Any, server: Server, marker: str) -> User:
        context = await browser.new_context(viewport={"width": 1440, "height": 1200})
        context.set_default_timeout(60_000)
        user = cls(await context.new_page(), server, marker)
        await user.lab()
        return user

    async def work(self, until: float) -> None:
        actions: dict[str, Callable[[], Any]] = {"cell": self.cell, "prompt": self.ask, "search": self.search}
        while time.monotonic() < until:
            kind = self.chance.choices(list(actions), [6, 2, 1])[0]
            try:
                self.times.append((kind, await actions[kind]()))
                await self.look()
            except Exception as error:
                self.errors.append(f"{self.marker}, {kind}: {str(error)[:300]}")
                await self.lab()
            await asyncio.sleep(self.chance.uniform(0.2, 1.0))

    async def lab(self) -> None:
        await self.page.goto(self.server.page("prompt_lab", prompt=f"{self.marker} was here"))
        await self.page.locator(".st-key-card-cell").wait_for()

    async def cell(self) -> float:
        canvas = self.page.locator(HEATMAP.format(name="lens")).first
        await canvas.focus()
        panel = self.page.locator(".st-key-card-cell")
        before = await panel.inner_text()
        started = time.perf_counter()
        for _ in range(12):
            await canvas.press(self.chance.choice(("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight")))
            changed = "([old]) => document.querySelector('.st-key-card-cell')?.innerText.split('\\n')[0] !== old"
            try:
                await self.page.wait_for_function(changed, arg=[before.split("\n")[0]], timeout=3000)
                break
            except Exception:  # it was at the edge
                started = time.perf_counter()
        return (time.perf_counter() - started) * 1000

    async def ask(self) -> float:
        text = " ".join([self.marker, *self.chance.sample(WORDS, 6)])
        field = self.page.get_by_label("Prompt", exact=True)
        await field.fill(text)
        started = time.perf_counter()
        await field.press("Control+Enter")
        last = self.page.locator(".st-key-card-lens .token").last
        await last.get_by_text(f"·{text.split()[-1]}").wait_for()
        return (time.perf_counter() - started) * 1000

    async def search(self) -> float:
        await self.page.get_by_test_id("stSidebarNav").get_by_role("link", name="Neurons").click()
        word = f"word{self.chance.randrange(60_000)}"
        field = self.page.get_by_label("Word", exact=True)
        await field.fill(word)
        started = time.perf_counter()
        await field.press("Enter")
        card = self.page.locator(".st-key-card-find").get_by_text(re.compile(f"hits for {word}"))
        nothing = self.page.get_by_test_id("stAlert").get_by_text(re.compile(word))
        await card.or_(nothing).first.wait_for()
        took = (time.perf_counter() - started) * 1000
        await self.page.get_by_test_id("stSidebarNav").get_by_role("link", name="Prompt lab").click()
        await self.page.locator(".st-key-card-cell").wait_for()
        return took

    async def look(self) -> None:
        """What is wrong on its page: errors, and what belongs to another."""
        text = await self.page.locator("body").inner_text()
        fields = [await one.input_value() for one in await self.page.locator("textarea").all()]
        seen = f"{text} {' '.join(fields)} {self.page.url}"
        self.foreign += [f"{self.marker} sees {other}" for other in MARKERS if other != self.marker and other in seen]
        if self.marker not in seen:
            self.errors.append(f"{self.marker} does not see its own prompt")
        if await self.page.locator('[data-testid="stException"], [data-testid="stAlertContentError"]').count():
            self.errors.append(f"{self.marker}: {text[:300]}")


def resident(server: Server, minutes: float) -> dict[str, Any]:
    """Megabytes of the page's process and of the worker's."""
    worker = server.worker()
    return {
        "what": f"resident set after {minutes:g} minutes, MB",
        "server": round(psutil.Process(server.process.pid).memory_info().rss / 1e6),
        "worker": None if worker is None else round(worker.memory_info().rss / 1e6),
    }


# ---- two ways to a heatmap that can be clicked

_PICTURE = f"""
import random, streamlit as st
chance = random.Random(0)
z = [[chance.random() for _ in range({COLUMNS})] for _ in range({ROWS})]
words = [[chance.choice("the of and dog cat".split()) for _ in range({COLUMNS})] for _ in range({ROWS})]
st.session_state.setdefault("cell", None)
"""
_CANVAS = (
    _PICTURE
    + f"""
from app.heatmap import heatmap
trace = {{"type": "heatmap", "z": z, "text": words, "x": list(range({COLUMNS})), "y": list(range({ROWS}))}}
heatmap({{"data": [trace], "layout": {{}}}}, key="way", selected=st.session_state.cell, name="way",
        on_select=lambda r, c: st.session_state.update(cell=(r, c)))
st.write(f"chosen {{st.session_state.cell}}.")
"""
)
_SCATTER = (
    _PICTURE
    + f"""
import plotly.graph_objects as go
figure = go.Figure([
    go.Heatmap(z=z, text=words, texttemplate="%{{text}}", hoverinfo="skip"),
    go.Scatter(x=[c for r in range({ROWS}) for c in range({COLUMNS})], y=[r for r in range({ROWS}) for c in range({COLUMNS})],
               mode="markers", marker={{"size": 16, "symbol": "square", "opacity": 0}}),
])
figure.update_layout(height=720, dragmode=False)
found = st.plotly_chart(figure, key="way", on_select="rerun", selection_mode="points")
points = found["selection"]["points"]
st.write(f"chosen {{(points[0]['y'], points[0]['x']) if points else None}}.")
"""
)
_AXES = """([line, column]) => {
  const plot = document.querySelector(".js-plotly-plot"), box = plot.getBoundingClientRect();
  const { xaxis, yaxis } = plot._fullLayout;
  return [box.left + xaxis._offset + xaxis.d2p(column), box.top + yaxis._offset + yaxis.d2p(line)];
}"""


def ways(browser: Browser, folder: Path, tries: int) -> list[dict[str, Any]]:
    table = []
    for name, script in {"canvas": _CANVAS, "plotly, invisible scatter": _SCATTER}.items():
        file, port = folder / f"{len(table)}.py", free_port()
        file.write_text(script, encoding="utf-8")
        options = ["--server.headless=true", "--server.fileWatcherType=none", "--browser.gatherUsageStats=false",
                   "--server.address=127.0.0.1", f"--server.port={port}"]  # fmt: skip
        with Server(folder, ["-m", "streamlit", "run", str(file), *options], port) as server:
            context = browser.new_context(viewport={"width": 1440, "height": 1200})
            page = context.new_page()
            counts = received(page)
            page.goto(server.url)
            page.get_by_text("chosen None.").wait_for()
            times, frames = way(page, name == "canvas", tries, counts)
            context.close()
        table.append(row(f"{name}: click to text", times, bytes=round(statistics.median(frames))))
    return table


def way(page: Page, canvas: bool, tries: int, counts: Any) -> tuple[list[float], list[float]]:
    if canvas:
        cells = Cells(page, "way")
    else:
        page.locator(".js-plotly-plot .scatterlayer .points path").first.wait_for(state="attached")
    settle(page)
    page.wait_for_timeout(1000)
    times, frames = [], []
    for turn in range(tries + 1):
        line, column = (turn * 11) % (ROWS - 2) + 1, (turn * 7) % COLUMNS
        if canvas:
            spot = cells.place(ROWS - 1 - line, column)  # pyright: ignore[reportPossiblyUnboundVariable]
            box = cells.canvas.bounding_box()  # pyright: ignore[reportPossiblyUnboundVariable]
            assert box is not None
            x, y = box["x"] + spot["x"], box["y"] + spot["y"]
        else:
            x, y = page.evaluate(_AXES, [line, column])
        page.mouse.move(x, y)
        page.wait_for_timeout(250)  # plotly knows what is hovered only after a while
        before = counts["bytes"]
        until = "({ wanted }) => document.body.textContent.includes(wanted)"
        event = "click" if canvas else "mouseup"
        times.append(timed(page, lambda: page.mouse.click(x, y), event, until, wanted=f"chosen ({line}, {column})."))  # noqa: B023
        settle(page)
        page.wait_for_timeout(150)
        frames.append(counts["bytes"] - before)
    return times[1:], frames[1:]


if __name__ == "__main__":
    sys.exit(main())
