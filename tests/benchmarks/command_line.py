"""Whole-process seconds of commands that should feel instant: help, an import, and a search of a 460,000-neuron map.

    python tests/benchmarks/command_line.py

Prints one JSON object. The map is generated: 458,752 neurons (the up side of an 8B model), 10 tokens each, 128,256 words.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.analyses import neuron_folder

LAYERS, NEURONS, K, TOKENS = 32, 14_336, 10, 128_256
ROUNDS = 7


LOAD = f"""
import statistics, time
import workbench as wb
wb.load()
times = []
for _ in range({ROUNDS}):
    started = time.perf_counter()
    wb.load()
    times.append(time.perf_counter() - started)
print(statistics.median(times))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_map(Path(folder))
        cli = [sys.executable, "-c", "from workbench.cli import main; main()"]
        commands = {
            "python, doing nothing": [sys.executable, "-c", "pass"],
            "import workbench": [sys.executable, "-c", "import workbench"],
            "workbench --help": [*cli, "--help"],
            "scan, the embedded model": [*cli, "scan", "--prompt", "The capital of France is"],
            "find-neurons, folded": [*cli, "find-neurons", "word77", "--map", folder],
            "find-neurons, exact, --json": [*cli, "find-neurons", " word77", "--exact", "--map", folder, "--json"],
            "find-neurons, regex": [*cli, "find-neurons", "^ word77[0-9]$", "--regex", "--map", folder],
        }
        table = []
        for name, command in commands.items():
            times = []
            for _ in range(ROUNDS):
                started = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                times.append(time.perf_counter() - started)
            table.append(
                {"command": name, "median_seconds": round(statistics.median(times), 3), "min_seconds": round(min(times), 3)}
            )
        seconds = float(subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, text=True).stdout)
        table.append(
            {"command": "second wb.load(), libraries imported, self-check included", "median_seconds": round(seconds, 3)}
        )
        print(json.dumps({"benchmark": "command line", "neurons": LAYERS * NEURONS, "table": table}, indent=2))


def write_map(folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = LAYERS * NEURONS * K
    ids = (TOKENS * rng.random(rows) ** 3).astype(np.int32)  # some tokens are everyone's
    words = np.array([f"{' ' * (i % 2)}word{i // 2}" for i in range(TOKENS)], dtype=object)
    table = pd.DataFrame(
        {
            "layer": np.repeat(np.arange(LAYERS, dtype=np.int32), NEURONS * K),
            "neuron": np.tile(np.repeat(np.arange(NEURONS, dtype=np.int32), K), LAYERS),
            "side": pd.Categorical(["up"] * rows),
            "rank": np.tile(np.arange(K, dtype=np.int32), LAYERS * NEURONS),
            "token_id": ids,
            "token": words[ids],
            "logit": rng.random(rows, dtype=np.float32),
            "probability": rng.random(rows, dtype=np.float32),
            "score": rng.random(rows, dtype=np.float32),
        }
    )
    null = pd.DataFrame({"side": ["up"], "score": [0.0]})
    settings = {"n_layers": LAYERS, "layers": list(range(LAYERS)), "sides": ["up"]}
    neuron_folder.write(folder, table, table.head(10), null, list(words), settings)


if __name__ == "__main__":
    main()
