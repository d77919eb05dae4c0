"""Seconds of the self-check on the embedded model, beside one forward pass of the same machine.

    python tests/benchmarks/self_check.py [--dtype bfloat16] [--device cuda]

Prints one JSON object. Bounds: all identities at all layers in under 3 s; what `wb.load` runs in under 0.5 s.
"""

import argparse
import json
import statistics

import torch
from measuring import seconds

import workbench as wb
from workbench.checks.check import probe
from workbench.verification import verify, verify_briefly

ROUNDS = 7


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = wb.load(dtype=getattr(torch, options.dtype), device=options.device)
    batch = probe(model)
    works = {
        "one forward pass of the probe (2 rows of 7 tokens)": lambda: model.forward(batch),
        "verify_briefly, as wb.load runs it": lambda: verify_briefly(model),
        "verify: all identities, all layers": lambda: verify(model),
    }
    for work in works.values():
        work()
    times = seconds(works, ROUNDS)
    plain = statistics.median(next(iter(times.values())))
    table = [
        {
            "work": name,
            "median_seconds": round(statistics.median(found), 3),
            "min_seconds": round(min(found), 3),
            "relative": round(statistics.median(found) / plain, 1),
        }
        for name, found in times.items()
    ]
    settings = {"model": model.name, "dtype": options.dtype, "device": options.device, "checks": len(verify(model).table)}
    print(json.dumps(settings | {"table": table}, indent=1))


if __name__ == "__main__":
    main()
