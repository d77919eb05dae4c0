"""Kill `workbench capture` at random moments, let it go on, and compare what it wrote with an uninterrupted run.

    python tests/kill_capture.py [--kills 60] [--model MODEL]

Each round begins an empty folder, kills the job with SIGKILL after a random part of its time (mostly counted from its first
write), sometimes twice, and then lets it end. Prints one JSON object; exit code 1 if a byte of the store differs. Without
--model it takes a tiny random llama.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path

JOBS = multiprocessing.get_context("forkserver")
"""Each job is a process of its own, forked from one that has torch imported: importing it anew takes seconds."""


def start(model: str, out: Path, tokens: int) -> BaseProcess:
    JOBS.set_forkserver_preload(["torch", "transformers", "workbench.loading", "workbench.cli", "workbench.store.write"])
    job = JOBS.Process(target=capture, args=(model, str(out), tokens))
    job.start()
    return job


# What a killed job leaves behind (the semaphore of its progress bar) is nothing to warn of here.
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"


def capture(model: str, out: str, tokens: int) -> None:
    import torch

    from workbench.cli import main

    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "WORKBENCH_RUNS": ""}
    arguments = [
        "capture", "--model", model, "--corpus", "handbook", "--sites", "resid_post,mlp_post.1", "--max-tokens", tokens,
        "--length", 64, "--batch-tokens", 256, "--shard-tokens", 700, "--out", out, "--json",
    ]  # fmt: skip
    sys.argv = ["workbench", *map(str, arguments)]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        main()


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


def began(job: BaseProcess, out: Path) -> None:
    """Wait until the job writes, or has ended."""
    while job.is_alive() and not (out / ".job" / "job.json").is_file():
        time.sleep(0.01)


def main(kills: int, model: str | None, tokens: int, seed: int) -> dict:
    rng, work = random.Random(seed), Path(tempfile.mkdtemp())
    model = tiny_model(work / "model") if model is None else model
    job = start(model, work / "whole", tokens)
    began(job, work / "whole")
    started = time.perf_counter()
    finish(job)
    seconds, whole = time.perf_counter() - started, fingerprint(work / "whole")
    killed = rounds = finished_at_kill = 0
    shards: list[int] = []
    differing: list[str] = []
    while killed < kills:
        out = work / f"round-{rounds}"
        rounds += 1
        for _ in range(rng.choice([1, 1, 2])):
            job = start(model, out, tokens)
            if rng.random() < 0.85:
                began(job, out)
            time.sleep(rng.random() * seconds)
            if job.is_alive():
                job.kill()
                job.join()
                killed += 1
                shards.append(len(list(out.glob("shard-*"))))
            else:
                finish(job)
                finished_at_kill += 1
        finish(start(model, out, tokens))
        found = fingerprint(out)
        differing += [f"{out.name}/{name}" for name in {*found, *whole} if found.get(name) != whole.get(name)]
        shutil.rmtree(out)
    shutil.rmtree(work)
    return {
        "kills": killed, "rounds": rounds, "ended_before_the_kill": finished_at_kill, "files": len(whole),
        "finished_shards_when_killed": shards, "differing": differing,
    }  # fmt: skip


def tiny_model(folder: Path) -> str:
    from families import tiny_hf, tiny_tokenizer

    tiny_hf("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = main(options.kills, options.model, options.tokens, options.seed)
    print(json.dumps(found))
    sys.exit(bool(found["differing"]))
