"""Tables to look things up in: the sites of a model, and the families there are rows for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from workbench.architectures.cuts import Grouped, Half, Stacked
from workbench.architectures.families import ROWS
from workbench.architectures.row import Architecture, Block
from workbench.architectures.taps import why_not
from workbench.model import LanguageModel
from workbench.sites import SITES, WITHOUT_LAYER, Site, ranges

if TYPE_CHECKING:
    import pandas as pd


def site_table(model: LanguageModel) -> pd.DataFrame:
    """Every site: one row, or several where layers differ.

    Columns: site, layers (`0:30`; empty for the whole model), available, meaning, shape, module (the path it is read from,
    with `{l}` for the layer, and whether it is the module's input or output), writable, transformer_lens, nnterp, why (it is
    not available).
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for name, kind in SITES.items():
        groups: dict[tuple[str | None, str | None], list[int]] = {}
        for layer in [0] if name in WITHOUT_LAYER else range(model.n_layers):
            why = None if name in WITHOUT_LAYER else why_not(model.row.block(layer), name)
            groups.setdefault((why, None if why else _module(model, name, layer)), []).append(layer)
        for (why, module), layers in groups.items():
            site = Site(name, None if name in WITHOUT_LAYER else layers[0])
            rows.append(
                {
                    "site": name,
                    "layers": "" if name in WITHOUT_LAYER else ranges(layers),
                    "available": why is None,
                    "meaning": kind.meaning,
                    "shape": f"[{kind.shape if why else _shape(model, site)}]",
                    "module": module,
                    "writable": why is None and model.tap(site).passed_by is None,
                    "transformer_lens": _with_layer(site.transformer_lens, site),
                    "nnterp": _with_layer(site.nnterp, site),
                    "why": why,
                }
            )
    return pd.DataFrame(rows)


def _shape(model: LanguageModel, site: Site) -> str:
    return ", ".join(axis if size is None else f"{axis} {size}" for axis, size in model.axes(site).items())


def family_table() -> pd.DataFrame:
    """Every family with a row, as its default config has it.

    Columns: family, blocks, norms, attention, mlp, multipliers, and without: sites that some layer lacks though other families
    may have them.
    """
    import pandas as pd
    from transformers import AutoConfig

    rows = []
    for family in sorted(ROWS):
        row = ROWS[family]
        found = row(AutoConfig.for_model(family)) if callable(row) else row
        kinds = list(dict.fromkeys(found.blocks))
        rows.append(
            {
                "family": family,
                "blocks": "parallel" if kinds[0].parallel else "sequential",
                "norms": _joined(_norms(found, block) for block in kinds),
                "attention": _joined(_attention(block) for block in kinds),
                "mlp": _joined(_mlp(block) for block in kinds),
                "multipliers": _multipliers(found),
                "without": ", ".join(_without(kinds)),
            }
        )
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """A table for a document."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _module(model: LanguageModel, name: str, layer: int) -> str:
    tap = model.tap(Site(name, None if name in WITHOUT_LAYER else layer))
    path = tap.path.replace(f"{model.row.path('layers')}.{layer}", f"{model.row.path('layers')}.{{l}}")
    extra = [
        f"x {tap.scale:g}" if tap.scale != 1 else "",
        repr(tap.cut) if isinstance(tap.cut, (Stacked, Grouped, Half)) else "",
    ]
    return " ".join([tap.end, "of", path, *(one for one in extra if one)])


def _with_layer(name: str | None, site: Site) -> str:
    """A name of elsewhere, with `{l}` for the layer."""
    if name is None:
        return ""
    return name if site.layer is None else name.replace(f".{site.layer}.", ".{l}.").replace(f"[{site.layer}]", "[{l}]")


def _joined(parts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(parts))


def _norms(row: Architecture, block: Block) -> str:
    before = 0 if block.ln1 is None else 1 if block.ln1 == block.ln2 else 2
    after = sum(norm is not None for norm in (block.ln1_post, block.ln2_post))
    kinds = [f"{before} before" if before else "", f"{after} after" if after else ""]
    return ", ".join(kind for kind in kinds if kind) + (", gain 1 + w" if row.norm_gain_offset else "")


def _attention(block: Block) -> str:
    if block.attn is None:
        return "none (convolution)"
    if block.k is None:
        return "latent"
    assert block.q is not None
    return {Stacked: "one matrix, stacked", Grouped: "one matrix, grouped"}.get(type(block.q.cut), "q, k, v apart")


def _mlp(block: Block) -> str:
    if block.experts is not None:
        return "experts" + ("" if block.experts.shared is None else " and a shared one")
    if not block.is_gated:
        return "plain"
    assert block.gate is not None
    return "gated, one matrix" if isinstance(block.gate.cut, Half) else "gated"


def _without(blocks: list[Block]) -> list[str]:
    lacking = {name for block in blocks for name in SITES if name != "router_logits" and why_not(block, name)}
    return [name for name in SITES if name in lacking]


def _multipliers(row: Architecture) -> str:
    named = {
        "embedding": row.embed_scale, "added": row.block(0).residual_multiplier, "logits": row.logit_scale,
    }  # fmt: skip
    found = [name for name, value in named.items() if value != 1.0]
    return ", ".join(found + (["soft cap"] if row.softcap is not None else []))
