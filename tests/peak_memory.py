"""The most memory that capturing to a store takes, for a corpus and for one of ten times its length.

    python tests/peak_memory.py [--tokens 50000]

Each runs in a process of its own, forked from one that has torch imported, on a tiny random llama. Prints one JSON object:
peak resident bytes of both, and of a third one that streams the longer corpus and keeps what it is given.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
SITES = ["resid_post", "mlp_post"]


def peak(corpus: Path, out: Path, keep: bool, answer) -> None:
    import torch
    from families import tiny_hf, tiny_tokenizer

    import workbench as wb

    torch.set_num_threads(1)
    model = wb.load(tiny_hf("llama"), tokenizer=tiny_tokenizer(), check=False)
    if keep:
        kept = list(wb.stream(model, corpus, SITES, progress=False))
        assert kept
    else:
        wb.capture_to_store(model, corpus, SITES, out, dtype="float32", shard_tokens=5_000, progress=False)
    status = Path("/proc/self/status").read_text()
    answer.put(1024 * int(status.split("VmHWM:")[1].split()[0]))


def main(tokens: int) -> dict[str, int]:
    PROCESSES.set_forkserver_preload(
        ["torch", "transformers", "pandas", "pyarrow.parquet", "workbench.store.write", "families"]
    )
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, times, keep in (("once", 1, False), ("ten_times", 10, False), ("ten_times_kept", 10, True)):
            corpus, answer = Path(folder, f"{name}.jsonl"), PROCESSES.Queue()
            line = json.dumps({"text": "abcdefghi dog"}) + "\n"  # 10 tokens: the shorter corpus fills a window of rows too
            corpus.write_text(line * (tokens * times // 10))
            job = PROCESSES.Process(target=peak, args=(corpus, Path(folder, name), keep, answer))
            job.start()
            found[f"{name}_bytes"] = answer.get(timeout=600)
            job.join()
    return found


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=50_000)
    print(json.dumps(main(parser.parse_args().tokens)))
