"""Can a concept be removed from states, by how much less, and is it gone for all who look?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import clone
from torch import Tensor
from tqdm.auto import tqdm

from probes.dataset import Dataset
from probes.erasers.closed_forms import RandomSubspace
from probes.erasers.eraser import Eraser
from probes.erasers.files import load_erasers, save_erasers
from probes.erasers.fit import class_labels, model_of
from probes.erasers.named import ERASERS, eraser_named
from probes.erasing.erasure_text import erasure_text
from probes.estimators.logistic import LogisticProbe
from probes.evaluation.leaks import Half, answers, hits, main_task, mean_gap
from probes.evaluation.scores import Resamples, interval
from probes.evaluation.splits import shuffled
from probes.states import BAG, EMBEDDING, Pool, States, collect_states
from workbench.artifacts import output_folder, read_tables, write_tables
from workbench.errors import BadDataset, UnknownOption
from workbench.model import LanguageModel
from workbench.results import Result, versions
from workbench.transports.transport import of_model

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

METHODS = ("leace", "mean", "inlp", "rlace", "random", "shuffled")
"""What is compared, unless said otherwise; `shuffled` is LEACE fitted to shuffled labels."""
KIND, MAKER, FILE = "erasure", "workbench erase or probes.erase(...).save", "erasers.safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class Erasure(Result):
    """A row a site and eraser, the first of each site before any (`none`). Erasers are fitted to half of the groups and judged
    on the other half, both ways.

    Columns: site, eraser, rank, linear (accuracy of logistic regression that learnt from erased rows which the eraser was
    fitted to, on the other half; with _low, _high: 95 % of resampled groups), linear_fresh (of one that learnt from rows which
    the eraser did not see), mlp and mlp_fresh (the same of a network with one hidden layer), neighbours (accuracy of the 5
    nearest fitted rows of other groups), neighbours_seen (of the fitted rows themselves; below chance: anti-clustering,
    arXiv 2403.16142), gap_seen and gap_fresh (distance of class means, as a share of that before, in rows of the fit and in
    others), edit (share of the variance that was changed: Σ|r(x) - x|² / Σ|x - mean|², in others), and where a main task was
    given main_accuracy and tpr_gap.
    """

    curve: pd.DataFrame
    """How the accuracy falls with rank: site, eraser, rank, linear, of INLP's first directions and as many random ones; empty
    without INLP."""
    points: pd.DataFrame
    """Of the first site: example, group, label, eraser, first, second: fresh rows along the direction of the first half's class
    means and the one that varies most across it, before erasing and after."""
    erasers: dict[str, Eraser]
    """By `site/eraser`, fitted to the first half of the groups: what is done with them can be scored on the other,
    `dataset.halves(seed)[1]`. For use, `probes.fit_erasers` fits to all."""

    def eraser(self, name: str, site: str | None = None) -> Any:
        """One of them.

        Raises:
            UnknownOption: if there is none of that name at that site.
        """
        key = f"{site or self.table['site'].iloc[0]}/{name}"
        if key not in self.erasers:
            raise UnknownOption(f"There is no eraser {key!r} here. There are {', '.join(self.erasers)}.")
        return self.erasers[key]

    def plot(self, what: str = "leaks") -> go.Figure:
        """`leaks`: what is left, by eraser; `curve`: accuracy against rank; `scatter`: rows before and after.

        Raises:
            UnknownOption: for a picture that there is not.
        """
        from probes.erasing.plots import plot_erasure

        return plot_erasure(self, what)

    def save(self, folder: str | Path) -> Path:
        """Write erasure.parquet, curve.parquet, points.parquet, erasers.safetensors and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        folder = output_folder(Path(folder))
        (folder / "run.json").unlink(missing_ok=True)
        save_erasers(self.erasers, folder / FILE)
        return write_tables(folder, KIND, self.settings, {KIND: self.table, "curve": self.curve, "points": self.points})

    @classmethod
    def load(cls, folder: str | Path) -> Erasure:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no complete result of this kind.
        """
        table, others, settings = read_tables(folder, KIND, MAKER, ["curve", "points"])
        curve, points = (one if one is not None else table.iloc[:0] for one in (others["curve"], others["points"]))
        return cls(table=table, settings=settings, curve=curve, points=points, erasers=load_erasers(Path(folder) / FILE))

    def __str__(self) -> str:
        return erasure_text(self)


def erase(
    model: LanguageModel | Mapping[str, Any],
    dataset: Dataset | str,
    sites: str | Sequence[str] | None = None,
    *,
    erasers: Sequence[Any] = METHODS,
    main: Any = None,
    mlp: bool = True,
    pool: Pool = "last",
    seed: int = 0,
    device: str | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> Erasure:
    """Fit erasers of a concept, and see what is left of it in rows that they were not fitted to.

    A probe that learns from the very rows an eraser was fitted to finds nothing there by construction, however badly the eraser
    does on others; so probes also learn from rows that it did not see (`linear_fresh`, `mlp_fresh`).

    Args:
        model: A model; or rows by site, `[n, d]` each, such as `States`.
        dataset: A `Dataset` of classes, a file, or the name of a shipped set.
        sites: As `parse_sites` reads them; the state two thirds up, if None.
        erasers: Names of `ERASERS` (a random subspace takes the rank of the first other), `shuffled`, or erasers of your own.
        main: `[n]`, labels of another task that the rows serve: what erasing costs there, and whom.
        mlp: Also the network; it takes most of the time.
        device: Where erasers and probes are fitted.
    Raises:
        TooFewExamples: if a class has too few groups for a probe to learn from half of them and be tested.
        BadDataset, UnknownOption, NotFinite, UnknownSite: as `Dataset.load`, `eraser_named` and `collect_states`.
    """
    import pandas as pd

    dataset = dataset if isinstance(dataset, Dataset) else Dataset.load(dataset)
    if dataset.kind == "numbers":
        raise BadDataset(
            f"{dataset.name!r} has numbers for labels. Fit LEACE or SAL to them; what is left is scored of classes."
        )
    named = _named(erasers, dataset, seed, device)
    states: Mapping[str, Any] = model if not isinstance(model, LanguageModel) else collect_states(
        model, dataset, sites or f"resid_post.{2 * model.n_layers // 3}", pool=pool, batch_tokens=batch_tokens,
        progress=progress,
    )  # fmt: skip
    main = None if main is None else np.unique(np.asarray(main), return_inverse=True)[1]
    if main is not None and len(main) != len(dataset):
        raise BadDataset(f"{len(main)} labels of the main task were given for {len(dataset)} examples. Give one each.")
    table, curve, points, kept = [], [], [], {}
    places = [site for site in states if site not in (BAG, EMBEDDING)]
    for site in places:
        rows = torch.as_tensor(states[site])
        if len(rows) != len(dataset):
            raise BadDataset(f"Rows of {site!r} are {len(rows)}, {dataset.name!r} has {len(dataset)} examples. Give one each.")
        rows = rows.to(device or rows.device, torch.float64 if rows.dtype == torch.float64 else torch.float32)
        about = of_model(model) if isinstance(model, LanguageModel) else model_of(states)
        own_labels = class_labels(dataset)
        dealt = np.unique(own_labels)[shuffled(dataset, np.random.default_rng(seed))]
        judge = _Judge(rows, dataset, main, mlp=mlp, seed=seed)
        for name, eraser in tqdm([("none", None), *named.items()], desc=f"erase at {site}", disable=not progress):
            labels = own_labels if name != "shuffled" else dealt
            fitted = judge.fitted(name, eraser, labels)
            table.append({"site": site, "eraser": name} | judge.row(name, fitted))
            if name == "inlp":  # the random eraser of the table is as small as the first of all: a curve of its own
                drawn = judge.random(fitted)
                for kind, own in (("inlp", fitted), ("random", drawn)):
                    curve += [{"site": site, "eraser": kind} | one for one in judge.curve(own)]
            if site == places[0] and name in ("none", "leace", "mean", "inlp", "random"):
                points.append(judge.points(name, fitted[0]))
            if eraser is not None and name != "shuffled":
                kept[f"{site}/{name}"] = fitted[0]
                fitted[0].settings_ = about | dataset.settings | {"site": site, "pool": pool, "half": 0, "seed": seed}
    shown = getattr(states, "settings", {"model": "rows at hand"}) if isinstance(states, States) else {"model": "rows at hand"}
    shares = np.bincount(dataset.index) / len(dataset)
    settings = shown | dataset.settings | {
        "erasers": {name: [type(one).__name__, _options(one)] for name, one in named.items()}, "seed": seed, "pool": pool,
        "classes": dataset.classes.tolist(), "chance": float(shares.max()), "alike": float(shares @ shares), "mlp": mlp,
        "main": main is not None,
        "concept": _said(kept), "versions": versions("scikit-learn"),
    }  # fmt: skip
    return Erasure(
        table=pd.DataFrame(table), settings=settings, curve=pd.DataFrame(curve),
        points=pd.concat(points, ignore_index=True) if points else pd.DataFrame(), erasers=kept,
    )  # fmt: skip


class _Judge:
    """One site's rows, and what is left in them after each eraser."""

    def __init__(self, rows: Tensor, dataset: Dataset, main: np.ndarray | None, *, mlp: bool, seed: int) -> None:
        self.dataset, self.main, self.mlp, self.seed = dataset, main, mlp, seed
        self.groups = dataset.groups[:, 0]
        self.halves = Half.two(rows, dataset.index, self.groups, seed)
        self.resamples = Resamples(self.groups, seed)
        self.rank = len(dataset.classes) - 1
        """Of a random subspace: that of the first eraser, or of the concept."""
        self._ranked = False

    def fitted(self, name: str, eraser: Any, labels: np.ndarray) -> list[Any]:
        """The eraser fitted to each half; None for none."""
        if eraser is None:
            return [None, None]
        found = []
        for half, other in zip(self.halves, self.halves[::-1], strict=True):
            own = _ranked(eraser, name, self.rank)
            found.append(own.fit(half.seen, labels[other.at], groups=half.groups_seen))
        if not self._ranked and name not in ("random", "shuffled"):
            self.rank, self._ranked = max(found[0].rank, 1), True
        return found

    def row(self, name: str, fitted: list[Any]) -> dict[str, Any]:
        """What the table says."""
        n, parts = len(self.dataset), []
        gaps, edits, tasks, whole = [], [], [], {}
        for half, other, eraser in zip(self.halves, self.halves[::-1], fitted, strict=True):
            seen, fresh = (one if eraser is None else eraser.transform(one) for one in (half.seen, half.fresh))
            found = hits(half, seen, fresh, mlp=self.mlp, seed=self.seed)
            parts.append((half.at, other.at, found))
            gaps.append(
                [
                    mean_gap(after, index) / max(mean_gap(before, index), 1e-300)
                    for before, after, index in ((half.seen, seen, half.index_seen), (half.fresh, fresh, half.index_fresh))
                ]
            )
            about = half.fresh - half.seen.mean(0)
            edits.append(float((fresh - half.fresh).double().square().sum() / about.double().square().sum()))
            if self.main is not None:
                tasks.append(main_task(half, seen, fresh, self.main[other.at], self.main[half.at], self.seed))
        row: dict[str, Any] = {"rank": float(np.mean([0 if one is None else one.rank for one in fitted]))}
        for column in ("linear", "linear_fresh", "mlp", "mlp_fresh", "neighbours", "neighbours_seen"):
            if getattr(parts[0][2], column) is None:
                continue
            values = np.empty(n)
            for fresh, seen, found in parts:
                values[seen if column == "neighbours_seen" else fresh] = getattr(found, column)
            low, high = interval(self.resamples.means(values))
            whole |= {column: float(values.mean()), f"{column}_low": low, f"{column}_high": high}
        row |= whole | {"gap_seen": float(np.mean(gaps, 0)[0]), "gap_fresh": float(np.mean(gaps, 0)[1])}
        row["edit"] = float(np.mean(edits))
        if tasks:
            row |= {"main_accuracy": float(np.mean([one.accuracy for one in tasks]))}
            row |= {"tpr_gap": float(np.mean([one.tpr_gap for one in tasks]))}
        return row

    def random(self, fitted: list[Any]) -> list[Any]:
        """Subspaces as large as each half's eraser."""
        return [RandomSubspace(one.rank, seed=self.seed).fit(half.seen) for one, half in zip(fitted, self.halves, strict=True)]

    def curve(self, fitted: list[Any]) -> list[dict[str, Any]]:
        """The accuracy of logistic regression after the first directions of each half's eraser."""
        most = max(one.rank for one in fitted)
        steps = sorted({0, *(round(most ** (i / 8)) for i in range(9)), most} - ({1} if most < 1 else set()))
        found = []
        for rank in steps:
            right = []
            for half, eraser in zip(self.halves, fitted, strict=True):
                some = eraser.first(min(rank, eraser.rank))
                seen, fresh = some.transform(half.seen), some.transform(half.fresh)
                probe: Any = LogisticProbe(seed=self.seed, device=str(seen.device))
                probe.fit(seen, half.index_seen, groups=half.groups_seen)
                right.append((answers(probe, fresh, half.index_seen) == half.index_fresh).mean())
            found.append({"rank": rank, "linear": float(np.mean(right))})
        return found

    def points(self, name: str, eraser: Any) -> pd.DataFrame:
        """Fresh rows of the first half in a plane: between the classes, and where they vary most across that."""
        import pandas as pd

        half = self.halves[0]
        first = half.seen.new_zeros(half.seen.shape[1])
        means = [half.seen[torch.from_numpy(half.index_seen == z).to(first.device)].mean(0) for z in (0, 1)]
        first = (means[1] - means[0]) / (means[1] - means[0]).norm()
        spread = half.seen.std(0).clamp_min(1e-12)  # a few columns of massive scale would be all there is to see
        about = (half.seen - half.seen.mean(0)) / spread
        across = about - (about @ first)[:, None] * first
        second = torch.linalg.eigh((across.T @ across).double())[1][:, -1].to(first) / spread
        fresh = half.fresh if eraser is None else eraser.transform(half.fresh)
        moved = fresh - half.seen.mean(0)
        return pd.DataFrame(
            {
                "eraser": name, "example": half.at, "group": half.groups_fresh, "label": self.dataset.labels[half.at],
                "first": (moved @ first).cpu().numpy(), "second": (moved @ second).cpu().numpy(),
            }
        )  # fmt: skip


def _named(erasers: Sequence[Any], dataset: Dataset, seed: int, device: str | None) -> dict[str, Any]:
    """
    Raises:
        UnknownOption: if there is no such eraser, or one twice.
    """
    found: dict[str, Any] = {}
    k = len(dataset.classes)
    for one in [erasers] if isinstance(erasers, str) else erasers:
        if not isinstance(one, str):
            name = next((name for name, kind in ERASERS.items() if kind == type(one).__name__), None)
            if name is None:
                raise UnknownOption(f"A {type(one).__name__} is no eraser of rows alone. Give one of {', '.join(ERASERS)}.")
            own = one
        elif one == "shuffled":
            name, own = one, eraser_named("leace", tolerance=0.0, device=device)
        else:
            options = {"rlace": {"directions": k - 1}, "random": {"seed": seed}, "inlp": {"seed": seed}}.get(one, {})
            name, own = one, eraser_named(one, device=device, **options)
        if name in found:
            raise UnknownOption(f"The eraser {name!r} is asked for twice. Compare options in two calls.")
        found[name] = own
    return found


def _ranked(eraser: Any, name: str, rank: int) -> Any:
    """A new one; a random subspace as large as the first eraser's."""
    found: Any = clone(eraser)
    return found.set_params(directions=rank) if name == "random" else found


def _options(eraser: Any) -> dict[str, Any]:
    return {
        name: value if isinstance(value, (str, int, float, type(None))) else repr(value)
        for name, value in eraser.get_params(deep=False).items()
    }


def _said(erasers: dict[str, Any]) -> dict[str, Any]:
    """Canonical correlations of the concept at each site, and what they could be by chance."""
    return {
        name.partition("/")[0]: {"correlations": one.correlations_.tolist(), "chance": one.chance_.tolist()}
        for name, one in erasers.items()
        if hasattr(one, "correlations_")
    }
