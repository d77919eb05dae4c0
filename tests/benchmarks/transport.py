"""What an atlas of all pairs of states costs, beside the way of the authors of activation transport operators.

    python tests/benchmarks/transport.py [--tokens 30000 --pairs 3 --folds 5]

Prints one JSON object. Ours is the whole of `wb.transport(..., "all")`: one pass, maps of every pair fitted on each half of the
documents, scores held out, with nulls, canonical correlations, Fisher and readers' metrics. Theirs (arXiv 2508.17540; their
release): all states captured, for each pair scikit-learn's `Ridge` by `GridSearchCV` over 8 strengths and 5 folds of 60 % of
the tokens, 41 fits; timed on some pairs and counted for all, without nulls, ceilings or canonical correlations. `peak_gb` is
the process's.
"""

import json
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from models import loaded, options
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV

import workbench as wb

STRENGTHS = [0.1, 1, 10, 100, 1000, 2000, 5000, 10000]


@torch.no_grad()
def main() -> None:
    chosen = options(tokens=30_000, pairs=3, folds=5, layers=None, rounds=1)
    model = loaded(chosen.shape, chosen.device, chosen.dtype, chosen.layers)
    corpus = wb.Corpus("wikipedia", max_tokens=chosen.tokens)
    started = time.perf_counter()
    own = wb.transport(model, corpus, "all", progress=False)
    ours, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    started = time.perf_counter()
    parts: dict[str, list[np.ndarray]] = {}
    for batch in wb.stream(model, corpus, ["resid_pre.0", "resid_post"], massive_at=None, progress=False):
        for site, value in batch.items():
            parts.setdefault(site, []).append(value.numpy().copy())
    states = {site: np.concatenate(some) for site, some in parts.items()}
    capture, n = time.perf_counter() - started, int(0.6 * chosen.tokens)
    some = own.table.iloc[:: max(1, len(own.table) // chosen.pairs)].head(chosen.pairs)
    found: list[dict[str, Any]] = []
    for row in some.itertuples():
        x, y = states[str(row.source)], states[str(row.target)]
        started = time.perf_counter()
        search = GridSearchCV(Ridge(), {"alpha": STRENGTHS}, cv=chosen.folds, scoring="r2").fit(x[:n], y[:n])
        found.append(
            {
                "pair": f"{row.source}>{row.target}",
                "seconds": round(time.perf_counter() - started, 1),
                "alpha": search.best_params_,
            }
        )
    each = sum(one["seconds"] for one in found) / len(found)
    theirs = capture + each * len(own.table)
    result = {
        "benchmark": "transport", "pairs": len(own.table), "tokens": chosen.tokens, "ours_seconds": round(ours),
        "ours_peak_gb": round(peak, 1), "theirs_capture_seconds": round(capture), "theirs_timed": found,
        "theirs_seconds_of_all": round(theirs), "ratio": round(theirs / ours, 1),
        "states_gb": round(sum(array.nbytes for array in states.values()) / 1e9, 2),
        "settings": vars(chosen) | {"weights": model.name, "torch": torch.__version__, "python": sys.version.split()[0]},
    }  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
