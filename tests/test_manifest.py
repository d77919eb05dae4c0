"""Runs of the command line: what is recorded of them, and whether they can be made again."""

import hashlib
import io
import json
import shutil
import subprocess
import time
from contextlib import redirect_stdout

import pandas as pd
import pytest
import torch
import typer
from families import tiny_hf, tiny_tokenizer
from typer.testing import CliRunner

import workbench as wb
from workbench import run_log
from workbench.cli import app
from workbench.cli.rerun import command_line
from workbench.cli.verb import verb
from workbench.errors import BadArtifact, WorkbenchError
from workbench.manifest import Heard, note, recording, timed, wrote

NEURON_TABLES = {"neurons.parquet", "neurons_bottom.parquet", "null.parquet", "tokens.parquet"}


def command(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def replayed(*arguments):
    done = command("replay", *arguments, "--json")
    return done, json.loads(done.stdout)


def verdicts(answer):
    return {file["file"]: file["verdict"] for file in answer["files"]}


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    """A log of its own for every test."""
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "log"))
    return tmp_path / "log"


def save_model(folder, change=0.0):
    hf = tiny_hf("llama")
    weight = hf.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += change * torch.linspace(-1, 1, weight.numel()).view_as(weight)
    hf.save_pretrained(folder)
    weight.data = before  # the model is shared by all tests
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def map_neurons(model, out, *more):
    done = command("map-neurons", "--model", model, "--layers", "0", "--show", 3, "--out", out, *more)
    assert done.returncode == 0, done.stderr
    return done


def last():
    (record,) = run_log.newest(1)
    return record


def test_a_record_says_what_was_asked_used_and_written(model, tmp_path):
    done = map_neurons(model, tmp_path / "out", "--dtype", "bfloat16")
    record = last()
    assert record == json.loads((tmp_path / "out" / "run.json").read_text())["run"]
    assert record["verb"] == "map-neurons"
    assert record["arguments"].items() >= {"layers": "0", "top_k": 10, "plot": True, "reading": "raw", "device": None}.items()
    loaded = wb.load(model, dtype=torch.bfloat16)
    assert record["model"] == loaded.provenance
    assert record["model"].items() >= {"revision": "local", "dtype": "bfloat16", "attention": "sdpa", "device": "cpu"}.items()
    assert (record["seed"], record["outcome"], record["error"]) == (0, "done", None)
    assert record["versions"].keys() == {"python", "mi-workbench", "torch", "transformers", "safetensors", "numpy"}
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert 0 < record["timings"]["load_model_seconds"] < record["timings"]["total_seconds"]
    assert record["peak_bytes"] > 1e8
    files = {tmp_path / "out" / name for name in (*NEURON_TABLES, "neurons.html")}
    assert record["outputs"].keys() == set(map(str, files))
    for file in files:
        content = file.read_bytes()
        assert record["outputs"][str(file)] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert record["stdout"]["sha256"] == hashlib.sha256(done.stdout.encode()).hexdigest()


def test_the_record_is_no_setting_of_the_map(model, tmp_path):
    map_neurons(model, tmp_path, "--no-plot")
    neurons = wb.NeuronMap.load(tmp_path)
    assert "run" not in neurons.settings
    assert json.loads((tmp_path / "run.json").read_text())["kind"] == "neuron map"
    assert command("find-neurons", "dog", "--map", tmp_path).returncode == 0
    assert last()["model"]["weights_hash"] == neurons.settings["weights_hash"]


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_map_is_the_same_again(model, tmp_path, more):
    out = tmp_path / "out"
    map_neurons(model, out, *more)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    for name in (out, out / "run.json", last()["id"], last()["id"][:24]):
        done, answer = replayed(name)
        assert done.returncode == 0, done.stderr
        assert answer["reproduced"] is True
        assert verdicts(answer) == dict.fromkeys([*NEURON_TABLES, "neurons.html", "stdout"], "same")
        assert answer["facts"] == answer["around"] == {}
        if more:
            break  # the seconds in the JSON on stdout are what this case is for
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert len(run_log.newest(9)) == 1  # a replay is no run of its own


def test_verbs_without_a_folder_are_the_same_again(model, tmp_path):
    page, checks = tmp_path / "clamp.html", tmp_path / "checks.json"
    common = ("--model", model, "--prompt", "a dog")
    edits = wb.save_edits(tmp_path / "edits.json", [wb.add("resid_post.1", torch.linspace(-9, 9, 32))])
    for arguments, outputs in (
        (("generate", *common, "--temperature", 1.5, "--seed", 3, "--edits", edits), []),
        (("clamp", "1.3", *common, "-p", "-b", "--random", 2, "--max-new-tokens", 2, "--plot", page), [page]),
        (("verify", "--model", model, "--save", checks), [checks]),
        (("scan", *common, "--json"), []),
    ):
        assert command(*arguments).returncode == 0
        assert list(last()["outputs"]) == list(map(str, outputs))
        done, answer = replayed(last()["id"])
        assert done.returncode == 0, (done.stderr, answer)
        assert len(answer["files"]) == len(outputs) + 1
    wb.save_edits(edits, [wb.add("resid_post.1", torch.linspace(-9, 8, 32))])
    done, answer = replayed(next(run["id"] for run in run_log.newest(9) if run["verb"] == "generate"))
    assert done.returncode == 2
    assert answer["facts"].keys() == {"edits"}


def test_a_changed_model_is_found(tmp_path):
    folder = save_model(tmp_path / "model")
    map_neurons(folder, tmp_path / "out")
    save_model(folder, change=0.1)
    done = command("replay", tmp_path / "out")
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("workbench: "))
    assert "was not reproduced" in line
    assert "neurons.parquet differs" in line
    assert "model.weights_hash" in line
    assert "rows differ, in " in done.stdout
    _, answer = replayed(tmp_path / "out")
    assert verdicts(answer)["tokens.parquet"] == "same"
    assert answer["facts"].keys() == {"model.weights_hash"}


def test_an_output_that_was_altered_since_is_found(model, tmp_path):
    out = tmp_path / "out"
    map_neurons(model, out, "--no-plot")
    table = pd.read_parquet(out / "neurons.parquet")
    table.loc[5, "score"] += 1
    table.to_parquet(out / "neurons.parquet", index=False)
    done, answer = replayed(out)
    assert done.returncode == 2
    (row,) = (row for row in answer["files"] if row["verdict"] != "same")
    assert (row["file"], row["verdict"]) == ("neurons.parquet", "was altered")
    assert "1 of 480 rows differ, in score" in row["why"]
    moved = tmp_path / "moved"
    shutil.move(out, moved)
    assert verdicts(replayed(moved)[1])["neurons.parquet"] == "was altered"
    (moved / "neurons.parquet").unlink()
    assert replayed(moved)[1]["reproduced"] is True  # what is gone was not altered


def test_a_folder_that_a_later_run_wrote_over_is_no_alteration(model, tmp_path):
    map_neurons(model, tmp_path / "out", "--no-plot")
    first = last()["id"]
    map_neurons(model, tmp_path / "out", "--no-plot", "--top-k", 3)
    assert replayed(first)[1]["reproduced"] is True


def test_a_different_number_of_files_is_found(model, tmp_path):
    map_neurons(model, tmp_path / "out")
    file = tmp_path / "out" / "run.json"
    settings = json.loads(file.read_text())
    settings["run"]["arguments"]["plot"] = False
    settings["run"]["outputs"].pop(str(tmp_path / "out" / "null.parquet"))
    file.write_text(json.dumps(settings))
    _, answer = replayed(tmp_path / "out")
    assert verdicts(answer)["neurons.html"] == "is not written any more"
    assert verdicts(answer)["null.parquet"] == "was not written before"


def test_relative_paths_are_those_of_the_run(model, tmp_path, monkeypatch):
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    shutil.copytree(model, there / "model")
    elsewhere.mkdir()
    monkeypatch.chdir(there)
    assert command("map-neurons", "-m", "model", "--layers", 0, "--out", "o", "--no-plot", "--json").returncode == 0
    assert last()["arguments"]["model"] == "model"
    monkeypatch.chdir(elsewhere)
    done, answer = replayed(last()["id"], "--keep", "new")
    assert answer["reproduced"], done.stderr
    assert {path.name for path in (elsewhere / "new" / "out" / "o").iterdir()} == {*NEURON_TABLES, "run.json"}
    again = command("replay", last()["id"], "--keep", "new")
    assert again.returncode == 2
    assert "--keep 'new' holds files, which a replay might write over" in again.stderr
    shutil.move(there, tmp_path / "moved")
    gone = command("replay", last()["id"])
    assert gone.returncode == 2
    assert f"The run was made in {there}, which is not here" in gone.stderr
    assert 'made of something else: outcome "done" -> "bad input"' in gone.stderr


def test_tables_are_cut_again_as_for_the_terminal_of_the_run(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with monkeypatch.context() as narrow, redirect_stdout(Terminal()) as shown:
        narrow.setenv("COLUMNS", "57")
        app(["families"], standalone_mode=False)
    assert 50 < max(map(len, shown.getvalue().splitlines())) <= 57
    assert last()["stdout"]["columns"] == 57
    assert replayed(last()["id"])[1]["reproduced"] is True
    command("families")
    assert last()["stdout"]["columns"] is None


@pytest.mark.parametrize(
    "line",
    [
        ["map-neurons", "--out", "o", "--side", "all", "--no-plot", "--top-k", "3", "--layers=-1"],
        ["clamp", "12.3", "-p", "--json", "--prompt=-x", "--word", " a", "--word", "", "--value", "-0.1", "--chat", "--json"],
        ["find-neurons", "--map", "m", "-n", "7", "--regex", "--", "-dog$"],
        ["verify", "--every-layer"],
    ],
)
def test_a_command_line_is_rebuilt_from_its_arguments(line, monkeypatch):
    name, *words = line
    found = typer.main.get_command(app).commands[name]
    with monkeypatch.context():
        asked = found.make_context(name, list(words)).params
    record = {"id": "x", "verb": name, "arguments": json.loads(json.dumps(asked, default=str))}
    rebuilt = command_line(found, record)
    assert found.make_context(name, rebuilt).params == asked
    with pytest.raises(BadArtifact, match=r"has no 'colour'\. It was recorded with mi-workbench unknown: install that one"):
        command_line(found, record | {"arguments": {"colour": 1}})


def test_bad_input_is_recorded_with_its_line(model, tmp_path):
    done = command("map-neurons", "--model", model, "--layers", "9", "--out", tmp_path / "out")
    record = last()
    assert record["outcome"] == "bad input"
    assert done.stderr.splitlines()[-1] == f"workbench: {record['error']}"
    assert not (tmp_path / "out" / "run.json").exists()  # a folder with a run.json is whole
    assert replayed(record["id"])[1]["reproduced"] is True


def raising(error):
    def function(**_):
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "passes", "outcome", "line"),
    [
        (KeyboardInterrupt(), SystemExit, "stopped", None),
        (WorkbenchError("Bad."), SystemExit, "bad input", "Bad."),
        (RuntimeError("Ours."), RuntimeError, "failed", "RuntimeError: Ours."),
        (SystemExit(3), SystemExit, "failed", "SystemExit: 3"),
        (SystemExit(0), SystemExit, "done", None),
        (typer.Exit(), typer.Exit, "done", None),
    ],
)
def test_however_a_run_ends_it_is_recorded(error, passes, outcome, line):
    with pytest.raises(passes):
        verb("toy", raising(error))(number=1)
    assert (last()["verb"], last()["outcome"], last()["error"]) == ("toy", outcome, line)
    assert last()["arguments"] == {"number": 1}


def test_facts_outputs_and_timings_belong_to_the_open_run(tmp_path):
    note(corpus="nobody's")
    wrote(tmp_path / "nobody's")
    for name in ("a.txt", ".hidden", "run.json", "other.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "inner").mkdir()
    with recording("toy", {}):
        with timed("wait"):
            pass
        note(corpus={"hash": "ab"}, sites=("resid_post",), path=tmp_path)
        wrote(tmp_path, tmp_path / "never written")
    assert last()["corpus"] == {"hash": "ab"}
    assert (last()["sites"], last()["path"]) == (["resid_post"], str(tmp_path))
    assert last()["timings"].keys() == {"wait_seconds", "total_seconds"}
    assert last()["outputs"].keys() == {str(tmp_path / "a.txt"), str(tmp_path / "other.txt")}
    note(corpus="nobody's")
    assert last()["corpus"] == {"hash": "ab"}


def test_a_run_that_wrote_nothing_leaves_its_folders_record_alone(tmp_path):
    def verb_of(number, *files):
        with recording("toy", {"out": str(tmp_path), "number": number}):
            for file in files:
                file.write_text("results")
            wrote(*files)
        file = tmp_path / "run.json"
        return json.loads(file.read_text())["run"]["arguments"]["number"] if file.exists() else None

    assert verb_of(1) is None
    assert verb_of(2, tmp_path / "a.txt") == 2
    assert verb_of(3) == 2  # a dry run, for one
    assert last()["arguments"]["number"] == 3


def test_what_is_printed_is_hashed_line_by_line_but_for_seconds():
    def heard(*pieces, **options):
        stream = io.StringIO()
        one = Heard(stream, **options)
        for piece in pieces:
            one.write(piece)
        assert stream.getvalue() == "".join(pieces)
        return one.fingerprint()["sha256"]

    assert heard("a\nb") == heard("a", "\n", "b") == hashlib.sha256(b"a\nb").hexdigest()
    assert heard('{"seconds": 1.5, "k": 2}\n') == heard('{"sec', 'onds": 3e-05, "k": 2}\n')
    assert heard('{"seconds": 1.5, "k": 2}') != heard('{"seconds": 1.5, "k": 3}')
    assert heard("to /tmp/new/o\n", spelling={"/tmp/new/o": "o"}) == heard("to o\n")


def test_runs_lists_the_newest_first(model, log):
    command("find-neurons", "dog", "--map", "nowhere")
    command("generate", "--model", model, "--prompt", "a", "--max-new-tokens", 1)
    answer = json.loads(command("runs", "--json").stdout)
    assert answer["folder"] == str(log)
    assert [run["verb"] for run in answer["runs"]] == ["generate", "find-neurons"]
    header, *lines = command("runs").stdout.splitlines()[1:]
    assert header.split() == ["id", "when", "verb", "seconds", "outcome", "model", "out"]
    assert str(model) in lines[0]
    assert "bad input" in lines[1]
    assert len(command("runs", "-n", 1).stdout.splitlines()) == 3


def test_only_the_newest_runs_are_kept(log, monkeypatch):
    monkeypatch.setattr(run_log, "KEPT", 3)
    log.mkdir()
    (log / "notes.json").write_text("{}")
    for i in range(5):
        with recording("toy", {"i": i}):
            pass
    assert {run["arguments"]["i"] for run in run_log.newest(9)} <= {0, 1, 2, 3, 4}
    assert len(list(log.iterdir())) == 4
    assert (log / "notes.json").exists()
    next(log.glob("*-toy-*")).write_text("cut sho")
    assert len(run_log.newest(9)) == 2


def test_ids_sort_by_time(log):
    ids = []
    for _ in range(3):
        with recording("toy", {}):
            pass
        ids.append(last()["id"])
        time.sleep(0.002)
    assert ids == sorted(ids)


def test_no_log_is_kept_if_the_variable_is_empty(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_RUNS", "")
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    map_neurons(model, tmp_path / "out", "--no-plot")
    assert not (tmp_path / "home").exists()
    assert replayed(tmp_path / "out")[1]["reproduced"] is True
    done = command("runs")
    assert done.returncode == 2
    assert "WORKBENCH_RUNS is set but empty" in done.stderr
    monkeypatch.delenv("WORKBENCH_RUNS")
    command("find-neurons", "dog", "--map", "nowhere")
    assert len(list((tmp_path / "home" / "runs").iterdir())) == 1


def test_a_log_that_cannot_be_written_is_a_warning(model, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "file" / "log"))
    map_neurons(model, tmp_path / "out", "--no-plot")
    assert caplog.messages[-1].startswith("This run was not recorded. Output folder")
    assert "Set WORKBENCH_RUNS to another" in caplog.messages[-1]
    assert replayed(tmp_path / "out")[1]["reproduced"] is True


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing", "Run 'nothing' is no folder with a run.json, and no id in"),
        ("", "Take an id from workbench runs"),
        ("2", "Run '2' could be any of 2: 2"),
        ("EMPTY", "run.json' does not exist"),
        ("OTHER", "holds no record of a run: no verb of the command line wrote it"),
        ("TOY", "is of 'toy', which is no verb of this version of the workbench"),
    ],
)
def test_a_run_that_is_not_there_is_one_line(name, text, tmp_path):
    for _ in range(2):
        with recording("toy", {}):
            pass
    for folder in ("empty", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "run.json").write_text('{"kind": "neuron map"}')
    names = {"EMPTY": tmp_path / "empty", "OTHER": tmp_path / "other", "TOY": last()["id"]}
    done = command("replay", names.get(name, name))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert text in line


def test_a_capture_is_run_again_to_the_same_bytes(model, tmp_path):
    """With what it prints, of which the time and the memory that its plan tells are another each time."""
    text = tmp_path / "text.txt"
    text.write_text("The dog sleeps in the sun.\n\nA cat looks out of the window, and a bird flies by.")
    done = command(
        "capture", "--model", model, "--corpus", text, "--sites", "resid_post", "--out", tmp_path / "store", "--json"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "store" / "run.json").read_text())["run"]
    assert record["corpus"]["tokens_hash"]
    assert record["sites"] == ["resid_post.0", "resid_post.1", "resid_post.2"]
    again = command("replay", tmp_path / "store", "--json")
    assert again.returncode == 0, again.stderr
    answer = json.loads(again.stdout)
    assert answer["reproduced"]
    assert {file["file"] for file in answer["files"]} == {"index.json", "tokens.parquet", "stdout"}
