"""The page's side of the worker, with the real process and tasks that wait, fail and die when they are told to."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

import app
from app import worker as module
from app.worker import Worker, progress_of

TASKS = """
import os, signal, sys, time, types

sys.path.insert(0, {root!r})
from workbench.errors import UnknownOption

tasks = types.ModuleType("app.tasks")
counted = []


def count(**asked):
    counted.append(asked)
    return {{"n": len(counted), "pid": os.getpid()}}


def wait(name="", deaf=False):
    if deaf:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("Waiting:  25%|##        | 1/4", file=sys.stderr, flush=True)
    while True:
        time.sleep(0.01)


def refuse():
    raise UnknownOption("There is no such thing. Choose another.")


def fault():
    return 1 / 0


def chatter():
    print("a line that is no answer")
    os.system("echo another")
    return {{"said": "it"}}


def text(name, size):
    return {{"text": name * size}}


tasks.TASKS = {{one.__name__: one for one in (count, wait, refuse, fault, chatter, text)}}
tasks.held = lambda: {{"asked": "a model"}}
sys.modules["app.tasks"] = tasks

from app.worker_process import main

main()
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    script = tmp_path / "process.py"
    script.write_text(TASKS.format(root=str(Path(app.__file__).parents[1])))
    monkeypatch.setattr(module, "COMMAND", (sys.executable, str(script)))
    started = Worker()
    yield started
    started.stop()


def until(condition):
    """Waits for what another thread or process does; a minute is for ever."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def answer(asked):
    assert asked.done.wait(60)
    assert asked.error is None, asked.error
    return asked.answer


def error(asked):
    assert asked.done.wait(60)
    assert asked.answer is None
    return asked.error


def at_work(worker, **options):
    """A request in the middle of its work."""
    asked = worker.ask("wait", **options)
    until(lambda: asked.progress is not None)
    return asked


def test_equal_requests_are_one_and_others_are_not(worker):
    one = worker.ask("count", model={"name": "a", "dtype": None})
    two = worker.ask("count", model={"dtype": None, "name": "a"})
    assert one is two
    assert answer(one)["n"] == 1
    assert worker.ask("count", model={"name": "a", "dtype": None}) is one
    assert answer(worker.ask("count", model={"name": "b", "dtype": None}))["n"] == 2
    assert worker.model == {"asked": "a model"}


def test_requests_wait_in_a_line_and_all_are_answered(worker):
    asked = [worker.ask("count", place=i) for i in range(20)]
    assert [answer(one)["n"] for one in asked] == [*range(1, 21)]
    assert worker.waiting == 0


def test_a_request_that_waits_is_cancelled_and_the_one_at_work_is_not(worker):
    first = at_work(worker)
    second, third = worker.ask("count", place=2), worker.ask("count", place=3)
    until(lambda: worker.waiting == 2)
    assert worker.cancel(second) is True
    assert error(second) == ("Cancelled", "Cancelled.")
    assert worker.cancel(second) is False
    assert not first.done.is_set()
    worker.cancel(first)
    assert answer(third)["n"] == 1


def test_a_request_at_work_is_cancelled_and_its_process_lives(worker):
    before = answer(worker.ask("count"))["pid"]
    asked = at_work(worker)
    assert asked.progress == ("Waiting", 0.25)
    assert worker.cancel(asked) is True
    assert worker.cancel(asked) is False
    assert error(asked) == ("Cancelled", "Cancelled.")
    assert worker.cancel(asked) is False
    after = answer(worker.ask("count", again=True))
    assert after == {"n": 2, "pid": before}


def test_many_cancels_at_once_are_one(worker):
    asked = at_work(worker)
    assert [worker.cancel(asked) for _ in range(5)] == [True, False, False, False, False]
    assert error(asked)[0] == "Cancelled"
    assert answer(worker.ask("count"))["n"] == 1


def test_what_was_cancelled_can_be_asked_again(worker):
    asked = at_work(worker)
    worker.cancel(asked)
    error(asked)
    again = at_work(worker)
    assert again is not asked
    worker.cancel(again)
    assert error(again)[0] == "Cancelled"


def test_one_that_does_not_hear_a_cancel_is_ended_with_its_process(worker, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    pids = {answer(worker.ask("count"))["pid"]}
    for again in range(3):  # the next request is never sent to a process that is about to end
        asked = at_work(worker, deaf=True)
        assert worker.cancel(asked) is True
        assert error(asked) == ("Cancelled", "Cancelled.")
        after = answer(worker.ask("count", again=again))
        assert after["n"] == 1
        pids.add(after["pid"])
    assert len(pids) == 4


def test_a_process_that_is_killed_says_so_and_the_next_request_starts_another(worker):
    asked, waiting = at_work(worker), worker.ask("count")
    os.kill(worker.pid, signal.SIGKILL)
    kind, text = error(asked)
    assert kind == "WorkerDied"
    assert "by signal 9" in text
    assert "Memory may have run out" in text
    assert "Ask again" in text
    assert answer(waiting)["n"] == 1


def test_a_process_that_died_while_nothing_was_asked_is_not_missed(worker):
    before = answer(worker.ask("count"))["pid"]
    os.kill(before, signal.SIGKILL)
    until(lambda: worker.pid is None)
    assert answer(worker.ask("count", again=True))["pid"] != before


def test_a_named_error_arrives_and_is_not_kept(worker):
    asked = worker.ask("refuse")
    assert error(asked) == ("UnknownOption", "There is no such thing. Choose another.")
    assert worker.ask("refuse") is not asked


def test_a_fault_of_ours_is_told_apart_and_its_traceback_is_in_the_log(worker):
    kind, text = error(worker.ask("fault"))
    assert kind == "ZeroDivisionError"
    assert "a fault of the workbench" in text
    until(lambda: any("return 1 / 0" in line for line in worker.log))
    assert answer(worker.ask("count"))["n"] == 1


def test_a_task_that_is_not_there_is_an_error(worker):
    kind, text = error(worker.ask("nothing_such"))
    assert (kind, "nothing_such" in text) == ("KeyError", True)


def test_what_a_task_prints_is_no_answer(worker):
    assert answer(worker.ask("chatter")) == {"said": "it"}
    until(lambda: {"a line that is no answer", "another"} <= set(worker.log))


@pytest.mark.parametrize("text", ["ä\n\r\u2028 \x85 \"'</script>", "\ud83d", "𝄞"])
def test_any_letters_come_and_go(worker, text):
    assert answer(worker.ask("text", name=text, size=2)) == {"text": 2 * text}


def test_answers_are_kept_until_they_take_too_much(worker, monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 2500)
    kept = {name: worker.ask("text", name=name, size=1000) for name in "abcd"}
    for one in kept.values():
        answer(one)
    again = {name: worker.ask("text", name=name, size=1000) for name in "dcba"}
    assert [name for name in "abcd" if again[name] is kept[name]] == ["c", "d"]


def test_an_answer_larger_than_all_that_is_kept_is_still_given(worker, monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 10)
    asked = worker.ask("text", name="a", size=1000)
    assert answer(asked)["text"] == 1000 * "a"
    assert worker.ask("text", name="a", size=1000) is asked


def test_what_waits_is_not_let_go_though_answers_are(worker, monkeypatch):
    """A page that is drawn again asks for the first request anew: the one that waits is then the older of the two."""
    monkeypatch.setattr(module, "KEPT_BYTES", 10)
    stopped = at_work(worker)
    first, second = worker.ask("text", name="a", size=1000), worker.ask("wait", name="second")
    assert worker.ask("text", name="a", size=1000) is first
    worker.cancel(stopped)
    answer(first)
    assert worker.ask("wait", name="second") is second
    worker.cancel(second)
    assert error(second)[0] == "Cancelled"


def test_two_tabs_ask_and_cancel_at_once_and_nothing_is_left(worker):
    asked = at_work(worker)
    others = [worker.ask("count", place=i) for i in range(10)]
    worker.cancel(asked)
    for one in others[::2]:
        worker.cancel(one)
    for one in (asked, *others):
        assert one.done.wait(60)
    assert all(one.answer is not None or one.error == ("Cancelled", "Cancelled.") for one in others)
    assert all(one.answer is not None for one in others[1::2])
    until(lambda: worker.current is None and worker.waiting == 0)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("Reading:  42%|████▏     | 42/100 [00:01<00:01]", ("Reading", 0.42)),
        (" 100%|██████████| 3/3", ("", 1.0)),
        ("layer 3:   0%|          | 0/30", ("layer 3", 0.0)),
        ("Written to out/map.", None),
        ("50% of neurons", None),
        ("", None),
    ],
)
def test_progress_is_read_from_the_lines_of_bars(line, found):
    assert progress_of(line) == found
