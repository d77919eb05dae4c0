"""What each block, attention and MLP is given and what it adds to the stream: their joint moments, and how the stream turns.

Three sites of a layer suffice: what enters the block (x), what attention adds (a), what the MLP adds (m). The block adds a + m;
the MLP of a block that is not parallel reads x + a. Sums of what is added are better than differences of states, in which
float32 loses what a small addition to a large state explains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from workbench.corpus.corpus import ORDINARY
from workbench.model import LanguageModel
from workbench.moments.joint import Joint
from workbench.moments.layout import Pair
from workbench.moments.moments import Moments, Strata
from workbench.sites import state
from workbench.streaming.token_batch import TokenBatch
from workbench.transports.solving import Spectrum

Part = Literal["block", "attn", "mlp"]
PARTS: tuple[Part, ...] = get_args(Part)


class LayerSites(NamedTuple):
    """Names of the sites of a layer."""

    x: str
    a: str
    m: str
    parallel: bool

    @classmethod
    def of(cls, model: LanguageModel, layer: int) -> LayerSites:
        return cls(
            state(layer, model.n_layers), f"attn_out.{layer}", f"mlp_out.{layer}", model.block_row(layer).parallel
        )  # fmt: skip

    @property
    def pairs(self) -> list[str]:
        """What must be summed together."""
        return [f"{self.x}>{self.a}", f"{self.x}>{self.m}", f"{self.a}>{self.m}"]

    @property
    def null_pairs(self) -> list[str]:
        """What must be summed together with the target from another document."""
        return [f"{source}>{target}" for source in (self.x, self.a) for target in (self.x, self.a, self.m)]

    def reads(self, part: Part) -> tuple[str, ...]:
        """Sites whose sum a part reads."""
        return (self.x, self.a) if part == "mlp" and not self.parallel else (self.x,)

    def adds(self, part: Part) -> tuple[str, ...]:
        """Sites whose sum a part adds to the stream."""
        return {"block": (self.a, self.m), "attn": (self.a,), "mlp": (self.m,)}[part]


class LayerMoments:
    """Joint moments of what a layer's parts read and add, over one choice of tokens."""

    def __init__(self, moments: Moments, sites: LayerSites, strata: Strata, folds: Sequence[int] | None = None) -> None:
        self.moments, self.sites, self.folds = moments, sites, folds
        self.strata: Strata = strata
        self._known: dict[Pair, Joint] = {}
        self._spectra: dict[tuple[str, ...], Spectrum] = {}

    def spectrum(self, part: Part) -> Spectrum:
        """Of what a part reads: the block's is attention's."""
        reads = self.sites.reads(part)
        if reads not in self._spectra:
            noise = sum(self.moments.noise(site, self.folds) for site in reads)
            self._spectra[reads] = Spectrum.of(self.joint(part, residual=False).xx, noise)
        return self._spectra[reads]

    def joint(self, part: Part, *, residual: bool, elsewhere: Sequence[str] = ()) -> Joint:
        """Of what a part reads and what it adds, or, with the residual, the stream after it.

        Args:
            elsewhere: Sites that are taken from another document in the target: all of them for the null.
        """
        reads = self.sites.reads(part)
        targets = (*reads, *self.sites.adds(part)) if residual else self.sites.adds(part)
        means = {site: self._pair(Pair(site, self._other(site))).mean_x for site in dict.fromkeys([*reads, *targets])}
        return Joint(
            self._pair(Pair(self.sites.x, self.sites.a)).n,
            _sum(means[site] for site in reads), _sum(means[site] for site in targets),
            _sum(self._product(one, other) for one in reads for other in reads),
            _sum(self._product(one, other, shuffled=other in elsewhere) for one in reads for other in targets),
            _sum(self._among(one, other, elsewhere) for one in targets for other in targets),
        )  # fmt: skip

    def _among(self, one: str, other: str, elsewhere: Sequence[str]) -> Tensor:
        """Centred sum of products of two sites of the target, of which one may come from another document."""
        if (one in elsewhere) == (other in elsewhere):
            return self._product(one, other)
        return self._product(one, other, shuffled=True) if other in elsewhere else self._product(other, one, shuffled=True).T

    def _product(self, one: str, other: str, *, shuffled: bool = False) -> Tensor:
        """Centred sum of products of two sites."""
        if shuffled:
            return self._pair(Pair(one, other, True)).xy
        if one == other:
            return self._pair(Pair(one, self._other(one))).xx
        pair = Pair(one, other)
        return self._pair(pair).xy if pair in self.moments.layout.pairs else self._pair(Pair(other, one)).xy.T

    def _other(self, site: str) -> str:
        return self.sites.m if site != self.sites.m else self.sites.x

    def _pair(self, pair: Pair) -> Joint:
        if pair not in self._known:
            there = pair in self.moments.layout.pairs
            own = pair if there else Pair(pair.target, pair.source)
            found = self.moments.joint(own, self.strata, self.folds, shuffled=pair.shuffled)
            self._known[pair] = found if there else found.turned()
        return self._known[pair]


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


class Turning:
    """Mean cosine between what a part reads and the stream after it, and mean growth of the norm, over tokens."""

    def __init__(self, layers: dict[int, LayerSites]) -> None:
        self.layers = layers
        self._sums: dict[tuple[int, Part, bool], Tensor] = {}

    def __call__(self, batch: TokenBatch) -> None:
        ordinary = torch.from_numpy(batch.tokens.stratum == ORDINARY)
        for layer, sites in self.layers.items():
            x, a, m = (batch[site].float() for site in (sites.x, sites.a, sites.m))
            middle, after = x + a, x + a + m
            ends: dict[Part, tuple[Tensor, Tensor]] = {
                "block": (x, after), "attn": (x, middle), "mlp": (x, x + m) if sites.parallel else (middle, after),
            }  # fmt: skip
            for part, (before, behind) in ends.items():
                sizes = before.norm(dim=1), behind.norm(dim=1)
                cosine = (before * behind).sum(1) / (sizes[0] * sizes[1]).clamp_min(1e-30)
                found = torch.stack([cosine, sizes[1] / sizes[0].clamp_min(1e-30), torch.ones_like(cosine)]).double().cpu()
                for is_ordinary, chosen in ((True, ordinary), (False, ~ordinary)):
                    key = (layer, part, is_ordinary)
                    self._sums[key] = self._sums.get(key, 0) + found[:, chosen].sum(1)

    def of(self, layer: int, part: Part, strata: Strata) -> tuple[float, float]:
        """Cosine and growth."""
        kinds = {"all": (True, False), "ordinary": (True,), "rest": (False,)}[strata]
        cosine, growth, n = torch.stack([self._sums[layer, part, kind] for kind in kinds]).sum(0).tolist()
        return (cosine / n, growth / n) if n else (float("nan"), float("nan"))
