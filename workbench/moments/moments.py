"""Second moments of a model's activations over a corpus, by kind of token and fold of documents: read, merged, saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from workbench.errors import NotComparable, UnknownOption, require_one_of
from workbench.moments.joint import Joint
from workbench.moments.layout import Layout, Pair

Strata = Literal["all", "ordinary", "rest"]
NOISE = {"float64": 0.0, "float32": 2.0**-23, "bfloat16": 2.0**-20, "float16": 2.0**-20}
"""Of sums of products made in these, relative to their trace."""
MOST_UNSHUFFLED = 0.1
"""A null with more tokens beside their own document is none."""


@dataclass(eq=False)
class Sums:
    """Counts and sums about a pilot mean, float64; every one of them is a sum over tokens."""

    pilot: Tensor
    """`[group, column]`, from which rows are counted; has_pilot says of which groups a token was seen."""
    has_pilot: Tensor
    n: Tensor
    """`[stratum, fold]`, int64."""
    total: dict[str, Tensor]
    """By site, `[stratum, fold, width]`."""
    own: dict[str, Tensor]
    """By site, `[stratum, fold, width, width]`."""
    cross: dict[str, Tensor]
    """By source, `[group, cross_fold, width, columns of its targets]`: see `Layout.targets`."""
    unshuffled: Tensor
    """`[group, cross_fold]`: tokens that stood beside one of their own document in shuffled pairs."""

    @classmethod
    def zeros(cls, layout: Layout, device: torch.device | str = "cpu") -> Sums:
        cells, crossed = (len(layout.strata), layout.folds), (len(layout.groups), layout.cross_folds)

        def zeros(*shape: int) -> Tensor:
            if torch.device(device).type == "cpu":
                return torch.from_numpy(np.zeros(shape))  # the pages of a cell without tokens are never touched
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            pilot=zeros(len(layout.groups), layout.width),
            has_pilot=torch.zeros(len(layout.groups), dtype=torch.bool),
            n=torch.zeros(cells, dtype=torch.int64),
            total={site: zeros(*cells, width) for site, width in layout.widths.items()},
            own={site: zeros(*cells, width, width) for site, width in layout.widths.items()},
            cross={
                source: zeros(*crossed, layout.widths[source], max(own.stop for own in targets.values()))
                for source, targets in layout.targets.items()
            },
            unshuffled=torch.zeros(crossed, dtype=torch.int64),
        )

    def finished(self, device: torch.device) -> Sums:
        """These sums on a device, in place where they are there already; those of sites with themselves, of which only what
        lies below the diagonal was added up, made whole."""
        self.pilot = self.pilot.to(device)
        for arrays in (self.total, self.cross):
            for name, array in arrays.items():
                arrays[name] = array.to(device)
        for site, own in self.own.items():
            for stratum, fold in self.n.nonzero().tolist():
                cell = own[stratum, fold].tril_()
                cell += cell.tril(-1).T
            self.own[site] = own.to(device)
        return self

    def about(self, pilot: Tensor, layout: Layout) -> Sums:
        """The same sums about other pilots, exactly: with e = old - new, (x - new)(y - new)ᵀ = (x - old + e)(y - old + e)ᵀ."""
        moved = Sums.zeros(layout, pilot.device)
        moved.pilot, moved.has_pilot, moved.n, moved.unshuffled = pilot, self.has_pilot, self.n, self.unshuffled
        by = self.pilot - pilot
        for index, group in enumerate(layout.groups):
            cells = layout.strata_in(group)
            for site, columns in layout.columns.items():
                e, s = by[index, columns], self.total[site][cells]
                n = self.n[cells].to(e)[..., None]
                moved.total[site][cells] = s + n * e
                crossed = s[..., :, None] * e + e[:, None] * s[..., None, :]
                moved.own[site][cells] = self.own[site][cells] + crossed + n[..., None] * torch.outer(e, e)
            for cross in range(layout.cross_folds):
                folds = layout.folds_of([cross])
                n = float(self.n[cells][:, folds].sum())
                for source, targets in layout.targets.items():
                    into = moved.cross[source][index, cross]
                    into += self.cross[source][index, cross]
                    for pair, out in targets.items():
                        ex, ey = by[index, layout.columns[source]], by[index, layout.columns[pair.target]]
                        sx, sy = (self.total[site][cells][:, folds].sum((0, 1)) for site in (source, pair.target))
                        into[:, out] += torch.outer(sx, ey) + torch.outer(ex, sy) + n * torch.outer(ex, ey)
        return moved

    def plus(self, other: Sums) -> Sums:
        """Of all tokens of both, which must be about the same pilots."""

        def added(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value + b[name] for name, value in a.items()}

        return Sums(
            self.pilot, self.has_pilot | other.has_pilot, self.n + other.n, added(self.total, other.total),
            added(self.own, other.own), added(self.cross, other.cross), self.unshuffled + other.unshuffled,
        )  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Count, mean `[d]` and centred sum of products `[d, d]` of a site's rows; float64."""

    n: int
    mean: Tensor
    xx: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """Sums over the tokens of a corpus, from which every union of strata and folds can be read. `moments + other` adds the
    tokens of other parts of the same corpus."""

    layout: Layout
    sums: Sums
    settings: dict[str, Any]
    """Model, corpus, options, and which parts of the corpus were read."""

    def __repr__(self) -> str:
        tokens = ", ".join(f"{int(n):,} {name}" for name, n in zip(self.layout.strata, self.sums.n.sum(1), strict=True) if n)
        return (
            f"Moments of {self.settings['model']!r} over {self.settings['corpus']!r}: {len(self.layout.widths)} sites, "
            f"{len(self.layout.pairs)} pairs; tokens: {tokens}"
        )

    @property
    def pairs(self) -> list[Pair]:
        """Sources and targets, without the shuffled ones."""
        return [pair for pair in self.layout.pairs if not pair.shuffled]

    def has_null(self, pair: Pair) -> bool:
        """Whether a pair was also summed with its documents shuffled, and there were enough of these to be a null."""
        return pair._replace(shuffled=True) in self.layout.pairs and self.unshuffled <= MOST_UNSHUFFLED

    @property
    def unshuffled(self) -> float:
        """The share of tokens that stood beside one of their own document in shuffled pairs: all of them, where a fold has only
        one document."""
        return int(self.sums.unshuffled.sum()) / max(int(self.sums.n.sum()), 1)

    def noise(self, site: str, cross_folds: Sequence[int] | None = None) -> float:
        """What eigenvalues of a site's sums may be wrong by: ordinary tokens are multiplied in lower precision."""
        epsilon = NOISE[self.settings["products"]]
        folds = self.layout.folds_of(self._folds(cross_folds, self.layout.cross_folds))
        name = self.layout.groups[0]
        return epsilon * float(self.spread(site, name, folds).xx.trace()) if epsilon else 0.0

    def spread(self, site: str, strata: Strata | Sequence[str] = "all", folds: Sequence[int] | None = None) -> Spread:
        """Of one site.

        Args:
            strata: `all`, `ordinary`, `rest`, or names of single strata, if these were kept apart.
            folds: Folds of documents; all, if None.
        Raises:
            UnknownOption: if the site was not summed, or no such stratum or fold kept apart.
        """
        if site not in self.layout.columns:
            raise UnknownOption(f"Site {site!r} is not in these moments. They have {', '.join(self.layout.widths)}.")
        chosen = self._folds(folds, self.layout.folds)
        total: Joint | None = None
        for group, cells in self._cells(strata):
            n = int(self.sums.n[cells][:, chosen].sum())
            s, pilot = self.sums.total[site][cells][:, chosen].sum((0, 1)), self.sums.pilot[group, self.layout.columns[site]]
            own = self.sums.own[site][cells][:, chosen].sum((0, 1))
            mean = s / max(n, 1)
            xx = own - n * torch.outer(mean, mean)
            part = Joint(n, pilot + mean, pilot + mean, xx, xx, xx)
            total = part if total is None else total.plus(part)
        assert total is not None
        return Spread(total.n, total.mean_x, total.xx)

    def joint(
        self,
        pair: Pair,
        strata: Strata | Sequence[str] = "all",
        cross_folds: Sequence[int] | None = None,
        *,
        shuffled: bool = False,
    ) -> Joint:
        """Of a source and a target.

        Args:
            strata: `all`, `ordinary` or `rest`.
            cross_folds: Folds of pairs; all, if None.
            shuffled: Of the source in one document beside the target in another.
        Raises:
            UnknownOption: if the pair was not summed, or no such stratum or fold kept apart.
        """
        wanted = pair._replace(shuffled=shuffled)
        columns = self.layout.targets.get(pair.source, {}).get(wanted)
        if columns is None:
            raise UnknownOption(f"The pair {wanted} is not in these moments. They have {_listed(self.layout.pairs)}.")
        chosen = self._folds(cross_folds, self.layout.cross_folds)
        folds, total = self.layout.folds_of(chosen), None
        for group, cells in self._cells(strata):
            if cells != self.layout.strata_in(self.layout.groups[group]):
                raise UnknownOption(
                    f"strata={strata!r}: pairs are summed for {', '.join(('all', *self.layout.groups))} alone. Take one."
                )
            name = self.layout.groups[group]
            x, y = (self.spread(site, name if len(self.layout.groups) > 1 else "all", folds) for site in pair[:2])
            if not x.n:
                continue
            pilot_x, pilot_y = (self.sums.pilot[group, self.layout.columns[site]] for site in pair[:2])
            xy = self.sums.cross[pair.source][group, :, :, columns][chosen].sum(0)
            part = Joint(x.n, x.mean, y.mean, x.xx, xy - x.n * torch.outer(x.mean - pilot_x, y.mean - pilot_y), y.xx)
            total = part if total is None else total.plus(part)
        if total is None:
            none = (self.sums.pilot.new_zeros(0, self.layout.widths[site]) for site in (pair.source, pair.target))
            return Joint.of(*none)
        return total

    def save(self, folder: str | Path) -> Path:
        """Write moments.safetensors and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written, or the disk has no room.
        """
        from workbench.moments.files import save_moments

        return save_moments(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Moments:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no moments, or damaged ones.
        """
        from workbench.moments.files import load_moments

        return load_moments(folder)

    def __add__(self, other: Moments) -> Moments:
        """
        Raises:
            NotComparable: if they are of other models, corpora, sites or options, or share a part of the corpus.
        """
        mine, theirs = self.settings, other.settings
        differing = [key for key in mine if key != "corpus_parts" and mine[key] != theirs.get(key)]
        if differing or self.layout != other.layout:
            what = ", ".join(f"{key} is {mine[key]!r} here and {theirs.get(key)!r} there" for key in differing[:3])
            raise NotComparable(
                f"These moments cannot be added: {what or 'they have other sites, pairs or cells'}. Collect both alike, from "
                "parts of one corpus through one model."
            )
        for i, of in mine["corpus_parts"]:
            for j, of_other in theirs["corpus_parts"]:
                if (i - j) % math.gcd(of, of_other) == 0:
                    raise NotComparable(
                        f"Part {i} of {of} and part {j} of {of_other} share tokens, which would count twice. Add another part."
                    )
        pilot = torch.where(self.sums.has_pilot[:, None].to(self.sums.pilot.device), self.sums.pilot, other.sums.pilot)
        left, right = (
            sums if torch.equal(sums.pilot, pilot) else sums.about(pilot, self.layout) for sums in (self.sums, other.sums)
        )
        parts = sorted([*map(list, mine["corpus_parts"]), *map(list, theirs["corpus_parts"])])
        return Moments(self.layout, left.plus(right), mine | {"corpus_parts": parts})

    def _cells(self, strata: Strata | Sequence[str]) -> list[tuple[int, list[int]]]:
        """Groups with the indices of strata in them."""
        layout = self.layout
        names = [strata] if isinstance(strata, str) else list(strata)
        known = dict.fromkeys(("all", *layout.groups, *layout.strata))
        for name in names:
            require_one_of("strata", name, tuple(known))
        wanted = {
            cell
            for name in names
            for group in layout.groups
            for cell in layout.strata_in(group)
            if name in ("all", group, layout.strata[cell])
        }
        found = [(i, [cell for cell in layout.strata_in(group) if cell in wanted]) for i, group in enumerate(layout.groups)]
        return [(group, cells) for group, cells in found if cells]

    @staticmethod
    def _folds(folds: Sequence[int] | None, n: int) -> list[int]:
        chosen = list(range(n)) if folds is None else list(dict.fromkeys(folds))
        for fold in chosen:
            require_one_of("fold", fold, tuple(range(n)))
        return chosen


def _listed(pairs: Sequence[Pair]) -> str:
    shown = [str(pair) for pair in pairs[:6]]
    return ", ".join(shown) + (f", and {len(pairs) - 6} more" if len(pairs) > 6 else "")
