"""A report as a file: every card in it, nothing of a text read as a page or a program, and code that runs."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest

from app import card, tasks
from app.lines import Question
from app.report_files import ROWS, html_report, notebook_report

EVIL = "<script>alert(1)</script><!-- <script> & \"q\" 'q' ä"


@pytest.fixture(scope="module")
def cards(tiny_folder):
    model = {"name": str(tiny_folder), "dtype": None, "device": None}
    asked = {
        "aaaaaaaaaaaa": ("A heatmap of <b>layers</b>", "lens", {"model": model, "prompt": EVIL, "lens": "logit", "k": 2}),
        "bbbbbbbbbbbb": ("A continuation", "generate", {"model": model, "prompt": EVIL, "max_new_tokens": 2}),
        "cccccccccccc": ("Lengths", "norms", {"model": model, "prompt": "a dog"}),
    }
    return {
        name: card.put_aside(title, Question(task, own), json.loads(json.dumps(tasks.TASKS[task](**own))))
        for name, (title, task, own) in asked.items()
    }


class Read(HTMLParser):
    """A page as a browser takes it: its tags, its texts, and its scripts apart."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.scripts, self.inside = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        (self.scripts if "script" in self.inside else self.texts).append(data)


def test_a_page_has_every_card_and_its_note(cards):
    read = Read(html_report("What <it> does", cards, {"bbbbbbbbbbbb": "See & wonder"}).decode())
    text = "".join(read.texts)
    assert "What <it> does" in text
    for one in cards.values():
        assert one["title"] in text
        assert Question(one["task"], one["arguments"]).python() in text
        assert Question(one["task"], one["arguments"]).cli() in text
        assert card.provenance(one["answer"]["settings"]) in text
    assert "See & wonder" in text
    assert [tag for tag, _ in read.tags].count("section") == 3


def test_nothing_of_a_prompt_is_read_as_a_page(cards):
    page = html_report(EVIL, cards, dict.fromkeys(cards, EVIL)).decode()
    read = Read(page)
    assert EVIL in "".join(read.texts)
    pictures = sum(len(one["answer"]["figures"]) for one in cards.values())
    assert len(read.scripts) == [tag for tag, _ in read.tags].count("script") == pictures + 1
    assert not [one for one in read.scripts[1:] if not one.startswith("Plotly.newPlot(")]
    drawn = "".join(one for one in read.scripts[1:])
    assert "<" not in drawn, "a script that holds <!-- and <script is not ended by its own end"


def test_the_pictures_of_a_page_are_the_cards(cards):
    read = Read(html_report("t", cards, {}).decode())
    first = next(one for one in read.scripts if '"aaaaaaaaaaaa-0"' in one)
    drawn = json.loads(re.fullmatch(r'Plotly\.newPlot\("aaaaaaaaaaaa-0", (.*)\)', first, re.DOTALL)[1])
    assert drawn == cards["aaaaaaaaaaaa"]["answer"]["figures"]["heatmap"]


def test_a_page_reaches_for_nothing(cards):
    read = Read(html_report("t", cards, {}).decode())
    assert not [attrs for tag, attrs in read.tags if tag in ("script", "link", "img") and ("src" in attrs or "href" in attrs)]


def test_a_page_without_pictures_has_no_script(cards):
    read = Read(html_report("t", {"b": cards["bbbbbbbbbbbb"]}, {}).decode())
    assert "script" not in [tag for tag, _ in read.tags]


def test_a_long_table_is_cut_and_says_so(cards):
    one = dict(cards["cccccccccccc"])
    one["answer"] = {
        "settings": {},
        "figures": {},
        "tables": {"table": {"n": [*range(ROWS + 5)], "x": [0.123456789] * (ROWS + 5)}},
    }
    text = "".join(Read(html_report("t", {"d": one}, {}).decode()).texts)
    assert "5 more rows" in text
    assert "0.1235" in text


def test_a_notebook_is_one_and_its_code_is_the_cards_programs(cards):
    notebook = nbformat.reads(notebook_report("What it does", cards, {"cccccccccccc": "So long"}).decode(), as_version=4)
    nbformat.validate(notebook)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert code == [Question(one["task"], one["arguments"]).python() for one in cards.values()]
    words = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for title in ("# What it does", "## A continuation", "## Lengths", "So long"):
        assert title in words
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_the_code_of_a_notebook_runs_and_gives_the_cards_numbers(cards):
    notebook = nbformat.reads(notebook_report("t", {"c": cards["cccccccccccc"]}, {}).decode(), as_version=4)
    space = {}
    exec(notebook.cells[-1].source, space)
    np.testing.assert_allclose(space["result"].table["norm"], cards["cccccccccccc"]["answer"]["tables"]["table"]["norm"])


# ---- downloads of a card


def test_a_table_is_downloaded_as_csv(cards):
    import csv
    import io

    columns = {"token": ["a,b", '"q"', "x\ny", "ä", "=1+1", None], "n": [1, 2.5, None, True, -1, 0]}
    text = card._csv(columns)
    assert text.startswith(b"\xef\xbb\xbf")
    rows = list(csv.reader(io.StringIO(text.decode("utf-8-sig"), newline="")))
    assert rows[0] == ["token", "n"]
    assert [row[0] for row in rows[1:]] == ["a,b", '"q"', "x\ny", "ä", "=1+1", ""]


def test_a_card_is_downloaded_as_json(cards):
    one = cards["cccccccccccc"]
    told = json.loads(card._json(Question(one["task"], one["arguments"]), one["answer"]))
    assert told["tables"] == one["answer"]["tables"]
    assert told["arguments"] == one["arguments"]
    assert told["settings"]["model"] == one["arguments"]["model"]["name"]


def test_provenance_names_what_the_numbers_are_of():
    settings = {
        "model": "m",
        "revision": "abcdef",
        "dtype": "float32",
        "device": "cpu",
        "attention": "sdpa",
        "tokens": 1234,
        "seed": 0,
    }
    line = card.provenance(settings | {"versions": {"mi-workbench": "1.2.3"}})
    assert line.split(" · ") == [
        "m", "revision abcdef", "float32", "cpu", "attention sdpa", "raw weights", "1,234 tokens", "seed 0",
        "mi-workbench 1.2.3",
    ]  # fmt: skip
    assert card.provenance({}) == "raw weights"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), np.float64("-inf")])
def test_what_is_no_number_is_null_to_the_page(value):
    from app.plain import as_plain

    assert as_plain([value, {"a": value}]) == [None, {"a": None}]
    assert as_plain(SimpleNamespace(item=lambda: 3)) == 3
