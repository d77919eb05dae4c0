"""Which weight matrices a loss has gradients of, and the modules that multiply by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from workbench.architectures.row import Part
from workbench.architectures.weights import linear_modules
from workbench.errors import MissingWeight
from workbench.model import EXPERT_WEIGHTS, LanguageModel
from workbench.sites import parse_layers

READING = ("W_Q", "W_K", "W_V", "W_in", "W_gate", "W_router")
"""Matrices whose inputs are the normed stream."""
WRITING = ("W_O", "W_out")
"""Matrices whose outputs go to the stream."""
NAMES = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "W_router")
"""In the order of the forward pass."""


class Matrix(NamedTuple):
    """One weight matrix of a block."""

    name: str
    """`W_out.3`; the path of its module, where no row names it."""
    layer: int
    path: str
    """Of the module, from the causal language model."""
    part: Part | None = None
    """Which of the module's outputs are its own; None: all."""
    item: int = 0
    """Which item of what the module gives is the product, where it gives a tuple."""

    @property
    def kind(self) -> str:
        """`W_out` of `W_out.3`."""
        return self.name.rpartition(".")[0] if self.part is not None or self.name.startswith("W_router.") else self.name


def matrices_of(model: LanguageModel, layers: str | None = None, names: Sequence[str] | None = None) -> list[Matrix]:
    """The matrices of some blocks, in the order of the layers, those that a row names first.

    Args:
        names: Of `NAMES`, those that a layer has; all linear modules of the blocks, if None.
    Raises:
        MissingWeight: if no layer chosen has a name, and why; or one has experts in its place.
        LayerOutOfRange: as `parse_layers`.
    """
    chosen = parse_layers(layers, model.n_layers)
    found = [one for layer in chosen for one in _of_layer(model, layer)]
    if names is None:
        return found
    for name in names:
        if name not in NAMES:
            raise MissingWeight(f"No matrix is called {name!r}. Those of a block are {', '.join(NAMES)}.")
        if not any(one.kind == name for one in found):
            model.weight(name, chosen[0])  # says why there is none
            raise MissingWeight(f"Layer {chosen[0]} of {model.name} has no {name} of its own that reads or writes the stream.")
        for layer in chosen:
            block = model.row.block(layer)
            if block.experts is not None and name in EXPERT_WEIGHTS and block.down is None:
                model.weight(name, layer)  # says that it is a mixture, which has no gradient laid out by token
    return [one for one in found if one.kind in names]


def _of_layer(model: LanguageModel, layer: int) -> list[Matrix]:
    block, row = model.block(layer), model.row.block(layer)
    parts = zip(NAMES, (row.q, row.k, row.v, row.o, row.up, row.gate, row.down), strict=False)
    named = [
        Matrix(f"{name}.{layer}", layer, model.row.path(part.path, layer), part)
        for name, part in parts
        if part is not None and part.reads_stream
    ]
    if row.experts is not None:
        path = model.row.path(row.experts.router, layer)
        named.append(Matrix(f"W_router.{layer}", layer, path, item=row.experts.router_item))
    known = {one.path for one in named}
    others = (model.row.path(path, layer) for path in linear_modules(block))
    return named + [Matrix(path, layer, path) for path in others if path not in known]
