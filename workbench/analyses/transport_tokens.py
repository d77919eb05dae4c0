"""A second pass over the corpus, with the maps at hand: scores on the tokens where a direction is active, and intervals.

Tokens where a direction is active are those that lie more than two standard deviations (`ACTIVE`) above its mean: what a
feature of a dictionary would call its own. Scores there suffer from the narrower range, and say nothing of false alarms: they
stand beside those of all tokens, and with `f1`, of telling active tokens by the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.analyses.transport_directions import Chosen
from workbench.analyses.transport_pairs import Split
from workbench.corpus.corpus import ORDINARY
from workbench.moments.layout import Layout, Pair
from workbench.moments.moments import Strata
from workbench.streaming.token_batch import TokenBatch
from workbench.transports.fit import Fitted, Fitting
from workbench.transports.prediction import Along
from workbench.transports.solving import Metric

ACTIVE = 2.0
FEWEST = 30
"""Active tokens, in two documents or more, below which a direction is not scored on them."""
GROUPS = 60
"""Of documents, for intervals, to each fold: those of a group are drawn together, so that memory does not grow with them."""
FEWEST_GROUPS = 5
DRAWS = 1000


@dataclass(eq=False)
class TokenScores:
    """Sums over the tokens of one pair, group of documents by group."""

    pair: Pair
    chosen: Chosen
    maps: Sequence[tuple[int, Fitted]]
    """A fold and the map that was fitted without it."""
    layout: Layout
    strata: Strata
    mean: Tensor
    """Of the target, from which all is counted."""
    threshold: Tensor
    """`[direction]`, above the mean."""
    roots: dict[str, Tensor | None]
    """Of the metrics to score in, by the column of the scores; None: the plain one."""
    sums: Tensor = field(init=False)
    """`[fold, group, all tokens and active ones, direction, (1, a, â, a², â², aâ)]`."""
    told: Tensor = field(init=False)
    """`[direction, (active and told, told)]`."""
    whole: dict[str, Tensor] = field(init=False)
    """By metric, `[fold, group, (1, |y - ŷ|², |y|²)]`; y counted from the mean."""
    total: dict[str, Tensor] = field(init=False)
    """By metric, `[fold, group, width]`: of y."""

    def __post_init__(self) -> None:
        cells, f = (len(self.maps), GROUPS), len(self.chosen.rows)
        self.sums = torch.zeros(*cells, 2, f, 6, dtype=torch.float64)
        self.told = torch.zeros(f, 2, dtype=torch.float64)
        self.whole = {name: torch.zeros(*cells, 3, dtype=torch.float64) for name in self.roots}
        widths = {name: len(self.mean) if root is None else root.shape[1] for name, root in self.roots.items()}
        self.total = {name: torch.zeros(*cells, width, dtype=torch.float64) for name, width in widths.items()}

    @classmethod
    def of(
        cls, fitting: Fitting, pair: Pair, chosen: Chosen, splits: Sequence[Split], weights: Mapping[str, Metric]
    ) -> TokenScores:
        """
        Args:
            weights: Further metrics of the target, by the column of their scores.
        """
        moments, strata = fitting.moments, fitting.strata
        spread = moments.spread(pair.target, strata)
        rows = chosen.rows.to(spread.xx)
        deviation = (((rows @ spread.xx) * rows).sum(1) / max(spread.n, 1)).clamp_min(0).sqrt()
        maps = [(one.fold, one.fitted) for one in splits]
        roots: dict[str, Tensor | None] = {"held_out": None}
        roots |= {"whitened_held_out": Metric.whitening(fitting.spectrum(pair.target)).root}
        roots |= {name: metric.root for name, metric in weights.items()}
        return cls(pair, chosen, maps, moments.layout, strata, spread.mean.cpu(), ACTIVE * deviation.cpu(), roots)

    def __call__(self, batch: TokenBatch) -> None:
        """Add the tokens of a batch."""
        ordinary, document = batch.tokens.stratum == ORDINARY, batch.tokens.document
        wanted = {"all": np.ones_like(ordinary), "ordinary": ordinary, "rest": ~ordinary}[self.strata]
        folds = self.layout.cross_fold(document % self.layout.folds)
        x, y = (batch[site].flatten(1) for site in self.pair[:2])
        dtype = torch.promote_types(x.dtype, torch.float32)
        device = x.device
        rows, mean, threshold = (one.to(device, dtype) for one in (self.chosen.rows, self.mean, self.threshold))
        for index, (fold, fitted) in enumerate(self.maps):
            at = np.flatnonzero(wanted & (folds == fold))
            if not len(at):
                continue
            here = torch.from_numpy(at).to(device)
            group = torch.from_numpy(document[at] // self.layout.folds % GROUPS).long()
            target = y[here].to(dtype) - mean
            predicted = x[here].to(dtype) @ fitted.matrix.to(device, dtype) + (fitted.bias.to(device, dtype) - mean)
            self._add_whole(index, group, target, predicted)
            a, b = (target @ rows.T).double().cpu(), (predicted @ rows.T).double().cpu()
            products = torch.stack([torch.ones_like(a), a, b, a * a, b * b, a * b], -1)
            active, told = a > threshold.double().cpu(), b > threshold.double().cpu()
            self.sums[index, :, 0].index_add_(0, group, products)
            self.sums[index, :, 1].index_add_(0, group, products * active[..., None])
            self.told += torch.stack([(active & told).sum(0), told.sum(0)], -1)

    def _add_whole(self, fold: int, group: Tensor, target: Tensor, predicted: Tensor) -> None:
        for name, root in self.roots.items():
            y, missed = target, target - predicted
            if root is not None:
                y, missed = y @ root.to(y), missed @ root.to(y)
            squares = torch.stack([missed.square().sum(1), y.square().sum(1)], 1).double().cpu()
            self.whole[name][fold].index_add_(0, group, torch.cat([torch.ones_like(squares[:, :1]), squares], 1))
            self.total[name][fold].index_add_(0, group, y.double().cpu())

    def intervals(self, seed: int) -> dict[str, tuple[float, float]]:
        """95 % of the held-out R² over draws of documents, by metric; nan with fewer than `FEWEST_GROUPS` of these in a
        fold."""
        if not self._has_enough:
            return dict.fromkeys(self.roots, (float("nan"), float("nan")))
        ends = {}
        for name in self.roots:
            found = [self._whole_r2(name, drawn) for drawn in self._draws(seed, 100)]
            low, high = np.nanquantile(torch.cat(found).numpy(), [0.025, 0.975])
            ends[name] = float(low), float(high)
        return ends

    def columns(self, seed: int) -> dict[str, list[Any]]:
        """What the second pass adds to the rows of directions: low and high (95 % over documents), and of active tokens n, the
        share of their squares about the mean of all that is explained, R² (about their own mean), correlation, slope, f1, and
        why they were not scored, if they were not."""
        if not len(self.chosen.rows):
            return {}
        drawn = [Along.of_sums(torch.einsum("dfg,fg...->fd...", own, self.sums[:, :, 0])).r2 for own in self._draws(seed, 50)]
        low, high = np.nanquantile(torch.cat(drawn).numpy(), [0.025, 0.975], axis=0)
        if not self._has_enough:
            low = high = np.full(len(low), np.nan)
        of_active = self.sums[:, :, 1]
        active, n = Along.of_sums(of_active.sum(1)), of_active[..., 0].sum((0, 1))
        groups = (of_active[..., 0] > 0).sum((0, 1))
        enough = (n >= FEWEST) & (groups >= 2)
        f1 = 2 * self.told[:, 0] / (n + self.told[:, 1]).clamp_min(1)
        notes = [
            "" if fine else f"{int(tokens)} active tokens in {int(texts)} groups of documents; {FEWEST} in 2 are needed"
            for fine, tokens, texts in zip(enough.tolist(), n.tolist(), groups.tolist(), strict=True)
        ]
        error, squares = active.error, of_active[..., 3].sum((0, 1))
        scored = {
            name: torch.where(enough, values, torch.nan).tolist()
            for name, values in (
                ("active_explained", 1 - error / squares), ("active_r2", active.r2),
                ("active_correlation", active.correlation), ("active_slope", active.slope), ("f1", f1),
            )
        }  # fmt: skip
        return {"low": low.tolist(), "high": high.tolist(), "active_n": n.long().tolist(), **scored, "note": notes}

    @property
    def _has_enough(self) -> bool:
        return bool((self._there.sum(1) >= FEWEST_GROUPS).all())

    @property
    def _there(self) -> Tensor:
        """Which groups hold tokens, `[fold, group]`."""
        return self.whole["held_out"][..., 0] > 0

    def _draws(self, seed: int, at_once: int):
        """How often each group of documents is in each draw, `[draws, fold, group]`, some draws at once: groups that hold
        tokens are drawn with replacement."""
        random = np.random.default_rng(seed)
        there = self._there.flatten().numpy()
        for start in range(0, DRAWS, at_once):
            counts = random.multinomial(there.sum(), there / there.sum(), min(at_once, DRAWS - start))
            yield torch.from_numpy(counts).double().view(-1, *self._there.shape)

    def _whole_r2(self, name: str, drawn: Tensor) -> Tensor:
        n, error, squares = torch.einsum("dfg,fgk->dfk", drawn, self.whole[name]).unbind(-1)
        total = torch.einsum("dfg,fgw->dfw", drawn, self.total[name])
        return 1 - error.sum(1) / (squares - total.square().sum(-1) / n.clamp_min(1)).sum(1)
