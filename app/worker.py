"""The page's side of the process that holds the model: requests wait in a line, are answered once, and can be cancelled.

There is one worker, for all browser tabs. Equal requests are one request, and the last answers are kept: a page that is drawn
again asks for nothing.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from contextlib import suppress
from typing import Any

from app.places import written

KEPT_BYTES = 15_000_000
"""Of answers, as JSON: as Python's lists they take about six times as much."""
PATIENCE = 5.0
"""Seconds that a cancelled request has to end by itself; then its process is ended, and the model with it."""
COMMAND = (sys.executable, "-m", "app.worker_process")
QUIET = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""For the process. Threads that spin while they wait take the page's and the browser's cores: a lens then takes half as long
again (two cores)."""
BEGUN = '"begun"\n'
"""What the process says before its answer."""
PROGRESS = re.compile(r"^(?P<what>[^:|]*?):?\s*(?P<share>\d+)%\|")
"""A line of tqdm's."""


class Asked:
    """A request, and what became of it."""

    def __init__(self, task: str, arguments: dict[str, Any], key: str):
        self.task, self.arguments, self.key = task, arguments, key
        self.done = threading.Event()
        self.answer: dict[str, Any] | None = None
        self.error: tuple[str, str] | None = None
        """Its kind (`Cancelled`, `WorkerDied`, or a named error's) and its text."""
        self.cancelled = False
        self.progress: tuple[str, float] | None = None
        self.since = time.monotonic()

    def end(self, answer: dict[str, Any] | None = None, error: tuple[str, str] | None = None) -> None:
        self.answer, self.error = answer, error
        self.done.set()


class Worker:
    """Starts the process when it is first asked, and again when it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Asked] = deque()
        self._asked = threading.Semaphore(0)
        self._known: OrderedDict[str, Asked] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._process: subprocess.Popen[str] | None = None
        self.current: Asked | None = None
        self._begun = False
        """Whether the process has the current request in hand, and hears a cancel."""
        self.model: dict[str, Any] | None = None
        """What the process said last of the model that it holds; None: none."""
        self.log: deque[str] = deque(maxlen=200)
        atexit.register(self.stop)
        threading.Thread(target=self._feed, daemon=True).start()

    def ask(self, task: str, **arguments: Any) -> Asked:
        """The request: a new one in the line, one that is waiting, or one that was answered before."""
        # With the times of the runs that are named: one that was made again is asked again.
        key = json.dumps([task, arguments, [written(one) for one in arguments.values()]], sort_keys=True)
        with self._lock:
            known = self._known.get(key)
            if known is not None and known.error is None:
                self._known.move_to_end(key)
                return known
            asked = self._known[key] = Asked(task, arguments, key)
            self._waiting.append(asked)
        self._asked.release()
        return asked

    def cancel(self, asked: Asked) -> bool:
        """Whether there was anything to cancel: a second cancel, or one that comes too late, does nothing."""
        with self._lock:
            if asked.done.is_set() or asked.cancelled:
                return False
            asked.cancelled = True
            if asked is not self.current:
                asked.end(error=_CANCELLED)
                return True
            if self._begun:  # else it would not be heard, and is said as soon as it would
                self._signal(signal.SIGINT)
        threading.Thread(target=self._insist, args=(asked,), daemon=True).start()
        return True

    def stop(self) -> None:
        """End the process: the model's memory is free again."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._waiting)

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    # ---- the thread that feeds the process

    def _feed(self) -> None:
        while True:
            self._asked.acquire()
            with self._lock:
                asked = self._waiting.popleft()
                if asked.done.is_set():
                    continue
                self.current, self._begun = asked, False
            answer, error = self._answered(asked)
            with self._lock:
                self.current = None
                asked.end(answer, error)
                self._let_go()

    def _answered(self, asked: Asked) -> tuple[dict[str, Any] | None, tuple[str, str] | None]:
        try:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps({"task": asked.task, "arguments": asked.arguments}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if line == BEGUN:
                with self._lock:
                    self._begun = True
                    if asked.cancelled:
                        self._signal(signal.SIGINT)
                line = process.stdout.readline()
        except (OSError, ValueError):
            line = ""
        if not line.endswith("\n"):
            died = self._died()  # waits for its end: else the next request would be sent to it
            return None, _CANCELLED if asked.cancelled else died
        reply = json.loads(line)
        if "answer" not in reply:
            return None, _CANCELLED if "cancelled" in reply else (reply["error"], reply["text"])
        self.model = reply["model"]
        self._sizes[asked.key] = len(line)
        return reply["answer"], None

    def _running(self) -> subprocess.Popen[str]:
        if self.pid is None:
            self.model = None
            if self._process is not None:
                _close(self._process)
            process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
                errors="replace", start_new_session=True, env=QUIET | os.environ,
            )  # fmt: skip
            threading.Thread(target=self._hear, args=(process,), daemon=True).start()
            self._process = process
        assert self._process is not None
        return self._process

    def _died(self) -> tuple[str, str]:
        process, self.model = self._process, None
        code = None if process is None else process.wait()
        why = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        memory = " Memory may have run out." if code == -signal.SIGKILL else ""
        return (
            "WorkerDied",
            f"The process that holds the model was ended {why}.{memory} Nothing on disk is harmed. Ask again: it starts anew "
            "and loads the model.",
        )

    def _hear(self, process: subprocess.Popen[str]) -> None:
        """Its log, and how far it is."""
        assert process.stderr is not None
        line = ""
        with process.stderr as said:
            while letter := said.read(1):
                if letter not in "\r\n":
                    line += letter
                    continue
                if found := progress_of(line):
                    if self.current is not None:
                        self.current.progress = found
                elif line.strip():
                    self.log.append(line)
                line = ""

    def _insist(self, asked: Asked) -> None:
        if not asked.done.wait(PATIENCE):
            self.stop()

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _let_go(self) -> None:
        """Of the oldest answers, and of all that ended in an error."""
        for key in [key for key, one in self._known.items() if one.error is not None]:
            del self._known[key]
        answered = [key for key, one in self._known.items() if one.answer is not None]
        for key in answered[:-1]:  # what waits is not let go: it would be asked twice
            if sum(self._sizes.values()) <= KEPT_BYTES:
                break
            del self._known[key]
            self._sizes.pop(key, None)


def _close(process: subprocess.Popen[str]) -> None:
    """The pipes to one that has ended; what it said is read to its end by `_hear`."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def progress_of(line: str) -> tuple[str, float] | None:
    """What a line of tqdm's says: what is done, and the share that is."""
    found = PROGRESS.match(line.strip())
    return (found["what"], int(found["share"]) / 100) if found else None


_CANCELLED = ("Cancelled", "Cancelled.")
