"""What it costs the model when a block is taken out, or replaced by the linear map that explains it best.

A score of linearity says what share of variance a map explains; the model may live on the rest. So each block is removed, and
replaced by its map, and the loss on documents that no map was fitted on is measured. Source: the pruning of Razzhigaev et al.
2024 (arXiv 2405.12250), who remove blocks in the order of their score.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from workbench.analyses.held_out_loss import FITTED, held_out_rows, losses
from workbench.analyses.layer_moments import LayerMoments, LayerSites
from workbench.analyses.rerun import Rerun
from workbench.collecting import collect_moments
from workbench.corpus.corpus import EARLY_UNTIL, Corpus
from workbench.model import LanguageModel
from workbench.moments.moments import Moments, Strata
from workbench.sites import state
from workbench.substitution import substitute
from workbench.transports.fit import Recipe
from workbench.transports.transport import Transport

if TYPE_CHECKING:
    import pandas as pd

WAYS = ("removed", "replaced", "replaced_later")
"""The block is left out at all tokens; its map stands in at all tokens, fitted on all; or from the fifth position of a row on,
fitted on ordinary tokens, while the block itself goes on to make the sinks."""


class Damage(NamedTuple):
    """Changes of the loss, nats a token."""

    table: pd.DataFrame | None
    together: pd.DataFrame | None
    settings: dict[str, Any]


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

    texts = Rerun(model, held_out_rows(corpus, model, tokens), common["batch_tokens"])
    clean = losses(texts, nullcontext())

    def cost(maps: Sequence[Transport], skip: int, first: int) -> tuple[float, float]:
        return losses(texts, substitute(model, *maps, skip=skip), since=first).change(clean)

    found = []
    for layer in tqdm(sites, desc="damage", disable=not common["progress"]):
        row: dict[str, Any] = {"layer": layer}
        for way in WAYS:
            own, skip = _stand_in(model, moments, sites[layer], layer, recipe, way)
            row[way], row[f"{way}_error"] = cost([own], skip, layer)
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
        change, error = cost([own for own, _ in made], made[0][1], blocks[0])
        several.append({"way": way, "on_policy": False, "change": change, "change_error": error})
    for way in ("replaced", "replaced_later") if on_policy else ():
        maps, skip = _on_policy(model, corpus, moments, sites, blocks, recipe, way, common)
        change, error = cost(maps, skip, blocks[0])
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
    joint = LayerMoments(moments, sites, strata, [FITTED]).joint("block", residual=True)
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
