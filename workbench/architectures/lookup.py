"""From a config to its row, and whether the row's paths lead anywhere in a model."""

from dataclasses import replace
from typing import Any

from torch import nn

from workbench.architectures.families import ROWS
from workbench.architectures.row import Architecture
from workbench.errors import UnknownArchitecture


def row_of(config: Any) -> Architecture | None:
    """The row of the family that this config (of the text decoder) belongs to; None if there is none."""
    row = ROWS.get(getattr(config, "model_type", None) or "")
    return row(config) if callable(row) else row


def placed(row: Architecture, hf: nn.Module) -> Architecture:
    """The row with the backbone's path as it is in this model: deeper than usual in a vision-language wrapper.

    Raises:
        UnknownArchitecture: if the model has no such backbone or head, or a block lacks a part.
    """
    if not _leads_somewhere(hf, row.path("layers")):
        found = [name for name, module in hf.named_modules() if _is_backbone(row, module)]
        if len(found) == 1:
            row = replace(row, backbone=found[0])
    if missing := missing_modules(row, hf):
        raise UnknownArchitecture(
            f"{type(hf).__name__} lacks {', '.join(missing[:4])}, where its family {row.model_type!r} keeps its parts. "
            "Load the causal language model itself, without wrapper, with its head."
        )
    return row


def missing_modules(row: Architecture, hf: nn.Module) -> list[str]:
    """Paths of the row, those of every block included, that lead nowhere in this model."""
    paths = [row.path("embed"), row.path("layers"), row.path("ln_final"), row.head]
    if _leads_somewhere(hf, row.path("layers")):
        for layer in range(len(list(hf.get_submodule(row.path("layers")).children()))):
            block = row.block(layer)
            inside = [block.attn, block.mlp, block.ln1, block.ln1_post, block.ln2, block.ln2_post]
            inside += [part.path for part in block.parts()]
            inside += [block.act] if block.act_function is None and block.up is not None else []
            if block.experts is not None:
                inside += [block.experts.path, block.experts.router, block.experts.shared]
            paths += [row.path(path, layer) for path in inside if path is not None]
    return [path for path in dict.fromkeys(paths) if not _leads_somewhere(hf, path)]


def _is_backbone(row: Architecture, module: nn.Module) -> bool:
    return all(_leads_somewhere(module, path) for path in (row.embed, row.layers, row.ln_final))


def _leads_somewhere(module: nn.Module, path: str) -> bool:
    try:
        return module.get_submodule(path) is not None
    except AttributeError:
        return False
