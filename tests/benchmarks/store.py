"""What it costs to stream activations and to write them to disk, beside the model's body alone and the disk alone, in one run.

    python tests/benchmarks/store.py [--device cuda --shape llama-8b --dtype bfloat16 --tokens 65536] [--folder DIR]

Prints one JSON object. Site: resid_post of all layers, in bfloat16; rows of 512 tokens, packed. Ratios are to the body alone,
medians of rounds in which the variants take turns. `of_the_bound` is the speed of writing a store, as a share of the slower of
the body alone and the disk alone (the same bytes from memory to 64 files, eight threads, synced).
"""

import json
import os
import shutil
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measuring import ratio, seconds
from models import loaded, options, run_body

import workbench as wb
from workbench.streaming.plan import peak_memory

SITE, FILES = "resid_post", 64


@torch.no_grad()
def main() -> None:
    chosen = options(tokens=8192, batch_tokens=None, rounds=5, folder="")
    model = loaded(chosen.shape, chosen.device, chosen.dtype)
    corpus = wb.Corpus("handbook", length=512, packed=True, bos="never", max_tokens=chosen.tokens)
    own = {"batch_tokens": chosen.batch_tokens, "massive_at": None}
    flow = wb.stream(model, corpus, SITE, dtype=torch.bfloat16, device="cpu", progress=False, **own)
    work = Path(tempfile.mkdtemp(dir=chosen.folder or None))
    written = chosen.tokens * flow.bytes_per_token

    def body():
        run_body(model, corpus, flow.batch_tokens)

    def streamed():
        for _ in flow:
            pass

    def stored():
        wb.capture_to_store(model, corpus, SITE, work / "store", progress=False, **own)

    block = os.urandom(1 << 20) * 64

    def disk():
        size = -(-written // FILES)

        def write(number):
            with (work / "store" / f"{number}").open("wb", buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                for at in range(0, size, len(block)):
                    file.write(memoryview(block)[: size - at])
                os.fsync(file.fileno())

        with ThreadPoolExecutor(8) as threads:
            (work / "store").mkdir()
            list(threads.map(write, range(FILES)))

    def tidy():
        shutil.rmtree(work / "store", ignore_errors=True)

    variants = {
        "body alone": body, "wb.stream, kept on the host": streamed, "wb.capture_to_store": stored, "disk alone": disk,
    }  # fmt: skip
    for run in variants.values():
        tidy()
        run()
    times = seconds(variants, chosen.rounds, tidy)
    shutil.rmtree(work)
    table = [
        {
            "variant": name, "seconds": round(statistics.median(found), 3),
            "tokens_per_second": round(chosen.tokens / statistics.median(found)),
            "ratio_to_body": ratio(found, times["body alone"]),
        }
        for name, found in times.items()
    ]  # fmt: skip
    bound = [max(pair) for pair in zip(times["body alone"], times["disk alone"], strict=True)]
    settings = vars(chosen) | {"weights": model.name, "written_gb": round(written / 1e9, 3), "torch": torch.__version__}
    print(
        json.dumps(
            {
                "benchmark": "store", "settings": settings, "table": table,
                "disk_gb_per_second": round(written / statistics.median(times["disk alone"]) / 1e9, 2),
                "of_the_bound": ratio(bound, times["wb.capture_to_store"]),
                                "peak_memory_gb": round(peak_memory(model.device) / 1e9, 2),
            },
            indent=2,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
