"""What it costs to sum second moments of all states, beside the model's body alone and the way a user would do it today.

    python tests/benchmarks/moments.py [--tokens 32768 --rounds 3]
    python tests/benchmarks/moments.py --device cuda --shape llama-8b --dtype bfloat16 --tokens 262144 --cells one

Prints one JSON object. Rows of 512 tokens, packed; ratios are to the body alone, medians of rounds in which the variants take
turns.
`arithmetic` is what the ratio would be if products ran at the speed of the body: their operations over those of the body.
`peak_gb` is of one run in a process of its own. `all states in memory` is what a user keeps today to fit with scikit-learn, and
`solving` what the fits then take (`--today` pairs are timed). `error` compares the sums with those in float64 of the same
activations. `--cells one` has one cell, `all` the library's own.
"""

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from measuring import Work, ratio, seconds
from models import loaded, options, run_body
from sklearn.linear_model import Ridge

import workbench as wb
from workbench.moments.joint import Joint
from workbench.moments.layout import Pair
from workbench.streaming.plan import peak_memory
from workbench.streaming.stream import BATCH_TOKENS
from workbench.transports.fit import fit_transports
from workbench.transports.scoring import explained
from workbench.transports.solving import Spectrum, least_squares

TODAY = "all states in memory"
PAIRS = {"sites alone": [], "adjacent + last": ["adjacent", "last"], "all pairs": "all"}


@torch.no_grad()
def main() -> None:
    chosen = options(tokens=32_768, rounds=3, today=3, cells="all", layers=None, only="")
    model = loaded(chosen.shape, chosen.device, chosen.dtype, chosen.layers)
    corpus = wb.Corpus("wikipedia", length=512, packed=True, bos="never", max_tokens=chosen.tokens)
    cells: dict[str, Any] = {"detail": "one", "folds": 1, "cross_folds": 1} if chosen.cells == "one" else {}
    kept: dict[str, Any] = {}

    def body() -> None:
        run_body(model, corpus, BATCH_TOKENS[model.device.type])

    def collect(name: str) -> Work:
        def run() -> None:
            kept.clear()
            kept["moments"] = wb.collect_moments(
                model, corpus, pairs=PAIRS[name], progress=False, device=chosen.device, **cells
            )  # fmt: skip

        return run

    def capture() -> None:
        kept.clear()
        kept["states"] = _states(model, corpus)

    variants: dict[str, Work] = {"body alone": body} | {name: collect(name) for name in PAIRS}
    if chosen.only:  # one run in a process of its own, for its memory
        (variants | {TODAY: capture})[chosen.only]()
        print(peak_memory(model.device))
        return
    if chosen.device == "cpu":
        variants[TODAY] = capture
    memory = {name: _peak(name) for name in variants}
    body()
    times = seconds(variants, chosen.rounds, kept.clear)
    table: list[dict[str, Any]] = [
        {
            "variant": name, "seconds": round(statistics.median(found), 2),
            "tokens_per_second": round(chosen.tokens / statistics.median(found)),
            "ratio_to_body": ratio(found, times["body alone"]),
            "arithmetic": round(1 + _operations(model, PAIRS.get(name)) / _body_operations(model), 2),
            "peak_gb": round(memory[name] / 1e9, 2),
        }
        for name, found in times.items()
    ]  # fmt: skip
    result: dict[str, Any] = {"benchmark": "moments", "table": table}
    if chosen.device == "cpu":
        result["solving"] = _solving(model, corpus, chosen.today)
    kept.clear()
    result["error"] = _error(model, corpus)
    print(json.dumps(result | {"settings": vars(chosen) | {"weights": model.name, "torch": torch.__version__}}, indent=2))


def _peak(name: str) -> int:
    """The most memory that a variant takes in a process of its own, the model's included."""
    done = subprocess.run([sys.executable, *sys.argv, "--only", name], capture_output=True, text=True, check=True)
    return int(done.stdout)


def _states(model: wb.LanguageModel, corpus: wb.Corpus) -> dict[str, np.ndarray]:
    """All states of all tokens, in memory."""
    parts: dict[str, list[np.ndarray]] = {}
    for batch in wb.stream(model, corpus, ["resid_pre.0", "resid_post"], massive_at=None, progress=False):
        for site, value in batch.items():
            parts.setdefault(site, []).append(value.numpy().copy())
    return {site: np.concatenate(some) for site, some in parts.items()}


def _solving(model: wb.LanguageModel, corpus: wb.Corpus, n_pairs: int) -> dict[str, Any]:
    """Seconds for all pairs: ours (strength chosen, three scores, in sample and held out), and scikit-learn's from the states,
    one strength and one score in sample, counted from some pairs."""
    moments = wb.collect_moments(model, corpus, pairs="all", progress=False)
    started = time.perf_counter()
    maps = fit_transports(moments, progress=False)
    ours = time.perf_counter() - started
    states, chosen = _states(model, corpus), list(maps.values())[:: max(1, len(maps) // n_pairs)][:n_pairs]
    started = time.perf_counter()
    for one in chosen:
        x, y = states[one.source], states[one.target]
        Ridge(alpha=1.0).fit(x, y).score(x, y)
    each = (time.perf_counter() - started) / n_pairs
    return {
        "pairs": len(maps), "fit_transports_seconds": round(ours, 1), "scikit_learn_pairs_timed": n_pairs,
        "scikit_learn_seconds_of_all": round(each * len(maps), 1),
    }  # fmt: skip


def _operations(model: wb.LanguageModel, pairs: Any) -> int:
    return 0 if pairs is None else wb.plan_moments(model, pairs=pairs).operations


def _body_operations(model: wb.LanguageModel) -> int:
    """Two a weight of the blocks and token; attention over some hundred tokens adds a few percent, which are left out."""
    blocks = [parameter for layer in range(model.n_layers) for parameter in model.block(layer).parameters()]
    return 2 * sum(parameter.numel() for parameter in blocks)


def _error(model: wb.LanguageModel, corpus: wb.Corpus) -> dict[str, float]:
    """Of the moments of two neighbouring states in the middle, ordinary tokens."""
    layer = model.n_layers // 2
    pair = Pair(f"resid_post.{layer - 1}", f"resid_post.{layer}")
    own = wb.collect_moments(model, corpus, [], [str(pair)], detail="two", folds=2, progress=False).joint(pair, "ordinary")
    direct: Joint | None = None
    for batch in wb.stream(model, corpus, list(pair[:2]), progress=False):
        ordinary = torch.from_numpy(batch.tokens.stratum == 4).to(model.device)
        part = Joint.of(*(batch[site][ordinary] for site in pair[:2]))
        direct = part if direct is None else direct.plus(part)
    assert direct is not None
    direct = Joint(direct.n, *(array.cpu() for array in direct[1:]))
    found = {
        name: float((getattr(own, name) - getattr(direct, name)).norm() / getattr(direct, name).norm()) for name in ("xx", "xy")
    }
    for name, moved in (("r2", lambda joint: joint), ("r2_without_residual", Joint.without_residual)):
        a, b = (_score(moved(joint)) for joint in (own, direct))
        found |= {name: b, f"{name}_error": abs(a - b)}
    return found


def _score(joint: Joint) -> float:
    matrix = least_squares(Spectrum.of(joint.xx), joint.xy)
    return explained(joint, matrix, joint.mean_y - joint.mean_x @ matrix).frobenius


if __name__ == "__main__":
    main()
