"""Long work: verbs of the command line, each in a process of its own, one at a time, with its log on disk.

A job is a folder of the app's: job.json, log.txt (stderr) and out.txt (stdout). What it makes lies in the runs folder. A job
that was stopped goes on where it was when the same command is given again, as the verbs do.
"""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from app.places import own_folder
from app.worker import progress_of
from workbench.artifacts import read_json, write_json
from workbench.errors import BadArtifact, CannotWrite

PROGRAM = "from workbench.cli import main; main()"
PATIENCE = 15.0
"""Seconds that a cancelled job has to end by itself."""
TAIL = 6000
"""Bytes of a log that are read for progress, and shown."""
ENDED = ("done", "failed", "cancelled", "stopped")
"""The last: with the app."""


@dataclass
class Job:
    """One command, and what became of it: waiting, running, ending (cancelled, not yet at its end), or one of `ENDED`."""

    id: str
    words: list[str]
    state: str
    made: str
    ended: str | None = None
    server: int = 0
    """The process of the app in whose queue it is: several apps may keep their jobs in one place."""

    @property
    def folder(self) -> Path:
        return own_folder("jobs") / self.id

    @property
    def line(self) -> str:
        """As one types it."""
        return shlex.join(["workbench", *self.words])

    def log(self) -> str:
        """The end of what it said, each line as it stood last: a progress bar is one line."""
        return "\n".join(line.rsplit("\r", 1)[-1] for line in _tail(self.folder / "log.txt").split("\n"))

    def out(self) -> str:
        """The end of what it printed."""
        return _tail(self.folder / "out.txt")

    def progress(self) -> tuple[str, float] | None:
        """What it is at, and the share that is done, where it says so."""
        lines = _tail(self.folder / "log.txt").replace("\r", "\n").split("\n")
        return next((found for line in reversed(lines) if (found := progress_of(line))), None)

    def keep(self) -> None:
        (folder := self.folder).mkdir(parents=True, exist_ok=True)
        write_json(folder / "job.json", asdict(self))


class Jobs:
    """The queue. There is one, for all browser tabs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[Job] = deque()
        self._there = threading.Semaphore(0)
        self._running: tuple[Job, subprocess.Popen[bytes]] | None = None
        for job in listed():
            if job.state not in ENDED and not _alive(job.server):
                job.state = "stopped"
                job.keep()
        atexit.register(self._stop)
        threading.Thread(target=self._work, daemon=True).start()

    def add(self, words: list[str]) -> Job:
        """Put a command into the queue."""
        now = datetime.now(UTC)
        name = f"{now:%Y%m%d-%H%M%S-%f}-{words[0]}-{os.urandom(2).hex()}"  # by which they are put in order
        job = Job(name, words, "waiting", now.isoformat(timespec="seconds"), server=os.getpid())
        job.keep()
        with self._lock:
            self._queue.append(job)
        self._there.release()
        return job

    def cancel(self, job_id: str) -> bool:
        """Whether there was anything to cancel: one that another tab has cancelled, or that has ended, is left as it is."""
        with self._lock:
            for job in self._queue:
                if job.id == job_id and job.state == "waiting":
                    return self._end(job, "cancelled")
            if self._running is None or self._running[0].id != job_id or self._running[0].state == "ending":
                return False
            job, process = self._running
            job.state = "ending"
            job.keep()
            process.send_signal(signal.SIGINT)
        threading.Thread(target=_insist, args=(process,), daemon=True).start()
        return True

    def _work(self) -> None:
        while True:
            self._there.acquire()
            with self._lock:
                job = self._queue.popleft()
                if job.state != "waiting":
                    continue
                try:
                    job.state = "running"
                    job.keep()
                    process = _started(job)
                except (OSError, CannotWrite):  # its folder is gone, or there is no room for a process
                    self._end(job, "failed")
                    continue
                self._running = job, process
            code = process.wait()
            with self._lock:
                self._running = None
                self._end(job, "cancelled" if job.state == "ending" else "done" if code == 0 else "failed")

    def _end(self, job: Job, state: str) -> bool:
        job.state, job.ended = state, datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError, CannotWrite):  # the queue goes on
            job.keep()
        return True

    def _stop(self) -> None:
        if self._running is not None:
            self._running[1].send_signal(signal.SIGINT)


def listed() -> list[Job]:
    """All jobs on disk, the newest first; a folder that holds none is passed over."""
    found = []
    for folder in sorted(own_folder("jobs").iterdir(), reverse=True):
        try:
            found.append(Job(**read_json(folder / "job.json")))
        except (BadArtifact, TypeError):
            continue
    return found


def _started(job: Job) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, *job.words]
    with (job.folder / "log.txt").open("wb") as log, (job.folder / "out.txt").open("wb") as out:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, start_new_session=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return pid > 0


def _insist(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def _tail(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - TAIL))
            return opened.read().decode("utf-8", "replace")
    except OSError:
        return ""
