"""Long work: verbs in processes of their own, one at a time, with states, logs, progress and cancels; and forms for them."""

import json
import os
import shlex
import time

import pytest
from explorer import said, screen

from app import job_forms, jobs
from app.job_forms import VERBS, checked, words
from app.jobs import Job, Jobs, listed
from workbench.errors import UnknownOption

PROGRAM = """
import pathlib, signal, sys, time
what, *more = sys.argv[1:]
print("arguments", *more)
if what == "fail":
    sys.exit("It cannot be done.")
if what == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if what == "twice" and not pathlib.Path(more[0]).exists():
    pathlib.Path(more[0]).write_text("half")
    sys.exit("stopped half-way")
if what in ("wait", "deaf"):
    print("Reading:   0%|          | 0/4\\rReading:  50%|##### | 2/4", end="\\r", file=sys.stderr, flush=True)
    while True:
        time.sleep(0.01)
"""
"""In the place of the command line: it ends, fails, or waits until it is cancelled."""


@pytest.fixture
def queue(explorer, monkeypatch):
    monkeypatch.setattr(jobs, "PROGRAM", PROGRAM)
    started = Jobs()
    monkeypatch.setattr("app.screens.jobs.the_jobs", lambda: started)
    yield started
    for job in listed():
        started.cancel(job.id)
    until(lambda: all(job.state in jobs.ENDED for job in listed()))


def until(condition):
    """Waits for what another process does; a minute is for ever."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def state(job):
    return next(one.state for one in listed() if one.id == job.id)


def ended(job):
    until(lambda: state(job) in jobs.ENDED)
    return state(job)


def waiting_at_work(queue, what="wait"):
    job = queue.add([what])
    until(lambda: job.progress() is not None)
    return job


def test_a_job_is_done_and_what_it_printed_is_kept(queue):
    job = queue.add(["do", "a b", "--n=3"])
    assert job.line == "workbench do 'a b' --n=3"
    assert ended(job) == "done"
    assert job.out() == "arguments a b --n=3\n"
    kept = json.loads((job.folder / "job.json").read_text())
    assert (kept["words"], kept["state"]) == (["do", "a b", "--n=3"], "done")
    assert kept["made"] <= kept["ended"]


def test_a_job_that_fails_says_why(queue):
    job = queue.add(["fail"])
    assert ended(job) == "failed"
    assert "It cannot be done." in job.log()


def test_jobs_run_one_at_a_time_in_their_order(queue):
    first = waiting_at_work(queue)
    second, third = queue.add(["do", "2"]), queue.add(["do", "3"])
    assert [state(one) for one in (first, second, third)] == ["running", "waiting", "waiting"]
    assert second.out() == ""
    assert queue.cancel(first.id)
    assert [ended(one) for one in (first, second, third)] == ["cancelled", "done", "done"]
    assert {one.id for one in listed()} == {first.id, second.id, third.id}


def test_progress_is_the_last_that_a_bar_said(queue):
    job = waiting_at_work(queue)
    assert job.progress() == ("Reading", 0.5)
    assert "0%|          | 0/4" not in job.log()
    assert "arguments" not in job.log()


def test_a_job_that_waits_is_cancelled_and_never_begins(queue):
    first = waiting_at_work(queue)
    second, third = queue.add(["do", "2"]), queue.add(["do", "3"])
    assert queue.cancel(second.id) is True
    assert queue.cancel(second.id) is False
    assert state(second) == "cancelled"
    queue.cancel(first.id)
    assert ended(third) == "done"
    assert not (second.folder / "out.txt").exists()


def test_a_job_at_work_is_cancelled_once(queue):
    job = waiting_at_work(queue)
    assert [queue.cancel(job.id) for _ in range(3)] == [True, False, False]
    assert ended(job) == "cancelled"
    assert queue.cancel(job.id) is False
    assert queue.cancel("nothing-such") is False
    assert ended(queue.add(["do"])) == "done"


def test_a_job_that_does_not_hear_a_cancel_is_killed(queue, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 1.0)
    job = waiting_at_work(queue, "deaf")
    assert queue.cancel(job.id)
    assert state(job) == "ending"  # not cancelled while it still writes
    assert ended(job) == "cancelled"


def test_what_ran_when_the_app_ended_is_stopped_when_it_starts_again(explorer):
    for name in ("running", "waiting", "done", "failed"):
        Job(f"20260101-000000-{name}", ["do"], name, "2026-01-01T00:00:00+00:00").keep()
    Jobs()
    assert {one.id.rpartition("-")[2]: one.state for one in listed()} == {
        "running": "stopped", "waiting": "stopped", "done": "done", "failed": "failed",
    }  # fmt: skip


def test_jobs_of_another_app_that_runs_are_left_alone(explorer):
    for name, server in (("own", os.getppid()), ("gone", 2**22 + 1)):  # pids end below that
        Job(f"20260101-000000-{name}", ["do"], "running", "2026-01-01T00:00:00+00:00", server=server).keep()
    Jobs()
    assert {one.id.rpartition("-")[2]: one.state for one in listed()} == {"own": "running", "gone": "stopped"}


def test_two_jobs_may_have_made_the_same_run(explorer):
    for name in ("one", "two"):
        Job(f"20260101-000000-{name}", ["probe", "--out=out/probe"], "done", "2026-01-01T00:00:00+00:00").keep()
    opened = screen("jobs")
    assert not opened.exception
    assert [one.label for one in opened.button].count("See probe") == 2


def test_folders_that_hold_no_job_are_passed_over(explorer):
    Job("20260101-000000-do-0000", ["do"], "done", "2026-01-01T00:00:00+00:00").keep()
    place = explorer.parent / "home" / "app" / "jobs"
    for name, text in {"a": None, "b": "{", "c": "[1]", "d": '{"id": "d"}'}.items():
        (place / name).mkdir()
        if text is not None:
            (place / name / "job.json").write_text(text)
    assert [one.id for one in listed()] == ["20260101-000000-do-0000"]


def test_the_same_line_again_goes_on(queue, tmp_path):
    line = ["twice", str(tmp_path / "half")]
    assert [ended(queue.add(line)) for _ in range(2)] == ["failed", "done"]


# ---- forms

REQUIRED = {
    "map": "MAP", "corpus": "wikipedia", "data": "number", "sites": "mlp_post.1", "a": "MAP", "b": "MAP", "what": "OV",
}  # fmt: skip


def given(verb, results, **more):
    options = {one.name: one for one in job_forms.command(verb).params}
    found = {name: value.replace("MAP", str(results / "map")) for name, value in REQUIRED.items() if name in options}
    return found | {name: value for name, value in more.items() if name in options}


@pytest.mark.parametrize("verb", VERBS)
def test_the_words_of_a_form_are_taken_by_the_verb_as_they_were_filled_in(explorer, results, verb):
    asked = given(verb, results, model="a model", max_tokens=1234, seed=7, layers="1:2")
    line = checked(verb, words(verb, asked, "a run"))
    parsed = job_forms.command(verb).make_context(verb, line[1:]).params
    for name, value in asked.items():
        assert str(parsed[name]) == str(value), name
    assert str(parsed["out"]) == str(explorer / "a run")
    assert shlex.split(shlex.join(["workbench", *line]))[1:] == line


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_a_default_is_not_in_the_words(explorer, results, verb):
    defaults = {
        one.name: one.default for one in job_forms.command(verb).params if not callable(one.default) and not one.required
    }
    line = words(verb, defaults | given(verb, results), "x")
    assert not [word for word in line if word.startswith(("--seed", "--model", "--json", "--batch-tokens"))]
    assert f"--out={explorer / 'x'}" in line


def test_a_choice_that_the_verb_makes_itself_is_left_to_it(queue):
    opened = screen("jobs", verb="transport")
    opened.text_input(key="form-transport-corpus").set_value("wikipedia")
    for asked, said_ in (("", set()), ("no", {"--no-closely"}), ("yes", {"--closely"})):
        opened.selectbox(key="form-transport-closely").set_value(asked)
        run_button(opened).click().run()
        assert {"--closely", "--no-closely"} & set(listed()[0].words) == said_


def test_what_the_verb_would_refuse_is_refused_before_it_is_queued(explorer):
    with pytest.raises(UnknownOption, match="corpus"):
        checked("linearity", words("linearity", {}, "x"))
    with pytest.raises(UnknownOption, match="many"):
        checked("linearity", words("linearity", {"corpus": "wikipedia", "max_tokens": "many"}, "x"))
    with pytest.raises(UnknownOption, match="folds"):
        checked("probe", words("probe", {"data": "number", "folds": 1}, "x"))


def test_a_value_that_begins_with_a_dash_is_no_option(explorer):
    line = checked("linearity", words("linearity", {"corpus": "--json"}, "x"))
    assert job_forms.command("linearity").make_context("linearity", line[1:]).params["corpus"] == "--json"
    line = checked("compare-maps", words("compare-maps", {"a": "--json", "b": "-x"}, "x"))
    assert str(job_forms.command("compare-maps").make_context("compare-maps", line[1:]).params["a"]) == "--json"


# ---- the screen


def run_button(opened):
    return next(one for one in opened.button if one.label == "Run")


@pytest.mark.parametrize("verb", VERBS)
def test_a_form_runs_what_is_filled_in_and_shows_its_line(queue, explorer, results, tiny_folder, verb):
    opened = screen("jobs", verb=verb)
    assert not opened.exception
    for name, value in given(verb, results).items():
        field = [one for one in (*opened.text_input, *opened.selectbox) if one.key == f"form-{verb}-{name}"]
        if field:
            field[0].set_value(value)
    run_button(opened).click().run()
    assert not opened.exception
    assert not opened.error, said(opened.error)
    (job,) = listed()
    ended(job)
    assert job.words[0] == verb
    wanted = [verb, *(["--model=" + str(tiny_folder)] if verb != "compare-maps" else []), f"--out={explorer / verb}"]
    assert set(wanted) <= set(job.words)
    filled = {f"--{name.replace('_', '-')}" for name in (*given(verb, results), "max_tokens", "data", "model", "out")}
    assert {word.partition("=")[0] for word in job.words[1:] if word.startswith("-")} <= {*filled, "--"}, (
        "nothing but what was asked"
    )
    opened.run()
    assert job.line in [one.value for one in opened.code]
    assert opened.query_params["job"] == job.id
    checked(verb, job.words)


def test_no_name_of_a_run_leaves_the_runs_folder(queue):
    opened = screen("jobs", verb="map-neurons")
    for name in ("../out", "/tmp/x", "a/b", "..", "", " ", "a..b", ".hidden", "-x", "a\nb", "x" * 99, "~", "$x"):
        opened.text_input(key="form-map-neurons-name").set_value(name)
        run_button(opened).click().run()
        assert f"{name!r} is no name for a run" in said(opened.error)
        assert not listed()


def test_a_form_that_lacks_something_says_so_and_queues_nothing(queue):
    opened = screen("jobs", verb="compare-maps")
    run_button(opened).click().run()
    assert len(opened.error) == 1
    assert not listed()


def test_a_job_is_shown_cancelled_and_gone_on_with(queue):
    job = waiting_at_work(queue)
    opened = screen("jobs")
    assert "**wait** · running" in said(opened.markdown)
    assert "workbench wait" in [one.value for one in opened.code]
    queue.cancel(job.id)
    assert ended(job) == "cancelled"
    opened.run()
    assert "**wait** · cancelled" in said(opened.markdown)
    opened.button(key=f"again-{job.id}").click().run()
    assert not opened.exception
    again, first = listed()
    assert (again.words, first.id) == (job.words, job.id)
    assert opened.query_params["job"] == again.id
    until(lambda: again.progress() is not None)
    opened.run()
    opened.button(key=f"cancel-{again.id}").click().run()
    assert ended(again) == "cancelled"


def test_a_job_that_failed_shows_its_log(queue):
    job = queue.add(["fail"])
    ended(job)
    opened = screen("jobs")
    assert "**fail** · failed" in said(opened.markdown)
    assert "It cannot be done." in said(opened.code)
    assert opened.button(key=f"again-{job.id}")


def test_a_real_verb_runs_as_a_job(explorer, results):
    job = Jobs().add(["find-neurons", f"--map={results / 'map'}", "-n", "3", "--", "dog"])
    assert ended(job) == "done", job.log()
    assert "·Dog" in job.out()
    failed = Jobs().add(["find-neurons", "--map=nowhere", "--", "dog"])
    assert ended(failed) == "failed"
    assert "workbench: " in failed.log()
