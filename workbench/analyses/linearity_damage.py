"""What it costs the model when a block is taken out, or replaced by the linear map that explains it best.

A score of linearity says what share of variance a map explains; the model may live on the rest. So each block is removed, and
replaced by its map, and the loss on documents that no map was fitted on is measured. Source: the pruning of Razzhigaev et al.
2024 (arXiv 2405.12250), who remove blocks in the order of their score.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from workbench.analyses.layer_moments import LayerMoments, LayerSites
from workbench.collecting import collect_moments
from workbench.corpus.corpus import EARLY_UNTIL, Corpus, Row
from workbench.errors import TooFewTokens
from workbench.model import LanguageModel
from workbench.moments.moments import Moments, Strata
from workbench.sites import state
from workbench.streaming.batches import batch_of, batched
from workbench.substitution import substitute
from workbench.transports.fit import Recipe
from workbench.transports.transport import Transport

if TYPE_CHECKING:
    import pandas as pd

WAYS = ("removed", "replaced", "replaced_later")
"""The block is left out at all tokens; its map stands in at all tokens, fitted on all; or from the fifth position of a row on,
fitted on ordinary tokens, while the block itself goes on to make the sinks."""
LOGITS_AT_ONCE = 2048
"""Tokens whose logits are in memory at once."""
_FITTED, _HELD_OUT = 0, 1
"""Folds of documents."""


class Damage(NamedTuple):
    """Changes of the loss, nats a token."""

    table: pd.DataFrame | None
    together: pd.DataFrame | None
    settings: dict[str, Any]


class _Losses(NamedTuple):
    """Of held-out tokens, with the document of each."""

    nats: np.ndarray
    document: np.ndarray

    def change(self, other: _Losses) -> tuple[float, float]:
        """How much more this is than the other, and its standard error over documents: tokens of one are not independent."""
        difference = self.nats - other.nats
        mean = float(difference.mean())
        by_document = np.bincount(np.unique(self.document, return_inverse=True)[1], difference - mean)
        n = len(by_document)
        error = float(np.sqrt((by_document**2).sum() * n / (n - 1)) / len(difference)) if n > 1 else float("nan")
        return mean, error


def measure_damage(
    model: LanguageModel,
    corpus: Corpus,
    moments: Moments,
    sites: dict[int, LayerSites],
    recipe: Recipe,
    scores: pd.DataFrame,
    *,
    tokens: int,
    together: int,
    on_policy: bool,
    common: dict[str, Any],
) -> Damage:
    """
    Args:
        moments: With two folds.
        scores: The table of linearity, by which `together` chooses its blocks.
        common: Options of `collect_moments`, for maps fitted on policy.
    Raises:
        TooFewTokens: if no held-out document has two tokens.
    """
    import pandas as pd

    rows = _held_out(corpus, model, tokens)
    budget = min(common["batch_tokens"] or LOGITS_AT_ONCE, LOGITS_AT_ONCE)
    clean = _losses(model, rows, budget, nullcontext())

    def cost(maps: Sequence[Transport], skip: int) -> tuple[float, float]:
        return _losses(model, rows, budget, substitute(model, *maps, skip=skip)).change(clean)

    found = []
    for layer in tqdm(sites, desc="damage", disable=not common["progress"]):
        row: dict[str, Any] = {"layer": layer}
        for way in WAYS:
            own, skip = _stand_in(model, moments, sites[layer], layer, recipe, way)
            row[way], row[f"{way}_error"] = cost([own], skip)
        found.append(row)
    settings = {"clean_loss": float(clean.nats.mean()), "held_out_tokens": len(clean.nats),
                "held_out_documents": len(np.unique(clean.document))}  # fmt: skip
    if not together:
        return Damage(pd.DataFrame(found), None, settings)
    whole = scores[(scores["part"] == "block") & (scores["strata"] == "all") & scores["residual"]]
    blocks = sorted(int(layer) for layer in whole.nlargest(together, "in_sample")["layer"])
    several = []
    for way in WAYS:
        made = [_stand_in(model, moments, sites[layer], layer, recipe, way) for layer in blocks]
        change, error = cost([own for own, _ in made], made[0][1])
        several.append({"way": way, "on_policy": False, "change": change, "change_error": error})
    for way in ("replaced", "replaced_later") if on_policy else ():
        maps, skip = _on_policy(model, corpus, moments, sites, blocks, recipe, way, common)
        change, error = cost(maps, skip)
        several.append({"way": way, "on_policy": True, "change": change, "change_error": error})
    return Damage(pd.DataFrame(found), pd.DataFrame(several), settings | {"blocks_together": blocks})


def agreement(scores: pd.DataFrame, damage: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation, over layers, of 1 - score with the damage: see `Linearity.agreement`."""
    import pandas as pd
    from scipy.stats import spearmanr

    blocks, found = scores[scores["part"] == "block"], []
    for (strata, residual), one in blocks.groupby(["strata", "residual"], sort=False):
        for column in ("in_sample", "held_out"):
            missing = 1 - one.set_index("layer")[column].reindex(damage["layer"])
            row = {"score": column, "strata": strata, "residual": residual}
            for way in WAYS:
                found_at: Any = spearmanr(missing.to_numpy(), damage[way].to_numpy())
                row[way], row[f"{way}_p"] = float(found_at.statistic), float(found_at.pvalue)
            found.append(row)
    return pd.DataFrame(found)


def _stand_in(
    model: LanguageModel, moments: Moments, sites: LayerSites, layer: int, recipe: Recipe, way: str
) -> tuple[Transport, int]:
    """What is put in the place of a block, and how many first positions are left alone."""
    after = state(layer + 1, model.n_layers)
    if way == "removed":
        return Transport.identity(model, sites.x, after), 0
    strata: Strata = "all" if way == "replaced" else "ordinary"
    joint = LayerMoments(moments, sites, strata, [_FITTED]).joint("block", residual=True)
    fitted = recipe.fit(joint)
    settings = Transport.identity(model, sites.x, after).settings | {"kind": recipe.kind, "strata": strata, "affine": True}
    own = Transport(sites.x, after, fitted.left, None, fitted.bias, settings)
    return own, EARLY_UNTIL if way == "replaced_later" else 0


def _on_policy(
    model: LanguageModel,
    corpus: Corpus,
    moments: Moments,
    sites: dict[int, LayerSites],
    blocks: Sequence[int],
    recipe: Recipe,
    way: str,
    common: dict[str, Any],
) -> tuple[list[Transport], int]:
    """Maps that are fitted from the bottom up, each on what the block gives while those below it are replaced.

    Args:
        moments: Of the model as it is: the lowest block's own.
    """
    maps: list[Transport] = []
    skip = 0
    for layer in blocks:
        own = moments
        if maps:
            with substitute(model, *maps, skip=skip):
                own = collect_moments(model, corpus, [], sites[layer].pairs, detail="two", folds=2, **common)
        one, skip = _stand_in(model, own, sites[layer], layer, recipe, way)
        maps.append(one)
    return maps, skip


def _held_out(corpus: Corpus, model: LanguageModel, tokens: int) -> list[Row]:
    """The first rows that hold tokens of the second fold, as many as have so many of these."""
    chosen: list[Row] = []
    found = 0
    for row in corpus.rows(model):
        own = int(_counted(row).sum())
        if own:
            chosen.append(row)
            found += own
        if found >= tokens:
            break
    if not found:
        raise TooFewTokens("No held-out document has two tokens, so no loss can be measured. Take more text.")
    return chosen


def _counted(row: Row) -> np.ndarray:
    """Which tokens of a row, the first apart, are foretold from a token of their own, held-out document."""
    return (row.documents[1:] % 2 == _HELD_OUT) & (row.documents[1:] == row.documents[:-1])


@torch.no_grad()
def _losses(model: LanguageModel, rows: list[Row], budget: int, changed: AbstractContextManager[None]) -> _Losses:
    nats, documents = [], []
    with changed:
        for some in batched(rows, budget):
            batch = batch_of(some, model)
            logits = model.forward(batch)
            for index, row in enumerate(some):
                counted = _counted(row)
                at = torch.from_numpy(np.flatnonzero(counted)).to(logits.device)
                own = F.cross_entropy(logits[index, at].float(), batch.tokens[index, at + 1], reduction="none")
                nats.append(own.double().cpu().numpy())
                documents.append(row.documents[1:][counted])
    return _Losses(np.concatenate(nats), np.concatenate(documents))
