"""The line and the program of a card give the card's numbers again: both are run, as they stand there, for every task."""

import json
import shlex
from typing import Any

import numpy as np
import pandas as pd
import pytest
from explorer import command, said, screen, with_columns

from app import lines, tasks
from app.lines import Question
from app.plain import as_plain, columns

NASTY = """-a "dog's" $(cat) `b` \\n
result.plot() {x} %s ä"""
"""A prompt with all that a shell or a program could misread."""

QUESTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "load": ("load", {}),
    "verify": ("verify", {}),
    "lens": ("lens", {"prompt": "a dog", "k": 10, "target": None}),
    "lens of a nasty prompt": ("lens", {"prompt": NASTY, "k": 3, "target": " dog"}),
    "lens of an id": ("lens", {"prompt": "a dog", "k": 3, "target": "id:7"}),
    "a fitted lens": ("lens", {"prompt": "a dog", "lens": "RUNS/lens", "k": 10, "target": None}),
    "lens_lines": ("lens_lines", {"prompt": NASTY, "lens": "logit", "k": 10, "measure": "entropy_nats", "target": None}),
    "lens_difference": (
        "lens_difference",
        {"prompt": "a dog", "other": "a cat", "lens": "logit", "other_lens": "logit", "measure": "kl_to_final_nats"},
    ),
    "lens_difference of lenses": (
        "lens_difference",
        {"prompt": "a dog", "other": "a dog", "lens": "logit", "other_lens": "RUNS/lens", "measure": "target_rank"}
        | {"target": "e"},
    ),
    "attention": ("attention", {"prompt": "a dog", "layer": 1}),
    "norms": ("norms", {"prompt": NASTY}),
    "generate": ("generate", {"prompt": "a dog", "max_new_tokens": 7}),
    "generate with an eraser": (
        "generate", {"prompt": "a dog", "erasers": "RUNS/erase/erasers.safetensors", "name": "resid_post.0/leace"},
    ),
    "neuron": ("neuron", {"layer": 1, "neuron": 7, "decoder": "norm"}),
    "neuron of a map": ("neuron", {"layer": 2, "neuron": 0, "map": "RUNS/map"}),
    "neuron on text": ("neuron", {"layer": 1, "neuron": 7, "corpus": "TEXTS", "max_tokens": 500}),
    "clamp": ("clamp", {"layer": 1, "neuron": 7, "prompt": "a dog", "value": -3.5, "side": "gate"}),
    "clamp of a nasty prompt": ("clamp", {"layer": 0, "neuron": 1, "prompt": NASTY, "n_random": 3, "max_new_tokens": 2}),
    "examples": ("examples", {"folder": "RUNS/top", "site": "mlp_post.1", "index": 7}),
    "backward": ("backward", {"prompt": "a dog", "target": " Rome", "step": None}),
    "backward with a step": ("backward", {"prompt": "a dog", "target": "id:8,9", "step": 0.01, "k": 3}),
    "open_run": ("open_run", {"folder": "RUNS/map"}),
}  # fmt: skip
"""Of every task, with the options that screens give it."""

each = pytest.mark.parametrize("name", QUESTIONS)


@pytest.fixture
def question(name, tiny_folder, results, tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task, options = QUESTIONS[name]
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"{i} dogs and a cat" for i in range(40)))
    options = {
        key: one.replace("RUNS", str(results)).replace("TEXTS", str(texts)) if isinstance(one, str) else one
        for key, one in options.items()
    }
    of_model = {} if task in ("examples", "open_run") else {"model": {"name": str(tiny_folder), "dtype": None, "device": None}}
    return Question(task, of_model | options)


def answer(question):
    """As the worker gives it."""
    return json.loads(json.dumps(tasks.TASKS[question.task](**question.arguments)))


def same(rows, table, *, rtol=1e-6):
    """Rows of the command line, and a table of a card."""
    names = [name for name in table if name in rows[0]]
    assert names
    assert len(rows) == len(next(iter(table.values())))
    for name in names:
        for one, two in zip((row[name] for row in rows), table[name], strict=True):
            if isinstance(one, float) and isinstance(two, float):
                np.testing.assert_allclose(one, two, rtol=rtol, atol=1e-9)
            else:
                assert one == two, name


def test_there_is_a_question_for_every_task_and_lines_for_each():
    assert {task for task, _ in QUESTIONS.values()} == set(tasks.TASKS)
    for task in tasks.TASKS:
        assert callable(getattr(lines, f"_{task}_cli"))
        assert callable(getattr(lines, f"_{task}_python"))


@each
def test_the_line_gives_the_cards_numbers(name, question, tmp_path):
    card, line = answer(question), question.cli()
    if name == "lens_difference of lenses":
        assert line is None
        return
    words = shlex.split(line)
    assert words[0] == "workbench"
    done = command(*words[1:] if "--" not in words else [*words[1 : words.index("--")], "--json", *words[words.index("--") :]],
                   *([] if "--" in words else ["--json"]))  # fmt: skip
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    match question.task:
        case "load":
            same(told["sites"], card["tables"]["table"])
        case "verify":
            assert told["passed"] == card["passed"] is True
            worst = {one["identity"]: one["error"] for one in told["checks"]}
            assert {one: worst[one] for one in card["tables"]["table"]["identity"]}.keys() <= worst.keys()
        case "lens":
            for table in ("table", "positions", "by_layer"):
                same(told[table], card["tables"][table])
        case "lens_lines":
            same(told["positions"], card["tables"]["positions"])
        case "lens_difference":
            same(told["positions"], card["tables"]["first"])
            assert (tmp_path / "out/difference/difference.html").exists()
        case "attention" | "norms":
            same(told["table"], card["tables"]["table"])
        case "generate":
            assert [told["text"]] == card["tables"]["table"]["text"]
            assert [told["edited"]] == card["tables"]["table"]["edited"]
            assert (told["edited"] is None) == ("erasers" not in question.arguments)
        case "neuron":
            told |= {"table": told["tokens"]} | (told["text"] or {})
            assert {name for name, rows in told.items() if isinstance(rows, list)} >= set(card["tables"])
            for table, own in card["tables"].items():
                same(told[table], own, rtol=1e-4)
        case "clamp":
            same(told["summary"], card["tables"]["summary"])
            same(told["words"], card["tables"]["table"])
            assert [one["text"] for one in told["generations"]] == card["tables"]["generations"]["text"]
        case "backward":
            for table in ("table", "vectors", "matrices", "targets", *(["forecast"] if question.arguments["step"] else [])):
                same(told[table], card["tables"][table])
        case "examples" | "open_run":
            assert told["reproduced"] is True
        case other:
            raise AssertionError(f"{other} is compared with nothing")


@each
def test_the_program_gives_the_cards_numbers(name, question):
    card, space = answer(question), {}
    exec(compile(question.python(), name, "exec"), space)
    result = space["result"]
    match question.task:
        case "generate":
            row = card["tables"]["table"]
            assert [result] == (row["text"] if row["edited"] == [None] else row["edited"])
            if "erasers" in question.arguments:
                assert [space["before"]] == row["text"]
        case "open_run":
            assert columns(result.summary()) == card["tables"]["summary"]
            assert as_plain(result.settings) == card["settings"]
        case "verify":
            assert columns(result.worst()).keys() == card["tables"]["table"].keys()
            assert columns(result.worst()) == card["tables"]["table"]
        case "load" | "examples":
            assert columns(result) == card["tables"]["table"]
        case "lens_lines" | "lens_difference":
            assert columns(result.positions) == next(iter(card["tables"].values()))
            if "other" in space:
                assert columns(space["other"].positions) == card["tables"]["second"]
        case _:
            for table in card["tables"]:
                if isinstance(own := getattr(result, table, None), pd.DataFrame):
                    assert columns(own) == card["tables"][table], table
            assert columns(result.table) == card["tables"]["table"]
    if question.task == "backward" and question.arguments["step"]:
        assert columns(space["forecast"].table) == card["tables"]["forecast"]


def test_a_search_and_its_line_and_its_program_are_one(shown_results):
    opened = screen("neurons", q="DOG", side="up", within=3, bottom=1)
    (hits,) = with_columns(opened, "neuron", "side", "rank", "score")
    asked = {"map": str(shown_results / "map"), "text": "DOG", "match": "folded", "side": "up", "max_rank": 2, "bottom": True}
    question = Question("find", asked)
    assert question.cli() in [one.value for one in opened.code]
    words = shlex.split(question.cli())[1:]
    told = json.loads(command("find-neurons", "--json", *words[1:]).stdout)
    space = {}
    exec(question.python(), space)
    for neurons, scores in (
        ([f"{one['layer']}.{one['neuron']}" for one in told["neurons"]], [one["score"] for one in told["neurons"]]),
        ([f"{one.layer}.{one.neuron}" for one in space["result"].itertuples()], space["result"]["score"].tolist()),
    ):
        assert neurons == hits["neuron"].tolist()
        np.testing.assert_allclose(scores, hits["score"], rtol=1e-6)
    assert f"{told['total']:,} hits" in said(opened.markdown)


@pytest.mark.parametrize("text", ["-h", "--help", "dog's", "$(x)", "a b", "*"])
def test_a_searched_word_is_never_an_option(results, text):
    question = Question("find", {"map": str(results / "map"), "text": text, "match": "exact", "side": None, "max_rank": 9})
    words = shlex.split(question.cli())[1:]
    done = command("find-neurons", "--json", *words[1:])
    if done.exit_code == 0:
        assert json.loads(done.stdout)["text"] == text
    else:
        assert repr(text) in done.stderr
        assert "No such option" not in done.stderr


def test_precision_and_device_are_in_the_line_and_the_program(tiny_folder):
    model = {"name": str(tiny_folder), "dtype": "bfloat16", "device": "cpu"}
    question = Question("norms", {"model": model, "prompt": "a dog"})
    card, space = answer(question), {}
    assert card["settings"]["dtype"] == "bfloat16"
    told = json.loads(command(*shlex.split(question.cli())[1:], "--json").stdout)
    assert told["settings"]["dtype"] == "bfloat16"
    same(told["table"], card["tables"]["table"])
    exec(question.python(), space)
    assert columns(space["result"].table) == card["tables"]["table"]
