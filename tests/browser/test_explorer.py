"""What a user does in the explorer, in a real browser, with the embedded model; and what must not break it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from benchmarks.browsing import Cells, Server, is_foreign, received, settle, write
from playwright.sync_api import Browser, Locator, Page, expect

from app.screens import SCREENS

LONG = 90_000
"""Milliseconds that an answer of the model may take on a busy machine."""
LAB = {"prompt": "The capital of France is"}


def card(page: Page, key: str) -> Locator:
    """A card whose answer is there: its last line says what it is of."""
    found = page.locator(f".st-key-card-{key}")
    expect(found.get_by_text("mi-workbench 0").first).to_be_visible(timeout=LONG)
    return found


def cell_card(page: Page, layer: object, pos: int) -> Locator:
    """The panel of the chosen cell."""
    found = page.locator(".st-key-card-cell")
    expect(found).to_contain_text(f"Layer {layer}, position {pos}", timeout=LONG)
    return found


def go(page: Page, title: str) -> None:
    """To another screen, by the sidebar."""
    page.get_by_test_id("stSidebarNav").get_by_role("link", name=title, exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(title)
    settle(page)


def test_a_word_leads_to_its_neuron_and_what_it_does(opened):
    page = opened()
    go(page, "Neurons")
    word = page.get_by_label("Word", exact=True)
    word.fill("dog")
    word.press("Enter")
    hits = card(page, "find")
    expect(hits).to_contain_text(re.compile(r"\d+ hits for dog"))
    hits.get_by_test_id("stDataFrame").click(position={"x": 14, "y": 52})  # the box of the first row: a table is a canvas
    expect(page).to_have_url(re.compile(r"neuron=29\.808"), timeout=LONG)
    words = card(page, "neuron")
    expect(words).to_contain_text("Neuron 29.808: its words")
    expect(words).to_contain_text(re.compile("best ·?dog", re.IGNORECASE))
    card(page, "clamp")
    page.get_by_label("Prompt", exact=True).fill("Every morning I walk my")
    page.get_by_label("Prompt", exact=True).press("Enter")
    expect(page).to_have_url(re.compile("start=Every"))
    clamped = card(page, "clamp")
    expect(clamped.get_by_test_id("stCode").first).to_contain_text("Every morning I walk my", timeout=LONG)
    expect(clamped).to_contain_text("As it is:")
    expect(clamped).to_contain_text("Clamped:")
    expect(clamped).to_contain_text(re.compile(r"nats a word; random neurons .+ to .+ \(p \d"))


def test_a_cell_is_chosen_by_click_and_keys(opened):
    page = opened()
    counts = received(page)
    page.goto(page.url + "prompt_lab")
    cells = Cells(page)
    assert (cells.lines, cells.columns) == (31, 5)
    cell_card(page, 29, 4)
    settle(page)
    page.wait_for_timeout(2500)  # the lamp has ended its looking
    sent = counts["sent"]
    assert cells.hover(8, 1).startswith("layer 21  ·capital\n")
    assert cells.hover(9, 3).startswith("layer 20  ·France\n")
    assert counts["sent"] == sent, "hovering asked the server"
    cells.click(8, 1)
    cell_card(page, 21, 1)
    expect(cells.canvas).to_be_focused()  # it is the same canvas, not one that was drawn anew
    expect(page).to_have_url(re.compile(r"layer=21.*pos=1|pos=1.*layer=21"))
    expect(page.locator(".token.chosen")).to_contain_text("capital")
    cells.canvas.press("ArrowUp")
    cell_card(page, 22, 1)
    cells.canvas.press("ArrowRight")
    cell_card(page, 22, 2)
    expect(page).to_have_url(re.compile(r"layer=22.*pos=2|pos=2.*layer=22"))
    expect(page.locator(".token.chosen")).to_contain_text("of")
    cells.canvas.press("ArrowLeft")
    cells.canvas.press("ArrowDown")
    cell_card(page, 21, 1)


def test_a_link_opens_the_same_view_elsewhere(opened):
    page = opened("prompt_lab", {"prompt": "Dogs and cats are", "measure": "entropy_nats"})
    cells = Cells(page)
    cells.click(5, 2)
    own = cell_card(page, 24, 2)
    expect(page).to_have_url(re.compile("layer=24"))
    settle(page)
    other = opened(f"prompt_lab?{page.url.partition('?')[2]}")
    there = cell_card(other, 24, 2)
    settle(other)
    assert other.url == page.url
    assert there.inner_text() == own.inner_text()
    expect(other.get_by_label("Prompt", exact=True)).to_have_value("Dogs and cats are")
    expect(other.locator(".st-key-card-lines")).to_contain_text("entropy")
    Cells(other).click(1, 0)
    cell_card(other, 28, 0)
    other.go_back()
    cell_card(other, 24, 2)


def test_a_layer_stays_chosen_on_other_screens(opened):
    page = opened("prompt_lab", LAB | {"layer": 12, "pos": 3})
    cell_card(page, 12, 3)
    go(page, "Backward lens")
    expect(page.locator(".st-key-card-cell")).to_contain_text("W_out of layer 12, position 3", timeout=LONG)
    expect(page).to_have_url(re.compile("layer=12"))
    go(page, "Prompt lab")
    cell_card(page, 12, 3)


def test_a_report_works_offline(opened, browser: Browser, tmp_path: Path):
    page = opened("prompt_lab", LAB)
    cell_card(page, 29, 4)
    settle(page)
    title = "What each layer predicts: logit lens"
    card(page, "lens").get_by_role("button", name="more_horiz").click()
    page.get_by_role("button", name="Add to report").first.click()
    expect(page).to_have_url(re.compile("cards="))
    page.keyboard.press("Escape")
    go(page, "Report")
    page.get_by_placeholder("What does it show?").fill("Paris, at last. </script><b>")
    page.get_by_placeholder("What does it show?").press("Control+Enter")
    settle(page)
    html = _downloaded(page, "One HTML file", tmp_path)
    text = html.read_text(encoding="utf-8")
    assert f"<h2>{title}</h2>" in text
    assert "Paris, at last. &lt;/script&gt;" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)\s*=", text[:3000] + text[-20_000:])
    notebook = json.loads(_downloaded(page, "Notebook", tmp_path).read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert any("wb.lens" in "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")

    context = browser.new_context(offline=True)
    asked: list[str] = []
    faults: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    context.on("requestfailed", lambda request: faults.append(request.url))
    offline = context.new_page()
    offline.on("pageerror", lambda error: faults.append(str(error)))
    offline.goto(html.as_uri())
    expect(offline.locator(".js-plotly-plot .main-svg").first).to_be_visible()
    expect(offline.locator("h2")).to_have_text(title)
    context.close()
    assert not [url for url in asked if is_foreign(url) or url.startswith("http")]
    assert not faults


def test_an_empty_prompt_asks_for_words(opened):
    page = opened("prompt_lab", LAB)
    cell_card(page, 29, 4)
    write(page, page.get_by_label("Prompt", exact=True), "   ")
    expect(page.get_by_test_id("stAlert")).to_contain_text("The prompt is empty")
    expect(page.locator(".st-key-card-cell")).to_have_count(0)
    write(page, page.get_by_label("Prompt", exact=True), "It goes on")
    cell_card(page, 29, 2)


def test_a_prompt_of_10000_tokens_is_refused_with_its_length(opened):
    prompt = "dog " * 10_000
    page = opened("prompt_lab", LAB)
    cell_card(page, 29, 4)
    write(page, page.get_by_label("Prompt", exact=True), prompt)
    expect(page.get_by_test_id("stAlert")).to_contain_text(re.compile(r"has 10,?00\d tokens"), timeout=LONG)
    expect(page.locator(".st-key-card-cell")).to_have_count(0)
    assert re.search(r"prompt=(~|%7E)[0-9a-f]{16}", page.url), "a long text is named by its hash"
    again = opened(f"prompt_lab?{page.url.partition('?')[2]}")
    expect(again.get_by_test_id("stAlert")).to_contain_text(re.compile(r"has 10,?00\d tokens"), timeout=LONG)
    wanted = "field => field.value === 'dog '.repeat(10000)"
    again.wait_for_function(wanted, arg=again.get_by_label("Prompt", exact=True).element_handle())
    write(again, again.get_by_label("Prompt", exact=True), "It goes on")
    cell_card(again, 29, 2)


def test_emoji_and_letters_from_right_to_left_are_a_prompt(opened):
    prompt = "👩🏽‍🚀 🇫🇷 <b>שלום</b> עולם، مرحبا"
    page = opened("prompt_lab", LAB)
    cell_card(page, 29, 4)
    write(page, page.get_by_label("Prompt", exact=True), prompt)
    expect(page.locator(".token").nth(20)).to_be_visible(timeout=LONG)
    assert page.locator(".token b").count() == 0, "a prompt became HTML"
    own = Cells(page)
    own.click(3, own.columns - 2)
    cell_card(page, 26, own.columns - 2)
    settle(page)
    again = opened(f"prompt_lab?{page.url.partition('?')[2]}")
    cell_card(again, 26, own.columns - 2)
    expect(again.get_by_label("Prompt", exact=True)).to_have_value(prompt)


def test_a_damaged_run_is_named(opened, runs: Path):
    broken = runs / "broken"
    broken.mkdir()
    (broken / "run.json").write_bytes(b'{"kind": "neuron map", \xff\x00 garbage')
    page = opened("", {"run": "broken"})
    expect(page.get_by_test_id("stMain")).to_contain_text("broken is damaged")
    go(page, "Neurons")
    expect(page.get_by_label("Word", exact=True)).to_be_visible()


def test_an_unknown_model_is_named(opened):
    page = opened("prompt_lab", {"model": "no/such"})
    expect(page.get_by_test_id("stAlert").first).to_contain_text("no/such", timeout=LONG)
    model = page.get_by_test_id("stSidebar").get_by_label("Model", exact=False).first
    expect(model).to_be_visible()
    again = opened("prompt_lab", LAB)
    cell_card(again, 29, 4)


def test_a_killed_worker_is_said_and_mended(opened, server: Server):
    page = opened("prompt_lab", LAB)
    cell_card(page, 29, 4)
    settle(page)
    worker = server.worker()
    assert worker is not None
    worker.send_signal(signal.SIGSTOP)  # so that the question is at work for sure
    write(page, page.get_by_label("Prompt", exact=True), "Where were we when it died")
    expect(page.get_by_role("button", name="Cancel")).to_be_visible(timeout=LONG)
    worker.kill()
    expect(page.get_by_test_id("stAlert").first).to_contain_text("was ended by signal 9")
    page.get_by_role("button", name="Ask again").first.click()
    Cells(page)
    expect(page.locator(".token").first).to_contain_text("Where", timeout=LONG)
    expect(page.get_by_text("was ended by signal 9")).to_have_count(0)


def test_two_tabs_cancel_one_job(opened):
    one = opened("jobs")
    one.get_by_role("textbox", name="Name of the run").fill("cancelled")
    one.get_by_test_id("stBaseButton-primaryFormSubmit").click()
    expect(one.get_by_text("map-neurons · running")).to_be_visible(timeout=LONG)
    two = opened("jobs")
    buttons = [page.get_by_role("button", name="Cancel") for page in (one, two)]
    for button in buttons:
        expect(button).to_be_visible()
    for button in buttons:
        button.click()
    for page in (one, two):
        expect(page.get_by_text("map-neurons · cancelled")).to_be_visible(timeout=LONG)
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    expect(two.get_by_test_id("stToast")).to_contain_text("another tab has cancelled it")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_screen_is_drawn(opened, screenshots: Path, scheme: str):
    view = {"layer": 21, "pos": 4, "q": "dog", "neuron": "29.808", "map": "demo"}
    page = opened("", view, color_scheme=scheme)
    ground = page.get_by_test_id("stApp").evaluate("element => getComputedStyle(element).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 31)"}[scheme]
    for screen in SCREENS:
        go(page, screen.title)
        settle(page)
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0, timeout=LONG)
        page.wait_for_timeout(700)  # pictures grow into their places
        page.screenshot(path=screenshots / f"{screen.path}-{scheme}.png")


def _downloaded(page: Page, button: str, folder: Path) -> Path:
    with page.expect_download() as found:
        page.get_by_role("button", name=button).click()
    file = folder / found.value.suggested_filename
    found.value.save_as(file)
    return file
