"""The representative families have every trait that any family has."""

from dataclasses import replace

from conftest import _unchanged
from families import FAMILIES, REPRESENTATIVE

from workbench.architectures.taps import tap
from workbench.architectures.weights import norm_bias
from workbench.checks.still import sites_of
from workbench.model import WEIGHTS, WHOLE_WEIGHTS, LanguageModel


def traits(model: LanguageModel) -> set[tuple]:
    """What hooks, edits and analyses tell models apart by. What modules are called is none of it: whether a row's paths lead to
    the right ones is asked of every family, by the self-check."""
    row, found = model.row, set()
    for site in sites_of(model):
        place = tap(row, site, model.heads)
        found.add((site.name, place.end, place.cut, place.item, place.scale == 1, place.block is None, place.mutated))
    for layer in range(model.n_layers):
        block = row.block(layer)
        norms = (block.ln1, block.ln1_post, block.ln2, block.ln2_post)
        found.add(("norms", block.parallel, *(norm is None for norm in norms)))
        found.add(("attention", block.attn is None, block.k is None, block.sinks, block.no_pattern))
        found.add(("activation by name", block.act_function is None))
        if block.experts is not None:
            found.add(("experts", replace(block.experts, path="", router="", shared=block.experts.shared and "")))
        found |= {(name, model.optional_weight(name, layer) is None) for name in WEIGHTS if name not in WHOLE_WEIGHTS}
    found |= {(name, model.optional_weight(name) is None) for name in WHOLE_WEIGHTS}
    found |= {("layers", kind) for kind in getattr(model.hf.config, "layer_types", None) or ()}
    found |= {
        ("keys as many as queries", model.heads.n_heads == model.heads.n_key_value_heads),
        ("blocks alike", len(row.blocks) == 1),
        ("embedding", row.embed_scale == 1, model.is_tied),
        ("final norm", norm_bias(model.module(row.path("ln_final"))) is None, row.norm_gain_offset),
        ("head", row.logit_scale == 1),
        ("soft cap", row.softcap is None),
    }
    return found


def test_every_trait_is_represented():
    by_family = {family: traits(_unchanged(family)) for family in FAMILIES}
    represented = set().union(*(by_family[family] for family in REPRESENTATIVE))
    lacking = {family: found - represented for family, found in by_family.items() if found - represented}
    assert not lacking
