"""The sub-modules of a block, from their own input to their own output, and what may stand in the place of each."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from workbench.analyses.held_out_loss import FITTED, HELD_OUT
from workbench.model import LanguageModel
from workbench.moments.layout import Pair
from workbench.moments.moments import Moments, Strata
from workbench.sites import Site, state
from workbench.transports.fit import Fitting, Recipe
from workbench.transports.scoring import explained
from workbench.transports.transport import Transport, of_model

Mode = Literal["attention", "mlp", "norms"]
MODES: tuple[Mode, ...] = get_args(Mode)
Way = Literal["map", "mean", "zero"]
"""The best linear map; the mean of what the sub-module gives, whatever it reads; nothing."""
WAYS: dict[Mode, tuple[Way, ...]] = {
    "attention": ("map", "mean", "zero"), "mlp": ("map", "mean", "zero"), "norms": ("map", "mean"),
}  # fmt: skip
"""Of a norm, nothing would leave attention and MLP nothing to read."""


def pairs_of(model: LanguageModel, layer: int, mode: Mode) -> list[Pair]:
    """What the sub-modules of a mode read and give in one block, as sites.

    Attention and MLP read their norm's output, or the stream where no norm comes before them; what they give is what is added
    to the stream, after a post-norm. Where both share a norm, there is one pair of it.

    Raises:
        UnknownSite: if the block has no such sub-module.
    """
    block = model.block_row(layer)
    before = state(layer, model.n_layers)
    middle = before if block.parallel else f"resid_mid.{layer}"
    shared = block.ln1 is not None and block.ln1 == block.ln2
    if mode == "norms":
        norms = [Pair(before, f"ln1.{layer}"), Pair(middle, f"ln2.{layer}")]
        pairs = norms[:1] if shared else norms
    elif mode == "attention":
        pairs = [Pair(before if block.ln1 is None else f"ln1.{layer}", f"attn_out.{layer}")]
    else:
        reads = middle if block.ln2 is None else f"ln{1 if shared else 2}.{layer}"
        pairs = [Pair(reads, f"mlp_out.{layer}")]
    for pair in pairs:
        model.tap(Site.parse(pair.target, model.n_layers))
    return pairs


class StandIns:
    """What may stand in the place of sub-modules, made of moments of documents of the first fold."""

    def __init__(self, model: LanguageModel, moments: Moments, strata: Strata, recipe: Recipe) -> None:
        self._fitting, self._recipe = Fitting(moments, strata), recipe
        self._settings = of_model(model) | {"strata": strata, "affine": recipe.affine}

    def require_tokens(self, pair: Pair) -> None:
        """
        Raises:
            TooFewTokens: if there are not enough for a map.
        """
        self._recipe.require_tokens(self._fitting.joint(pair, [FITTED]))

    def fitted(self, pair: Pair) -> tuple[Transport, dict[str, Any]]:
        """The map, and how well it explains what the sub-module gives: R², weighted by variance, on the documents of the fit
        and on the others."""
        own = self._fitting.fit(self._recipe, pair, [FITTED])
        scores = [
            explained(self._fitting.joint(pair, [fold]), own.matrix, own.bias).frobenius
            if self._n(pair, fold)
            else float("nan")
            for fold in (FITTED, HELD_OUT)
        ]
        row = {
            "source": pair.source, "target": pair.target, "n": self._n(pair, FITTED), "strength": own.strength,
            "in_sample": scores[0], "held_out": scores[1],
        }  # fmt: skip
        return self._transport(pair, self._recipe.kind, own.left, own.right, own.bias), row

    def constant(self, pair: Pair, way: Way) -> Transport:
        """A map of rank 0: to the mean of what the sub-module gives, or to zeros."""
        joint = self._fitting.joint(pair, [FITTED])
        bias = joint.mean_y if way == "mean" else torch.zeros_like(joint.mean_y)
        return self._transport(pair, way, joint.xy[:, :0], joint.xy[:0], bias)

    def _n(self, pair: Pair, fold: int) -> int:
        return self._fitting.joint(pair, [fold]).n

    def _transport(self, pair: Pair, kind: str, left: Any, right: Any, bias: Any) -> Transport:
        return Transport(pair.source, pair.target, left, right, bias, self._settings | {"kind": kind})
