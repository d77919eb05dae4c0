"""What is summed: which sites and pairs of sites, and into which cells of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from workbench.corpus.corpus import ORDINARY, STRATA
from workbench.errors import UnknownOption, require_one_of

Detail = Literal["five", "two", "one"]
GROUPS = ("ordinary", "rest")
"""Kinds of tokens that are never mixed in a sum of products: ordinary ones, and all that are not."""


class Pair(NamedTuple):
    """A source and a target, by their sites; with `shuffled`, rows of one document beside those of another: the null."""

    source: str
    target: str
    shuffled: bool = False

    def __str__(self) -> str:
        return f"{self.source}>{self.target}" + (" shuffled" if self.shuffled else "")


class Run(NamedTuple):
    """Targets of one source that stand side by side, so that one product serves them all."""

    source: slice
    targets: slice
    """Columns of the buffer."""
    shuffled: bool
    out: slice
    """Columns of the source's sums."""


@dataclass(frozen=True)
class Layout:
    """Sites stand side by side, as columns; tokens fall into cells by stratum and by fold of their document.

    A site with itself is summed in cells of `detail` strata and `folds` folds; pairs of sites, which are many, in two groups of
    strata and `cross_folds` folds, each of them made of whole ones of the first kind.
    """

    widths: dict[str, int]
    """Of each site, in the order of columns."""
    pairs: tuple[Pair, ...]
    detail: Detail = "five"
    folds: int = 5
    cross_folds: int = 2

    def __post_init__(self) -> None:
        require_one_of("detail", self.detail, ("five", "two", "one"))
        if not 1 <= self.cross_folds <= self.folds:
            raise UnknownOption(
                f"folds={self.folds}, cross_folds={self.cross_folds}: there are 1 or more, and no more cross folds than folds."
            )

    @property
    def width(self) -> int:
        """Columns in all."""
        return sum(self.widths.values())

    @property
    def groups(self) -> tuple[str, ...]:
        return ("all",) if self.detail == "one" else GROUPS

    @property
    def strata(self) -> tuple[str, ...]:
        """Kinds of tokens that a site with itself is summed for."""
        return {"five": STRATA, "two": GROUPS, "one": ("all",)}[self.detail]

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Of each site."""
        ends = np.cumsum(list(self.widths.values())).tolist()
        return {site: slice(end - width, end) for (site, width), end in zip(self.widths.items(), ends, strict=True)}

    @cached_property
    def targets(self) -> dict[str, dict[Pair, slice]]:
        """By source, its pairs with their columns in the source's sums: shuffled ones last, sites in order."""
        order, found = list(self.widths), {}
        for pair in sorted(self.pairs, key=lambda pair: (pair.shuffled, order.index(pair.target))):
            own = found.setdefault(pair.source, {})
            start = next(reversed(own.values())).stop if own else 0
            own[pair] = slice(start, start + self.widths[pair.target])
        return found

    @cached_property
    def runs(self) -> dict[str, list[Run]]:
        """By source, the products to make."""
        found: dict[str, list[Run]] = {}
        for source, targets in self.targets.items():
            runs = found.setdefault(source, [])
            for pair, out in targets.items():
                at, last = self.columns[pair.target], runs[-1] if runs else None
                if last and last.shuffled == pair.shuffled and last.targets.stop == at.start:
                    runs[-1] = last._replace(targets=slice(last.targets.start, at.stop), out=slice(last.out.start, out.stop))
                else:
                    runs.append(Run(self.columns[source], at, pair.shuffled, out))
        return found

    def group_of(self, stratum: np.ndarray) -> np.ndarray:
        """Index into `groups` of tokens, by their index into the corpus's `STRATA`."""
        return np.zeros_like(stratum) if self.detail == "one" else (stratum != ORDINARY).astype(stratum.dtype)

    def stratum_of(self, stratum: np.ndarray) -> np.ndarray:
        """Index into `strata`, likewise."""
        return stratum if self.detail == "five" else self.group_of(stratum)

    def cross_fold(self, fold: Any) -> Any:
        """The fold of pairs that a fold of sites, or each of an array of them, is part of."""
        return fold % self.cross_folds

    def folds_of(self, cross_folds: Iterable[int]) -> list[int]:
        """The folds that some folds of pairs are made of."""
        wanted = set(cross_folds)
        return [fold for fold in range(self.folds) if self.cross_fold(fold) in wanted]

    def strata_in(self, group: str) -> list[int]:
        """Indices into `strata` of what a group is made of."""
        if self.detail == "five":
            return [ORDINARY] if group == "ordinary" else [i for i in range(len(STRATA)) if i != ORDINARY]
        return [self.groups.index(group)]

    def sums_bytes(self) -> int:
        """Of all sums in float64."""
        own = sum(width * width for width in self.widths.values()) * len(self.strata) * self.folds
        cross = sum(self.widths[pair.source] * self.widths[pair.target] for pair in self.pairs)
        return 8 * (own + cross * len(self.groups) * self.cross_folds)

    def operations(self) -> int:
        """Floating-point operations a token."""
        own = sum(width * width for width in self.widths.values())
        return 2 * (own + sum(self.widths[pair.source] * self.widths[pair.target] for pair in self.pairs))


def pairs_between(sites: Sequence[str], kind: Literal["adjacent", "last", "all"]) -> list[Pair]:
    """Pairs of sites, each source before its target: neighbours, each with the last, or every two."""
    require_one_of("pairs", kind, ("adjacent", "last", "all"))
    chosen = {
        "adjacent": [(i, i + 1) for i in range(len(sites) - 1)],
        "last": [(i, len(sites) - 1) for i in range(len(sites) - 1)],
        "all": [(i, j) for i in range(len(sites)) for j in range(i + 1, len(sites))],
    }[kind]
    return [Pair(sites[i], sites[j]) for i, j in chosen]
