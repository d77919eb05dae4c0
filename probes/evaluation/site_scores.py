"""From held-out predictions of all sites to a sweep's tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probes.evaluation import classes, numbers
from probes.evaluation.classes import Plan
from probes.evaluation.scores import Resamples, classified, entropy_bits, interval, kilometres, r_squared
from probes.evaluation.splits import Splits
from workbench.moments.joint import Joint

if TYPE_CHECKING:
    import pandas as pd

COORDINATES = ("latitude", "longitude")
"""Targets of these names are places, and distances are given in kilometres."""


class Scored:
    """What has been scored so far. All sites share resamples of the groups, so that differences have intervals."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan = plan
        self.tested = plan.splits.tested
        groups = plan.dataset.groups[:, 0]
        self.resamples = Resamples(groups[self.tested], seed)
        self.seen = None if plan.seen is None else plan.seen.tested
        self.seen_resamples = None if self.seen is None else Resamples(plan.dataset.types[self.seen], seed)
        self.rows: list[dict[str, Any]] = []
        self.references = [_mean(self) if plan.dataset.kind == "numbers" else _commonest_class(self)]
        self.predictions: list[pd.DataFrame] = []
        self.probes: dict[str, Any] = {}
        self.patterns: dict[str, np.ndarray] = {}
        self.null_patterns: dict[str, np.ndarray] = {}
        self.drawn: dict[str, np.ndarray] = {}
        """Scores of references in every resample."""
        self.luck: list[list[float]] = []
        """Of each site, the score of every set of shuffled labels."""
        self.fresh: list[tuple[str, float, np.ndarray]] = []
        """Of each site of the untrained model, its score and that in every resample."""
        self.own: list[tuple[float, np.ndarray]] = []

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """Sites, references, predictions."""
        import pandas as pd

        return pd.DataFrame(self.rows), pd.DataFrame(self.references), pd.concat(self.predictions, ignore_index=True)

    def best_beside(self) -> dict[str, Any]:
        """The best site, which was chosen among all, held against what is chosen alike: the best site of each set of shuffled
        labels, and the untrained model's best."""
        value, draws = max(self.own, key=lambda one: one[0])
        found: dict[str, Any] = {"sites": len(self.own)}
        if self.luck:
            most = np.array(self.luck).max(0)
            found |= {"shuffled": float(most.mean()), "shuffled_most": float(most.max())}
        if self.fresh:
            site, other, others = max(self.fresh, key=lambda one: one[1])
            found |= {"untrained_site": site} | between("over_untrained", value - other, draws - others)
        return found

    def about(self, name: str) -> dict[str, Any]:
        """Columns of predictions that say which example it is."""
        rows = np.flatnonzero(self.tested)
        return {"site": name, "example": rows, "group": self.plan.dataset.groups[rows, 0]}


def between(name: str, value: float, draws: np.ndarray) -> dict[str, float]:
    """A score with its interval."""
    low, high = interval(draws)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def scored_classes(
    score: Scored, probe: Any, rows: Tensor, name: str, *, twin: Tensor | None = None, controls: bool = False,
    reference: bool = False,
) -> None:  # fmt: skip
    """Add a site of classes.

    Args:
        twin: Rows of the untrained model.
        reference: These rows are no site but something to hold sites against.
    """
    import pandas as pd

    plan, own = score.plan, score.plan.dataset
    index, tested = own.index, score.tested
    found = classes.probed(probe, rows, plan, controls=controls)
    result = classified(found.log_p[tested], index[tested])
    prior, draws = entropy_bits(index[tested]), score.resamples.means(result.hits)
    row: dict[str, Any] = {"site": name} | between("accuracy", result.accuracy, draws) | {
        "balanced_accuracy": result.balanced_accuracy, "information_bits": prior - result.bits,
    }  # fmt: skip
    if reference:
        score.drawn[name] = draws
    if controls:
        null = [classified(log_p[tested], labels[tested]).accuracy
                for log_p, labels in zip(found.shuffled, plan.shuffled, strict=True)]  # fmt: skip
        row |= {"shuffled_accuracy": float(np.mean(null)), "shuffled_most": max(null)}
        score.luck.append(null)
        row |= _selectivity(score, found, index)
    if twin is not None:
        fresh = classes.probed(probe, twin, plan, controls=False)
        beside = classified(fresh.log_p[tested], index[tested])
        others = score.resamples.means(beside.hits)
        row |= between("untrained_accuracy", beside.accuracy, others)
        score.fresh.append((name, beside.accuracy, others))
        row |= between("over_untrained", result.accuracy - beside.accuracy, draws - others)
        row["untrained_compression"] = fresh.code.compression
    if score.drawn and not reference:
        best = max(score.drawn, key=lambda one: score.drawn[one].mean())
        value = next(one["accuracy"] for one in score.references if one["site"] == best)
        row |= between("over_embeddings", result.accuracy - value, draws - score.drawn[best])
    row |= {"bits": found.code.bits / len(own), "compression": found.code.compression}
    if found.shuffled_code is not None:
        row["shuffled_compression"] = found.shuffled_code.compression
    row["strength"] = _strength(found.settled)
    if reference:
        score.references.append(row)
        return
    score.rows.append(row)
    score.own.append((result.accuracy, draws))
    names, p = own.classes, found.log_p[tested] / math.log(2)
    score.predictions.append(
        pd.DataFrame(
            score.about(name) | {"label": own.labels[tested], "predicted": names[p.argmax(1)],
                                 "log2_p": p[np.arange(len(p)), index[tested]].astype(np.float32)}
        )
    )  # fmt: skip
    score.probes[name] = found.settled.fit(rows, index, groups=own.groups[:, 0])
    score.probes[name].classes_ = names
    score.patterns[name] = class_pattern(rows, index, len(names))
    if controls:
        score.null_patterns[name] = np.concatenate([class_pattern(rows, labels, len(names)) for labels in plan.shuffled])


def scored_numbers(
    score: Scored, probe: Any, rows: Tensor, name: str, *, twin: Tensor | None = None, controls: bool = False,
    reference: bool = False,
) -> None:  # fmt: skip
    """As `scored_classes`, of numbers."""
    import pandas as pd

    plan, own = score.plan, score.plan.dataset
    y, tested = own.labels, score.tested
    found = numbers.probed(probe, rows, plan, controls=controls)
    target, mean, predicted = y[tested], found.mean[tested], found.predicted[tested]
    value, each = r_squared(target, predicted, mean)
    draws = _r2_draws(score, target, predicted, mean)
    row: dict[str, Any] = {"site": name} | between("r2", value, draws)
    row |= {f"r2_{one}": float(r2) for one, r2 in zip(own.target_names, each, strict=True)}
    places = own.target_names == COORDINATES
    if places:
        row["median_km"] = float(np.median(kilometres(target, predicted)))
    if reference:
        score.drawn[name] = draws
    if controls:
        null = [_relative(other, guess, plan.splits) for guess, other in zip(found.shuffled, plan.shuffled, strict=True)]
        row |= {
            "shuffled_r2": float(np.mean(null)),
            "shuffled_most": max(null),
            "shuffled_bits_saved": found.shuffled_bits_saved,
        }
        score.luck.append(null)
        if found.seen is not None and found.controls is not None and plan.seen is not None:
            seen = _relative(y, found.seen, plan.seen)
            control = [_relative(other, guess, plan.seen) for guess, other in zip(found.controls, plan.controls, strict=True)]
            row |= {"seen_r2": seen, "control_r2": float(np.mean(control)), "selectivity": seen - float(np.mean(control))}
    if twin is not None:
        fresh = numbers.probed(probe, twin, plan, controls=False)
        others = _r2_draws(score, target, fresh.predicted[tested], mean)
        untrained = r_squared(target, fresh.predicted[tested], mean)[0]
        row |= between("untrained_r2", untrained, others)
        row["untrained_bits_saved"] = fresh.bits_saved
        score.fresh.append((name, untrained, others))
        row |= between("over_untrained", value - untrained, draws - others)
    if score.drawn and not reference:
        best = max(score.drawn, key=lambda one: score.drawn[one].mean())
        there = next(one["r2"] for one in score.references if one["site"] == best)
        row |= between("over_embeddings", value - there, draws - score.drawn[best])
    row |= {"bits_saved": found.bits_saved, "strength": _strength(found.settled)}
    if reference:
        score.references.append(row)
        return
    score.rows.append(row)
    score.own.append((value, draws))
    columns = {one: target[:, i] for i, one in enumerate(own.target_names)}
    columns |= {f"{one}_predicted": predicted[:, i] for i, one in enumerate(own.target_names)}
    score.predictions.append(pd.DataFrame(score.about(name) | columns))
    score.probes[name] = found.settled.fit(rows, y, groups=own.groups[:, 0])
    score.patterns[name] = number_pattern(rows, y)
    if controls:
        score.null_patterns[name] = np.concatenate([number_pattern(rows, other) for other in plan.shuffled])


def class_pattern(rows: Tensor, index: np.ndarray, n_classes: int) -> np.ndarray:
    """What the states of a class have that the others have not: of two classes the second mean less the first, `[1, d]`; of
    more, each mean less that of all, `[classes, d]`."""
    z = torch.nn.functional.one_hot(torch.as_tensor(index), n_classes).to(rows)
    means = (z.T @ rows / z.sum(0)[:, None]).double().cpu().numpy()
    return means[1:] - means[:1] if n_classes == 2 else means - rows.mean(0).double().cpu().numpy()


def number_pattern(rows: Tensor, y: np.ndarray) -> np.ndarray:
    """The covariance of states with each target, over the target's spread, `[targets, d]`."""
    joint = Joint.of(rows, torch.as_tensor(y, device=rows.device), products=rows.dtype)
    return np.ascontiguousarray((joint.xy / (joint.yy.diagonal() * joint.n).sqrt()).T.cpu().numpy())


def _selectivity(score: Scored, found: classes.Found, index: np.ndarray) -> dict[str, float]:
    if found.seen is None or found.controls is None or score.seen is None or score.seen_resamples is None:
        return {}
    at = score.seen
    task = classified(found.seen[at], index[at])
    controls = [classified(log_p[at], labels[at]) for log_p, labels in zip(found.controls, score.plan.controls, strict=True)]
    control = float(np.mean([one.accuracy for one in controls]))
    draws = score.seen_resamples.means(task.hits - np.mean([one.hits for one in controls], axis=0))
    return {"seen_accuracy": task.accuracy, "control_accuracy": control} | between(
        "selectivity", task.accuracy - control, draws
    )


def _relative(y: np.ndarray, predicted: np.ndarray, splits: Splits) -> float:
    """R² of what was tested, relative to the means of what was learnt from."""
    at = splits.tested
    return r_squared(y[at], predicted[at], numbers.training_means(y, splits)[at])[0]


def _mean(score: Scored) -> dict[str, Any]:
    """What the training rows' mean is worth on those held out: by this all else is measured."""
    y, splits = score.plan.dataset.labels, score.plan.splits
    row: dict[str, Any] = {"site": "mean", "r2": 0.0, "r2_low": 0.0, "r2_high": 0.0, "bits_saved": 0.0}
    if score.plan.dataset.target_names == COORDINATES:
        away = [kilometres(y[test], np.broadcast_to(y[train].mean(0), y.shape)[test])
                for train, test in zip(splits.train.T, splits.test.T, strict=True)]  # fmt: skip
        row["median_km"] = float(np.median(np.concatenate(away)))
    return row


def _commonest_class(score: Scored) -> dict[str, Any]:
    """What the training rows' commonest class is worth on those held out."""
    index = score.plan.dataset.index
    prior = entropy_bits(index[score.tested])
    hits = np.full(len(index), np.nan)
    for train, test in zip(score.plan.splits.train.T, score.plan.splits.test.T, strict=True):
        hits[test] = index[test] == np.bincount(index[train]).argmax()
    hits = hits[score.tested]
    k = len(score.plan.dataset.classes)
    return {"site": "commonest class"} | between("accuracy", float(hits.mean()), score.resamples.means(hits)) | {
        "balanced_accuracy": 1 / k, "information_bits": 0.0, "bits": prior, "compression": math.log2(k) / prior,
    }  # fmt: skip


def _r2_draws(score: Scored, target: np.ndarray, predicted: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """R² in every resample: 1 - the ratio of two resampled means."""
    left, whole = score.resamples.means((target - predicted) ** 2), score.resamples.means((target - mean) ** 2)
    return (1 - left / whole).mean(1)


def _strength(probe: Any) -> float:
    """C, shrinkage or alpha of a probe; NaN for one that has none."""
    found = probe.get_params()
    return float(next((found[name] for name in ("C", "shrinkage", "alpha") if name in found), math.nan))
