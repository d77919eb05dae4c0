"""Identities inside the attention function: scores make the pattern, the pattern makes `z`, the heads make `attn_out`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.attention import INSIDE
from workbench.capturing import keeping
from workbench.checks.check import Check, check, error, real
from workbench.checks.still import sites_of
from workbench.model import Batch, LanguageModel
from workbench.sites import Site


def inside(model: LanguageModel, batch: Batch) -> Iterator[Check]:
    """What one forward pass with eager attention shows."""
    sites = [site for site in sites_of(model) if site.name in INSIDE]
    if not sites:
        return
    layers = sorted({site.layer for site in sites if site.layer is not None})
    around = [Site(name, layer) for layer in layers for name in ("v", "z")]
    own = real(model.forward(batch), batch)
    with keeping(model, [*sites, *around], to_the_end=True) as kept:
        logits = real(model.forward(batch), batch)
    yield check("looking inside attention changes no logit", None, lambda: error(logits, own), through=True)
    for layer in layers:
        at = {name: kept[Site(name, layer)] for name in (*INSIDE, "v", "z") if Site(name, layer) in kept}
        if unseen := [name for name in INSIDE if name not in at]:
            yield Check("queries, keys, scores and pattern are seen", layer, float("inf"), f"no {', '.join(unseen)} is seen")
            continue
        row = model.row.block(layer)
        if not row.sinks:  # else a part of the attention goes to no token
            yield check("softmax(attn_scores) = pattern", layer, lambda at=at: _softmax_error(at, batch))
        if "v" not in row.mutated:  # else the values are changed on their way
            yield check("pattern v = z", layer, lambda at=at: _mixture_error(model, at, batch))


def _softmax_error(at: dict[str, Tensor], batch: Batch) -> float:
    scores, pattern = (real(at[name].transpose(1, 2), batch).float() for name in ("attn_scores", "pattern"))
    return error(scores.softmax(-1), pattern)


def _mixture_error(model: LanguageModel, at: dict[str, Tensor], batch: Batch) -> float:
    v = at["v"].repeat_interleave(model.heads.n_heads // model.heads.n_key_value_heads, dim=2)
    z = torch.einsum("bhqk,bkhd->bqhd", at["pattern"].to(v.dtype), v)
    return error(real(z, batch).flatten(1), real(at["z"], batch).flatten(1))
