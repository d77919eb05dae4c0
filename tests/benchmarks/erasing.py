"""What erasing a concept costs beside the concept-erasure package and the plain loop of INLP, in one run.

    python tests/benchmarks/erasing.py [--rows 10000 --d 576 --states 31 --rounds 30]
    python tests/benchmarks/erasing.py --device cuda --rows 20000 --d 4096 --states 4 --rounds 10 [--sklearn 1]

Prints one JSON object. Rows are random.

- `leace`: float32 rows of every state, for 2 and for 8 classes: columns correlated, their spectrum falling as states' does,
  three of massive scale. Ours, from `Joint.of` each state, beside concept-erasure's `LeaceFitter` at its defaults, of the rows
  as they are and of the same in float64 (turning them is not counted); they take turns at each state, after one that is not
  counted, and ratios are medians over states. `gap` is the largest distance of a class mean from the mean, in spreads of the
  columns: before, and the worst that is left. `difference` is the largest of the transformed rows' from ours, relative to the
  spread of the rows, massive columns left out.
- `inlp`: so many rounds, every one of which counts: ours, beside the plain loop, which fits scikit-learn's LogisticRegression
  at its defaults, makes the projection anew of all classifiers by the published formula, and projects the original rows; in
  float64, as the formula takes the rounding of float32 for directions. Labels lie in 40 weak directions of unlike spread, so
  that no round finds them all. `accuracy` is that of each round's classifier on rows held out from both, and `left` that of a
  fresh one on what is left after all. On a GPU the loop is left out, unless --sklearn is given.
- `peak_bytes`: beyond what was held before; of one state of 2 classes, and of two rounds.
"""

import ctypes
import json
import time
import warnings
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from measuring import Work, peak_extra_bytes, ratio, wait
from models import options

from probes import INLP, LEACE
from probes.erasers.concept import indicators
from workbench.moments.joint import Joint

WEAK = 40
MASSIVE = (30.0, 100.0, 300.0)
EVERY_ROUND = -1e9
CPU = torch.device("cpu")


def main() -> None:
    asked = options(rows=10_000, d=576, states=31, rounds=30, sklearn=None)
    device = torch.device(asked.device)
    with_loop = device == CPU or bool(asked.sklearn)
    table: dict[str, Any] = {"leace": [leace(asked, classes, device) for classes in (2, 8)]}
    table["inlp"] = inlp(asked, device, with_loop=with_loop)
    with get_context("spawn").Pool(1) as other:
        table["peak_bytes"] = other.apply(peaks, (asked, device, with_loop))
    import sklearn

    settings = vars(asked) | {
        "torch": torch.__version__, "scikit-learn": sklearn.__version__, "threads": torch.get_num_threads(),
        "gpu": None if device == CPU else torch.cuda.get_device_name(),
    }  # fmt: skip
    print(json.dumps({"benchmark": "erasing", "settings": settings, "table": table}, indent=2))


def timed(run: Work) -> tuple[Any, float]:
    wait()
    started = time.perf_counter()
    found = run()
    wait()
    return found, time.perf_counter() - started


# ---- LEACE


def leace(asked: Any, classes: int, device: torch.device) -> dict[str, Any]:
    states = States(asked, classes, device)
    seconds: dict[str, list[float]] = {}
    left: dict[str, list[float]] = {}
    apart: dict[str, list[float]] = {}
    before = []
    for run in variants(states.drawn(), states.columns).values():
        run()
    for _ in range(asked.states):
        rows = states.drawn()
        before.append(states.gap(rows))
        found = {}
        for name, run in variants(rows, states.columns).items():
            found[name], own = timed(run)
            seconds.setdefault(name, []).append(own)
            left.setdefault(name, []).append(states.gap(found[name]))
            spread = (rows - rows.mean(0))[:, states.ordinary].norm()
            difference = (found[name].double() - found["ours"].double())[:, states.ordinary].norm() / spread
            apart.setdefault(name, []).append(float(difference))
    return {
        "classes": classes,
        "gap_before": short(min(before)),
        "variants": [
            {
                "variant": name, "seconds": round(sum(own), 2), "ours_times_faster": ratio(own, seconds["ours"]),
                "gap": short(max(left[name])), "difference": short(max(apart[name])),
            }
            for name, own in seconds.items()
        ],
    }  # fmt: skip


class States:
    """Of one concept."""

    def __init__(self, asked: Any, classes: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(classes)
        self.d, self.classes, self.device = asked.d, classes, device
        self.mix = self._normal(asked.d, asked.d) / asked.d**0.5
        self.labels = torch.randint(0, classes, (asked.rows,), generator=self.generator, device=device)
        self.columns = indicators(self.labels, asked.rows)[0].to(device, torch.float32)
        self.massive = torch.tensor([3, asked.d // 2, asked.d - 5], device=device)
        self.ordinary = torch.ones(asked.d, dtype=torch.bool, device=device)
        self.ordinary[self.massive] = False

    def drawn(self) -> torch.Tensor:
        spectrum = torch.arange(1, self.d + 1, device=self.device) ** -0.5
        rows = (self._normal(len(self.labels), self.d) * spectrum) @ self.mix
        rows += 0.5 * rows.std() * self._normal(self.classes, self.d)[self.labels]
        rows[:, self.massive] = torch.tensor(MASSIVE, device=self.device) * rows.std() * (rows[:, self.massive] + 1)
        return rows

    def gap(self, rows: torch.Tensor) -> float:
        rows = rows.double()
        rows = (rows - rows.mean(0)) / rows.std(0)
        return max(float(rows[self.labels == one].mean(0).norm()) for one in range(self.classes))

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)


def variants(rows: torch.Tensor, columns: torch.Tensor) -> dict[str, Work]:
    wide, wide_columns = rows.double(), columns.double()
    return {
        "ours": lambda: LEACE().fit_moments(Joint.of(rows, columns, products=rows.dtype)).transform(rows),
        "concept-erasure": lambda: theirs(rows, columns),
        "concept-erasure float64": lambda: theirs(wide, wide_columns),
    }


def theirs(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    from concept_erasure import LeaceFitter

    return LeaceFitter.fit(rows, columns).eraser(rows)


# ---- INLP


def inlp(asked: Any, device: torch.device, *, with_loop: bool) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression

    x, y, held_out = weak_directions(asked)
    own, seconds = timed(partial(ours, x, y, device, asked.rounds))
    found = {"ours": ([one.accuracy for one in own.rounds_], own.matrix.numpy(), seconds)}
    if with_loop:
        (accuracy, projection), seconds = timed(partial(plain_loop, x, y, held_out, asked.rounds))
        found["loop"] = accuracy, projection, seconds
    table = []
    for name, (accuracy, projection, seconds) in found.items():
        left = (x - x.mean(0)) @ projection
        fresh = LogisticRegression().fit(left[~held_out], y[~held_out])
        table.append(
            {
                "variant": name, "rounds": len(accuracy), "seconds": round(seconds, 2),
                "ours_times_faster": round(seconds / found["ours"][2], 2), "rank": round(asked.d - np.trace(projection)),
                "left": round(float(fresh.score(left[held_out], y[held_out])), 3),
                "accuracy": " ".join(f"{one:.3f}" for one in accuracy),
            }
        )  # fmt: skip
    return {"chance": round(own.rounds_[0].chance, 3), "variants": table}


def weak_directions(asked: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, labels, and which rows INLP holds out. Of a direction's spread a part tells the classes apart, in each the same:
    what a classifier weighs by spread, it leaves a part of in all of them."""
    from probes.folds import folds_by_group

    random = np.random.default_rng(0)
    y = random.integers(0, 2, asked.rows)
    spread = np.concatenate([np.logspace(-1, 1, WEAK), np.ones(asked.d - WEAK)])
    apart = np.where(np.arange(asked.d) < WEAK, 0.4, 0.0)
    x = (random.normal(size=(asked.rows, asked.d)) + apart * (y[:, None] - 0.5)) * spread
    x = x @ np.linalg.qr(random.normal(size=(asked.d, asked.d)))[0]
    return x.astype(np.float32), y, folds_by_group(y, np.arange(asked.rows), 5, 0) == 0


def ours(x: np.ndarray, y: np.ndarray, device: torch.device, rounds: int) -> INLP:
    return INLP(rounds=rounds, errors=EVERY_ROUND).fit(torch.from_numpy(x).to(device), y)


def plain_loop(x: np.ndarray, y: np.ndarray, held_out: np.ndarray, rounds: int) -> tuple[list[float], np.ndarray]:
    """As `debias.get_debiasing_projection` of nullspace_projection does it."""
    import scipy.linalg
    from sklearn.linear_model import LogisticRegression

    def onto(weights: np.ndarray) -> np.ndarray:
        basis = scipy.linalg.orth(weights.T)
        return basis @ basis.T

    x = x.astype(np.float64)
    accuracy, onto_each, projection = [], [], np.eye(x.shape[1])
    learnt, others = x[~held_out], x[held_out]
    for _ in range(rounds):
        found = LogisticRegression().fit(learnt @ projection, y[~held_out])
        accuracy.append(float(found.score(others @ projection, y[held_out])))
        onto_each.append(onto(found.coef_))
        projection = np.eye(x.shape[1]) - onto(np.sum(onto_each, 0))
    return accuracy, projection


# ---- Memory


def peaks(asked: Any, device: torch.device, with_loop: bool) -> dict[str, int]:
    """In a process of its own, in which memory is given back at once, or the resident set would show what was once taken."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    warnings.filterwarnings("ignore")
    states = States(asked, 2, device)
    found = {f"leace {name}": peak_extra_bytes(run, device) for name, run in variants(states.drawn(), states.columns).items()}
    x, y, held_out = weak_directions(asked)
    found["inlp ours"] = peak_extra_bytes(partial(ours, x, y, device, 2), device)
    if with_loop:
        found["inlp loop"] = peak_extra_bytes(partial(plain_loop, x, y, held_out, 2), CPU)
    return found


def short(value: float) -> float:
    return float(f"{value:.2g}")


if __name__ == "__main__":
    main()
