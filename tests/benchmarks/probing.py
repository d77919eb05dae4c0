"""What probes of all states cost beside scikit-learn's, one by one, at the same held-out accuracy, in one run.

    python tests/benchmarks/probing.py [--rows 10000 --held-out 3000 --every 1]
    python tests/benchmarks/probing.py --device cuda --rows 100000 --d 4096

Prints one JSON object. On a CPU, rows are states of the embedded model at tokens of `wikipedia` (ordinary ones, in order, so
that no document but one is on both sides), at every state or each so-many-th, and a label is asked of them: whether the token
begins a word, and whether the next one does. On a GPU, rows are random and labels planted, one state.

- `sklearn`: LogisticRegression at its defaults on the states as they are, and after StandardScaler.
- `logistic`, `lda`, `ridge`, `mean`: ours, of a given strength, with standardised columns (`mean` without); `logistic cv` and
  `lda cv` choose it in five folds.

Seconds are sums over the states, the variants taking turns at each; ratios are of these sums. Accuracy is the mean over states;
`worst` is the largest shortfall at any state against the better one of scikit-learn's two, in points.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from measuring import wait
from models import options

import workbench as wb
from probes import LDAProbe, LogisticProbe, MeanDifferenceProbe, RidgeProbe
from workbench.corpus.corpus import ORDINARY

STANDARDISED, RAW = "sklearn standardised", "sklearn raw"


def main() -> None:
    asked = options(rows=10_000, held_out=3000, every=1, d=576)
    device = torch.device(asked.device)
    states = of_the_model(asked) if device.type == "cpu" else planted(asked)
    seconds: dict[str, list[float]] = {}
    accuracy: dict[str, list[float]] = {}
    tasks: list[str] = []
    for task, x, y in states:
        x, own = x.to(device), (x[: asked.rows].cpu().numpy(), x[asked.rows :].cpu().numpy())
        learnt, asked_rows = x[: asked.rows], x[asked.rows :]
        tasks.append(task)
        for name, fit in variants(device).items():
            wait()
            started = time.perf_counter()
            fitted = fit().fit(own[0] if "sklearn" in name else learnt, y[: asked.rows])
            wait()
            seconds.setdefault(name, []).append(time.perf_counter() - started)
            score = fitted.score(own[1] if "sklearn" in name else asked_rows, y[asked.rows :])
            accuracy.setdefault(name, []).append(100 * score)
    better = np.maximum(accuracy[RAW], accuracy[STANDARDISED])
    table = []
    for task in dict.fromkeys(tasks):
        at = np.array([one == task for one in tasks])
        total = {name: float(np.array(own)[at].sum()) for name, own in seconds.items()}
        table += [
            {
                "task": task, "variant": name, "seconds": round(total[name], 2),
                "times_faster_than_raw": round(total[RAW] / total[name], 1),
                "times_faster_than_standardised": round(total[STANDARDISED] / total[name], 1),
                "accuracy": round(float(np.array(own)[at].mean()), 2),
                "worst": round(float((better - np.array(own))[at].max()), 2),
            }
            for name, own in accuracy.items()
        ]  # fmt: skip
    import sklearn

    settings = vars(asked) | {
        "states": len(tasks), "torch": torch.__version__, "sklearn": sklearn.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps({"benchmark": "probes", "settings": settings, "table": table}, indent=2))


def variants(device: torch.device) -> dict[str, Callable[[], Any]]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        RAW: LogisticRegression,
        STANDARDISED: lambda: make_pipeline(StandardScaler(), LogisticRegression()),
        "logistic": lambda: LogisticProbe(1.0),
        "logistic cv": LogisticProbe,
        "lda": lambda: LDAProbe(0.01),
        "lda cv": LDAProbe,
        "ridge": lambda: RidgeProbe(100.0),
        "mean": MeanDifferenceProbe,
    }


def of_the_model(asked: Any) -> Iterator[tuple[str, torch.Tensor, np.ndarray]]:
    """States `[rows, d_model]` with labels, of every task."""
    model = wb.load()
    n = asked.rows + asked.held_out
    sites = ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(asked.every - 1, model.n_layers, asked.every))]
    kept: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
    begins, follows, enough = [], [], 0
    spaced = np.array([one.startswith((" ", "\n")) for one in model.token_strings])
    for batch in wb.stream(model, wb.Corpus("wikipedia", length=128), sites, progress=False):
        own = batch.tokens
        goes_on = np.append(own.row[1:] == own.row[:-1], False)
        at = np.flatnonzero(goes_on & (own.stratum == ORDINARY))
        for site in sites:
            kept[site].append(batch[site][at].clone())
        begins.append(spaced[own.token_id[at]])
        follows.append(spaced[own.token_id[at + 1]])
        enough += len(at)
        if enough >= n:
            break
    for task, labels in (("the token begins a word", begins), ("the next token begins a word", follows)):
        for site in sites:
            yield task, torch.cat(kept[site])[:n], np.concatenate(labels)[:n].astype(int)


def planted(asked: Any) -> Iterator[tuple[str, torch.Tensor, np.ndarray]]:
    """Random rows whose spectrum falls as states' does, with a direction that tells 9 labels of 10."""
    n, d = asked.rows + asked.held_out, asked.d
    x = torch.randn(n, d, device=asked.device) * torch.arange(1, d + 1, device=asked.device) ** -0.5
    margin = x @ torch.randn(d, device=asked.device)
    margin += 0.3 * margin.std() * torch.randn(n, device=asked.device)
    yield "a planted direction", x, (margin > 0).long().cpu().numpy()


if __name__ == "__main__":
    main()
