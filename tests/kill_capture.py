"""Kill `workbench capture` at random moments, let it go on, and compare what it wrote with an uninterrupted run.

    python tests/kill_capture.py [--kills 60] [--model MODEL] [--each-phase]

Each round begins an empty folder, kills the job with SIGKILL once or twice, and then lets it end. Half of the kills come after
a random part of its time (mostly counted from its first write), half before a random one of its operations on files, so that
short phases are met too. --each-phase makes five chosen kills in one folder instead. Prints one JSON object; exit code 1 if a
byte of the store differs. Without --model it takes a tiny random llama.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

JOBS = multiprocessing.get_context("forkserver")
"""Each job is a process of its own, forked from one that has torch imported: importing it anew takes seconds."""
PRELOADED = ["torch", "transformers", "pandas", "pyarrow.parquet", "workbench.loading", "workbench.verification",
             "workbench.cli", "workbench.store.write"]  # fmt: skip

CHOSEN = [
    ("open", "corpus.txt"),
    ("os.rename", "shard-00001.safetensors"),
    ("os.rename", "shard-00002.json"),
    ("os.rename", "tokens.parquet"),
    ("os.remove", "job.json"),
]
"""An operation and a file of each phase: counting, writing twice, merging, clearing."""

# What a killed job leaves behind (the semaphore of its progress bar) is nothing to warn of here.
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"


class Task(NamedTuple):
    """A capture, whoever does it."""

    model: str
    corpus: Path
    tokens: int

    def started(self, out: Path, die_before: Any = None, operations: Any = None) -> BaseProcess:
        """In a process that kills itself before an operation on files: the n-th, or one that CHOSEN has."""
        job = JOBS.Process(target=capture, args=(self, out, die_before, operations))
        job.start()
        return job

    def ended(self, out: Path) -> None:
        finish(self.started(out))


def capture(task: Task, out: Path, die_before: Any, operations: Any) -> None:
    import torch

    from workbench.cli import main

    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "WORKBENCH_RUNS": ""}
    arguments = [
        "capture", "--model", task.model, "--corpus", task.corpus, "--sites", "resid_post,mlp_post.1", "--max-tokens",
        task.tokens, "--length", 64, "--batch-tokens", 256, "--shard-tokens", 700, "--out", out, "--json",
    ]  # fmt: skip
    sys.argv = ["workbench", *map(str, arguments)]
    watch(out, die_before, operations)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        main()


def watch(out: Path, die_before: Any, operations: Any) -> None:
    """Count the operations on the folder and on the corpus beside it, and die before the one that was named."""
    here = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in here or not isinstance(args[0], (str, Path)):
            return
        path = Path(args[1] if event == "os.rename" else args[0])
        if path.is_absolute() and out.parent not in path.parents:
            return
        seen += 1
        if operations is not None:
            operations.value = seen
        if die_before in (seen, (event, path.name)):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def finish(job: BaseProcess) -> None:
    job.join(600)
    if job.exitcode != 0:
        raise SystemExit(f"a job that was not killed ended with {job.exitcode}")


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the store; run.json holds times, and the lock is empty."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.json", ".lock")
    }


def phase(out: Path) -> str:
    """What the job was at, by what it left."""
    if (out / "index.json").is_file():
        return "clearing"
    if not (out / ".job" / "job.json").is_file():
        return "counting"
    return "merging" if list(out.glob(".tokens.parquet.*")) else "writing"


def began(job: BaseProcess, out: Path) -> None:
    """Wait until the job writes, or has ended."""
    while job.is_alive() and not (out / ".job" / "job.json").is_file():
        time.sleep(0.01)


def kills(task: Task, out: Path, wanted: list[Any], seconds: float, rng: random.Random) -> Counter[str]:
    """Each before an operation, or None for a moment in time; what the job was at. One that ends before it was killed counts
    for nothing."""
    found: Counter[str] = Counter()
    for die_before in wanted:
        job = task.started(out, die_before)
        if die_before is None:
            if rng.random() < 0.85:
                began(job, out)
            time.sleep(rng.random() * seconds)
            job.kill()
        job.join()
        if job.exitcode == -signal.SIGKILL:
            found[phase(out)] += 1
        else:
            finish(job)
    return found


def main(wanted: int, model: str | None, tokens: int, seed: int, each_phase: bool) -> dict[str, Any]:
    JOBS.set_forkserver_preload(PRELOADED)
    rng, work = random.Random(seed), Path(tempfile.mkdtemp())
    task = Task(str(work / "model") if model is None else model, work / "corpus.txt", tokens)
    making = JOBS.Process(target=make, args=(work, model is None))
    making.start()
    finish(making)
    operations = JOBS.Value("i", 0)
    job = task.started(work / "whole", operations=operations)
    began(job, work / "whole")
    started = time.perf_counter()
    finish(job)
    seconds, whole = time.perf_counter() - started, fingerprint(work / "whole")
    killed, rounds, differing = Counter(), 0, []
    while killed.total() < wanted:
        out = work / f"round-{rounds}"
        rounds += 1
        some = [rng.choice([None, rng.randint(1, operations.value)]) for _ in range(rng.choice([1, 1, 2]))]
        killed += kills(task, out, CHOSEN if each_phase else some, seconds, rng)
        task.ended(out)
        found = fingerprint(out)
        differing += [f"{out.name}/{name}" for name in {*found, *whole} if found.get(name) != whole.get(name)]
        shutil.rmtree(out)
    shutil.rmtree(work)
    return {
        "kills": killed.total(), "killed_while": dict(killed), "rounds": rounds, "files": len(whole), "differing": differing,
    }  # fmt: skip


def make(work: Path, model: bool) -> None:
    """The corpus: some documents of a shipped one, as to tokenise the whole of it would take most of the time. And a model."""
    from families import tiny_hf, tiny_tokenizer

    import workbench as wb

    documents = [document.text for document, _ in zip(wb.Corpus("wordnet").documents(), range(2_000), strict=False)]
    (work / "corpus.txt").write_text("\n\n".join(text.replace("\n\n", "\n") for text in documents))
    if model:
        tiny_hf("llama").save_pretrained(work / "model")
        tiny_tokenizer().save_pretrained(work / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each-phase", action="store_true")
    options = parser.parse_args()
    if options.each_phase:
        options.kills, options.tokens = len(CHOSEN), 3_000
    answer = main(options.kills, options.model, options.tokens, options.seed, options.each_phase)
    print(json.dumps(answer))
    sys.exit(bool(answer["differing"]))
