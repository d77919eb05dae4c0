"""Identities under edits: what is written at a site goes where its name says, and nowhere else.

A cut that permutes heads in the same way in weights and activations passes every identity of a forward pass, and so do
queries and keys that have changed places. What an edit moves tells them apart: a token's query changes its own `z` alone, its
key the `z` of it and of later tokens, its value (linearly) too; and each only in the heads of its own group.

Blocks are run again alone, on what they were called with, so that all layers together cost a few forward passes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.capturing import keeping
from workbench.checks.check import LENGTHS, Check, NothingToSee, check, error, real
from workbench.checks.still import sites_of
from workbench.model import Batch, LanguageModel
from workbench.sites import Site
from workbench.tracer import Call, HookFunction, calls_of, edited

EDITED, LATER = LENGTHS[0] - 2, LENGTHS[0] - 1
"""Positions in the first row, which has no padding: neighbours, so that a window of two tokens shows one to the other."""


def moved(model: LanguageModel, batch: Batch) -> Iterator[Check]:
    """What edits do, at every layer."""
    sites, rows = sites_of(model), [model.row.block(layer) for layer in range(model.n_layers)]
    blocks = {layer: model.block(layer) for layer in range(model.n_layers)}
    clean_sites = [site for site in sites if site.name in ("z", "mlp_post", "mlp_out")]
    with calls_of(blocks) as calls, keeping(model, clean_sites, to_the_end=True) as clean:
        logits = real(model.forward(batch), batch)
    writable = [site for site in sites if site.name != "result" and model.tap(site).passed_by is None]
    with edited(model, dict.fromkeys(writable, torch.clone)):
        same = real(model.forward(batch), batch)
    yield check("writing back what every site holds changes no logit", None, lambda: error(same, logits), through=True)
    neurons = {layer: Site("mlp_post" if row.up is not None else "mlp_out", layer) for layer, row in enumerate(rows)}
    with edited(model, dict.fromkeys(neurons.values(), torch.neg)):
        other = real(model.forward(batch), batch)
    alive = logits.any() and any(clean[site].any() and clean[Site("mlp_out", site.layer)].any() for site in neurons.values())
    yield check("negating the neurons moves the logits", None, lambda: _moved(other, logits, possible=bool(alive)))
    for layer, call in sorted(calls.items()):
        yield _addition(model, layer, call, sites)
        if rows[layer].attn is not None:
            yield from _heads(model, layer, call, clean[Site("z", layer)][0])


def _addition(model: LanguageModel, layer: int, call: Call, sites: list[Site]) -> Check:
    """The stream adds up also when what is added to it is overwritten with noise."""
    generator = torch.Generator().manual_seed(layer)

    def noisy(value: Tensor) -> Tensor:
        random = torch.randn(value.shape, generator=generator).to(value)
        # An eighth of the row's length: float16 has no room for twice a massive state.
        return value + random * (value.norm(dim=-1, keepdim=True) / (8 * random.norm(dim=-1, keepdim=True)))

    edits = {site: noisy for site in sites if site.layer == layer and site.name in ("attn_out", "mlp_post", "mlp_out")}
    kept_sites = [Site("resid_pre", layer), *edits, Site("resid_post", layer)]
    if model.row.block(layer).attn is None:
        kept_sites[0] = Site("resid_mid", layer)  # what the block adds without attention is no site
    with edited(model, edits), keeping(model, kept_sites) as kept:
        model.block(layer)(*call.args, **call.kwargs)
    after = kept[Site("resid_post", layer)]
    total = sum((kept[site].to(after.device) for site in kept_sites[:-1] if site.name != "mlp_post"), torch.tensor(0.0))
    return check("the stream adds up when attn_out, mlp_post and mlp_out are edited", layer, lambda: error(total, after))


def _heads(model: LanguageModel, layer: int, call: Call, clean: Tensor) -> Iterator[Check]:
    """What a random half of the heads' queries, keys and values move of `z [pos, heads, d_value]`, the first row's."""
    n_heads, n_groups = model.heads.n_heads, model.heads.n_key_value_heads
    generator = torch.Generator().manual_seed(layer)

    def half(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)[: (n + 1) // 2]

    def z_with(name: str, edit: HookFunction) -> Tensor:
        z = Site("z", layer)
        with edited(model, {Site(name, layer): edit}), keeping(model, [z]) as kept:
            model.block(layer)(*call.args, **call.kwargs)
        return kept[z][0]

    def negated(positions: slice, heads: Tensor) -> HookFunction:
        def edit(value: Tensor) -> Tensor:
            value = value.clone()
            value[:, positions, heads.to(value.device)] *= -1
            return value

        return edit

    def may_move(heads: Tensor, positions: list[int]) -> Tensor:
        allowed = torch.zeros(clean.shape[:2], dtype=torch.bool, device=clean.device)
        for position in positions:
            allowed[position, heads.to(clean.device)] = True
        return allowed

    def queries() -> float:
        heads = half(n_heads)
        allowed = may_move(heads, [EDITED])
        return _moved_alone(z_with("q", negated(slice(EDITED, EDITED + 1), heads)), clean, allowed, allowed)

    def keys() -> float:
        groups = half(n_groups)
        heads = _heads_of(groups, n_heads // n_groups)
        found = z_with("k", negated(slice(EDITED, EDITED + 1), groups))
        return _moved_alone(found, clean, may_move(heads, [EDITED, LATER]), may_move(heads, [LATER]))

    def values() -> float:
        groups = half(n_groups)
        allowed = may_move(_heads_of(groups, n_heads // n_groups), list(range(len(clean))))
        return error(z_with("v", negated(slice(None), groups)), torch.where(allowed[..., None], -clean, clean))

    row = model.row.block(layer)
    if row.q is not None:
        yield check("a query moves its own z alone, of its own head", layer, queries)
    if row.k is not None:
        yield check("a key moves its own and later z, of its own group", layer, keys)
    if row.v is not None:
        yield check("z is linear in the values of its own group", layer, values)


def _heads_of(groups: Tensor, size: int) -> Tensor:
    """Query heads that share the keys and values of the groups."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _moved_alone(found: Tensor, clean: Tensor, allowed: Tensor, required: Tensor) -> float:
    """How far anything moved that must not."""
    _moved(found[required], clean[required], possible=False)
    return error(found[~allowed], clean[~allowed]) if not allowed.all() else 0.0


def _moved(found: Tensor, clean: Tensor, *, possible: bool) -> float:
    """0 if anything moved, 1 if nothing did although it was possible.

    Raises:
        NothingToSee: if nothing moved, and that may be right.
    """
    if not torch.equal(found, clean):
        return 0.0
    if possible:
        return 1.0
    raise NothingToSee("nothing moved: what was edited is all zero, or a window of one token hides it")
