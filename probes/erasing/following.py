"""Erase, then follow: how much of a concept is linearly back some layers on, and how much a linear map would carry there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.dataset import Dataset
from probes.erasers.closed_forms import RandomSubspace
from probes.estimators.logistic import LogisticProbe
from probes.evaluation.cross_fit import cross_fit
from probes.evaluation.scores import Resamples, interval
from probes.evaluation.splits import Splits
from probes.folds import folds_by_group
from probes.states import Pool, collect_states
from workbench.analyses.lens import layer_of
from workbench.artifacts import read_tables, write_tables
from workbench.errors import NotComparable
from workbench.intervention import intervene
from workbench.model import LanguageModel
from workbench.moments.joint import Joint
from workbench.results import Result, versions, wrapped
from workbench.sites import Site, depth, parse_sites
from workbench.transports.solving import Spectrum, chosen_strength, least_squares
from workbench.transports.transport import Transport

if TYPE_CHECKING:
    import plotly.graph_objects as go

KIND, MAKER = "followed", "workbench erase --follow or probes.follow(...).save"
FOLDS = 5


@dataclass(frozen=True, eq=False, repr=False)
class Followed(Result):
    """A row a later site. Accuracies are of logistic regression, learnt and tested on states of that kind, groups held out;
    with _low and _high of resampled groups.

    Columns: site, layer, untouched, erased (after erasing at the source), random (a random subspace there), predicted (where
    the change at the source is carried on by a linear map alone: untouched state - change T), change_r2 (how much of the
    change of the state, about its mean, the map foretells), change_size (norm of the change over that of the state about its
    mean).
    """

    def plot(self) -> go.Figure:
        """Accuracy by layer."""
        from probes.erasing.plots import plot_followed

        return plot_followed(self)

    def save(self, folder: str | Path) -> Path:
        """Write followed.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return write_tables(folder, KIND, self.settings, {KIND: self.table})

    @classmethod
    def load(cls, folder: str | Path) -> Followed:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no complete result of this kind.
        """
        table, _, settings = read_tables(folder, KIND, MAKER, [])
        return cls(table=table, settings=settings)

    def __str__(self) -> str:
        own, first, last = self.settings, self.table.iloc[0], self.table.iloc[-1]
        shown = self.table[["site", "untouched", "erased", "erased_low", "erased_high", "random", "predicted", "change_r2"]]
        back = self.table[self.table["erased_low"] > own["chance"]]
        said = (
            f"Right after it the concept is read off with {first['erased']:.3f} (chance {own['chance']:.3f}, untouched "
            f"{first['untouched']:.3f}); at {last['site']} with {last['erased']:.3f} (untouched {last['untouched']:.3f}). "
        ) + (
            f"It is linearly back from {back['site'].iloc[0]} on."
            if len(back)
            else "It does not come back at any site looked at."
        )
        head = (
            f"{own['dataset']} erased at {own['source']} of {own['model']} ({own['eraser']}, rank {own['rank']}), and followed"
        )
        return "\n".join(
            [head, shown.to_string(index=False, float_format=lambda x: f"{x:.3f}"), wrapped(said), "  .table .plot()"]
        )


def follow(
    model: LanguageModel,
    eraser: Any,
    dataset: Dataset | str,
    sites: str | Sequence[str] | None = None,
    *,
    transports: Sequence[Transport] = (),
    pool: Pool = "last",
    skip: int = 1,
    seed: int = 0,
    device: str | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> Followed:
    """Erase at the eraser's site, run on, and probe the states above it.

    Args:
        eraser: Fitted to a site of this model.
        sites: Where to look; the same site and all states above it, if None.
        dataset: Better not what the eraser was fitted to: see `Dataset.halves`.
        transports: Maps from the eraser's site; where there is none to a site, one is fitted by ridge regression to the
            dataset's own untouched states, for each fold of groups to those of the others.
    Raises:
        OtherJob: if the eraser, or a transport, was fitted to another model.
        NotComparable: if a site lies below the eraser's.
    """
    import pandas as pd

    dataset = dataset if isinstance(dataset, Dataset) else Dataset.load(dataset)
    edit = eraser.as_edit(model=model, skip=skip)
    for one in transports:
        one.require_model(model)
    source = parse_sites([edit.site], model.n_layers)[0]
    least = depth(source, model.n_layers)
    states = [Site("resid_post", layer) for layer in range(model.n_layers)]
    above = [str(one) for one in states if depth(one, model.n_layers) > least]
    wanted = [
        str(one) for one in parse_sites([sites] if isinstance(sites, str) else sites or [str(source), *above], model.n_layers)
    ]
    if below := [one for one in wanted if depth(parse_sites([one], model.n_layers)[0], model.n_layers) < least]:
        raise NotComparable(f"{below[0]} is computed before {source}, where the concept is erased: nothing can change there.")
    drawn = RandomSubspace(eraser.rank, seed=seed).fit(eraser.center_[None])
    options: dict[str, Any] = {"pool": pool, "batch_tokens": batch_tokens, "progress": progress}
    untouched = collect_states(model, dataset, [*dict.fromkeys([str(source), *wanted])], **options)
    with intervene(model, edit):
        erased = collect_states(model, dataset, wanted, **options)
    with intervene(model, drawn.as_edit(str(source), skip=skip)):
        random = collect_states(model, dataset, wanted, **options)
    before = untouched[str(source)].double()
    change = before - eraser.transform(before)
    splits = Splits.of(folds_by_group(dataset.index, dataset.groups[:, 0], FOLDS, seed))
    resamples = Resamples(dataset.groups[:, 0], seed)
    parts = _Parts.of(before, splits)
    given, rows = {one.target: one for one in transports if one.source == str(source)}, []
    for site in wanted:
        after = untouched[site].double()
        own = given.get(site)
        carried = parts.carried(before, after, change) if own is None else change @ own.matrix.double().cpu()
        moved = after - erased[site].double()
        row: dict[str, Any] = {"site": site, "layer": layer_of(site)}
        kinds = {"untouched": after, "erased": erased[site], "random": random[site], "predicted": after - carried}
        for name, states in kinds.items():
            row |= _scored(name, states.to(device or "cpu", torch.float32), dataset, splits, resamples, seed)
        about = moved - moved.mean(0)
        off = (moved - carried) - (moved - carried).mean(0)
        row["change_r2"] = float(1 - off.square().sum() / about.square().sum().clamp_min(1e-300))
        row["change_size"] = float(moved.norm() / (after - after.mean(0)).norm())
        rows.append(row)
    settings = untouched.settings | {
        "eraser": type(eraser).__name__, "rank": eraser.rank, "source": str(source), "skip": skip, "seed": seed,
        "transports": "given" if transports else "ridge on the set's own states, other groups",
        "chance": float(np.bincount(dataset.index).max() / len(dataset)), "versions": versions("scikit-learn"),
    }  # fmt: skip
    return Followed(table=pd.DataFrame(rows), settings=settings)


class _Parts(NamedTuple):
    """Folds of groups, and what a linear map of the others' states needs."""

    train: list[Tensor]
    test: list[Tensor]
    spectra: list[Spectrum]

    @classmethod
    def of(cls, before: Tensor, splits: Splits) -> _Parts:
        train, test = ([torch.from_numpy(np.flatnonzero(one)) for one in side.T] for side in (splits.train, splits.test))
        return cls(train, test, [Spectrum.of(Joint.of(before[one], before[one][:, :0]).xx) for one in train])

    def carried(self, before: Tensor, after: Tensor, change: Tensor) -> Tensor:
        """The change at the source, carried on by a ridge map fitted to the states of other groups."""
        found = torch.zeros_like(after)
        for train, test, spectrum in zip(*self, strict=True):
            joint = Joint.of(before[train], after[train])
            found[test] = change[test] @ least_squares(spectrum, joint.xy, chosen_strength(spectrum, joint))
        return found


def _scored(name: str, rows: Tensor, dataset: Dataset, splits: Splits, resamples: Resamples, seed: int) -> dict[str, float]:
    probe = LogisticProbe(seed=seed, device=str(rows.device))
    (log_p,), _ = cross_fit(probe, rows, dataset.index[:, None], len(dataset.classes), splits, dataset.groups[:, 0])
    hits = (log_p.argmax(1) == dataset.index).astype(float)
    low, high = interval(resamples.means(hits))
    return {name: float(hits.mean()), f"{name}_low": low, f"{name}_high": high}
