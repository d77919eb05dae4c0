"""The view and its link: each part goes into the URL and comes back, and what a link gets wrong is left out."""

import string
from pathlib import Path

import pytest
from explorer import PROMPT, said, screen, tables

from app import url
from app.url import LONG, PARAMS

SAMPLES = {
    "layer": 0, "pos": 12, "within": 3, "value": -2.5, "step": 0.001, "bottom": True,
    "cards": ("0123456789ab", "ffffffffffff"), "prompt": "Ä 'b' &=?#%\n\t+ <c>", "other": " a ", "model": "/models/of mine",
}  # fmt: skip


def there_and_back(name, value):
    return PARAMS[name].read(PARAMS[name].write(value))


@pytest.mark.parametrize("name", PARAMS)
def test_each_part_of_the_view_goes_and_comes_back(explorer, name):
    value = SAMPLES.get(name, "a/b c>d&e=f ä")
    assert value != PARAMS[name].default
    assert there_and_back(name, value) == value
    written = url._written({name: value})
    assert list(written) == [name]
    assert PARAMS[name].read(written[name]) == value


@pytest.mark.parametrize("name", PARAMS)
def test_a_default_is_left_out(explorer, name):
    assert url._written({name: PARAMS[name].default}) == {}
    assert url._written({}) == {}


@pytest.mark.parametrize("text", ["x" * (LONG + 1), "ä\r\n\n\tb" * 100, "~", "~0123456789abcdef", "~tilde", "𝄞" * LONG + "\r"])
def test_a_text_that_is_long_or_begins_like_a_hash_is_named_by_its_hash_and_read_again(explorer, text):
    written = PARAMS["prompt"].write(text)
    assert written[0] == "~"
    assert len(written) == 17
    assert set(written[1:]) <= set(string.hexdigits)
    assert PARAMS["prompt"].read(written) == text
    assert PARAMS["prompt"].write(text) == written
    (kept,) = (explorer.parent / "home" / "app" / "texts").iterdir()
    assert kept.name == f"{written[1:]}.txt"


@pytest.mark.parametrize("text", ["", "x" * LONG, "a ~ b"])
def test_a_short_text_stands_in_the_link(explorer, text):
    assert PARAMS["prompt"].write(text) == text
    assert not (explorer.parent / "home").exists()


@pytest.mark.parametrize("text", ["~0123456789abcdef", "~../../../etc/passwd", "~", "~0123456789ABCDEF", "~0123456789abcdef\n"])
def test_a_hash_of_which_there_is_no_text_is_refused(explorer, text):
    with pytest.raises(ValueError, match=r"^~"):
        PARAMS["prompt"].read(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("layer", "two"), ("layer", "1.5"), ("pos", ""), ("pos", "1e3"), ("within", "ten"), ("value", "much"), ("value", "nan"),
        ("value", "inf"), ("step", "-inf"), ("cards", "../x"), ("cards", "0123456789ab."), ("cards", "0123456789AB"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused(explorer, name, text):
    with pytest.raises(ValueError):  # noqa: PT011
        PARAMS[name].read(text)


# ---- in the page


def test_a_link_opens_the_same_view_in_another_tab(explorer):
    one = screen("prompt_lab", prompt=PROMPT)
    one.text_input(key="w.target").set_value(" dog").run()
    one.selectbox(key="w.compare").set_value("another prompt").run()
    one.text_input(key="w.other").set_value("a cat").run()
    one.selectbox(key="w.measure").set_value("entropy_nats").run()
    link = one.query_params
    assert link == {
        "prompt": PROMPT, "target": " dog", "compare": "another prompt", "other": "a cat", "measure": "entropy_nats",
    }  # fmt: skip
    two = screen("prompt_lab", **link)
    assert two.query_params == link
    assert said(two.markdown) == said(one.markdown)
    assert said(two.code) == said(one.code)
    assert said(two.caption) == said(one.caption)
    assert all(a.equals(b) for a, b in zip(tables(one), tables(two), strict=True))
    assert two.text_input(key="w.target").value == " dog"


def test_a_link_chooses_the_cell(explorer):
    one = screen("prompt_lab", prompt=PROMPT, layer=1, pos=2)
    assert "Layer 1, position 2" in said(one.markdown)
    assert one.query_params == {"prompt": PROMPT, "layer": "1", "pos": "2"}


def test_setting_a_default_again_takes_it_out_of_the_link(explorer):
    opened = screen("prompt_lab", prompt=PROMPT, measure="entropy_nats")
    opened.selectbox(key="w.measure").set_value("target_rank").run()
    assert opened.query_params == {"prompt": PROMPT}


def test_a_long_prompt_is_in_the_link_by_its_hash(explorer):
    text = "dog " * (LONG // 3)
    one = screen("jobs", prompt=text)
    link = one.query_params["prompt"]
    assert link.startswith("~")
    assert (explorer.parent / "home" / "app" / "texts" / f"{link[1:]}.txt").read_text() == text
    two = screen("backward_lens", prompt=link, answer="")
    assert two.text_area(key="w.prompt").value == text


def test_a_hash_without_a_text_is_told_and_the_first_prompt_shown(explorer):
    opened = screen("backward_lens", prompt="~0123456789abcdef", answer="")
    assert opened.text_area(key="w.prompt").value == PARAMS["prompt"].default
    assert "not on this machine" in said(opened.toast)
    assert opened.query_params == {"answer": ""}


def test_state_outlives_a_change_of_page(explorer):
    opened = screen("prompt_lab", prompt=PROMPT, layer=1, pos=0)
    assert "Layer 1, position 0" in said(opened.markdown)
    other = screen("backward_lens", **opened.query_params)
    assert other.text_area(key="w.prompt").value == PROMPT
    assert "layer 1, position 0" in said(other.markdown)


GARBAGE = [
    ("home", "run", "../../etc"), ("home", "run", "nothing\0"), ("home", "nothing_such", "x"), ("home", "dtype", "int4"),
    ("home", "device", "abacus"), ("prompt_lab", "layer", "99"), ("prompt_lab", "layer", "-7"), ("prompt_lab", "layer", "two"),
    ("prompt_lab", "pos", "99"), ("prompt_lab", "pos", "-1"), ("prompt_lab", "pos", "9" * 40),
    ("prompt_lab", "lens", "../../x"),
    ("prompt_lab", "measure", "weight"), ("prompt_lab", "compare", "x"), ("prompt_lab", "target", "id:999999999"),
    ("prompt_lab", "target", "id:-1"), ("prompt_lab", "first", "-5"), ("neurons", "map", "/etc"), ("neurons", "within", "0"),
    ("neurons", "within", "1000000"), ("neurons", "match", "magic"), ("neurons", "side", "left"),
    ("neurons", "neuron", "1.999"),
    ("neurons", "neuron", "99.1"), ("neurons", "neuron", "a.b"), ("neurons", "neuron", "1." + "9" * 30),
    ("neurons", "value", "1e9"),
    ("neurons", "value", "nan"), ("neurons", "decoder", "x"), ("neurons", "examples", "../x"), ("neurons", "clamp_side", "x"),
    ("backward_lens", "step", "-1"), ("backward_lens", "step", "inf"), ("backward_lens", "matrix", "W_none"),
    ("backward_lens", "answer", "id:x"), ("backward_lens", "answer", "id:99999"), ("transport", "pair", "9>x"),
    ("transport", "run", "probe"), ("probes_and_erasure", "eraser", "x"), ("jobs", "verb", "rm"), ("jobs", "job", "../x"),
    ("report", "cards", "../x"), ("report", "cards", "0123456789ab"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "name", "value"), GARBAGE, ids=[f"{path}-{name}-{value[:12]}" for path, name, value in GARBAGE]
)
def test_nothing_that_a_link_says_breaks_a_page(shown_results, path, name, value):
    view = {"prompt": PROMPT} if path in ("prompt_lab", "backward_lens") else {}
    view |= {"neuron": "1.2", "start": PROMPT} if path == "neurons" else {}
    opened = screen(path, **(view | {name: value}))
    assert not opened.exception, said(opened.exception)
    assert opened.title
    assert "fault of the workbench" not in said(opened.error)


@pytest.mark.parametrize("model", ["/nowhere/at all", "nobody/nothing", "..", "not a name!", "~"])
def test_a_model_that_cannot_be_had_is_told_in_words(explorer, model):
    opened = screen("prompt_lab", prompt=PROMPT, model=model)
    assert not opened.exception
    assert len(opened.error) == 1
    assert "fault of the workbench" not in said(opened.error)
    assert opened.text_area(key="w.prompt").value == PROMPT


def test_texts_of_links_are_files_in_the_apps_own_folder(explorer):
    PARAMS["prompt"].write("x" * 1000)
    assert [file.suffix for file in Path(explorer.parent / "home" / "app").rglob("*") if file.is_file()] == [".txt"]


def test_a_url_from_before_the_last_change_is_not_taken_up(explorer):
    opened = screen("prompt_lab", prompt=PROMPT)
    late = dict(opened.query_params)
    opened.text_area(key="w.prompt").set_value("a cat").run()
    opened.query_params.clear()
    opened.query_params.update(late)
    opened.run()
    assert opened.text_area(key="w.prompt").value == "a cat"
    assert opened.query_params == {"prompt": "a cat"}
