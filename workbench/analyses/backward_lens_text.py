"""A backward lens in one screen of text."""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING

from workbench.tokens import shown

if TYPE_CHECKING:
    from workbench.analyses.backward_lens import BackwardLens

STRONGEST = 8


def summary(view: BackwardLens) -> str:
    """The targets, where in MLPs the gradient is longest, and the words there."""
    own = view.settings
    lines = [f"The gradient of {own['model']}, loss {own['loss']:.3f}" + ("" if own["own_loss"] else " nats")]
    for one in view.targets.to_dict("records"):
        p, rank = exp(one["log_probability"]), one["rank"]
        lines.append(f"  {shown(one['target'])} was foretold with {p:.2%}, as number {rank + 1:,}")
    first = view.vectors[(view.vectors["row"] == 0) & (view.vectors["matrix"] == "W_out")]
    if len(first):
        of = "" if view.vectors["row"].max() == 0 else " of the first text"
        lines.append(f"Longest in W_out{of} (a step writes the second column's words at the first's token)")
        lines.append("  layer  token           share  written, and unwritten")
        whole = float((first["norm"] ** 2).sum()) or 1.0
        for one in first.nlargest(STRONGEST, "norm").to_dict("records"):
            words = (best_words(view, 0, one["layer"], "W_out", one["pos"], end, 4) for end in ("down", "up"))
            share = one["norm"] ** 2 / whole
            lines.append(f"  {one['layer']:5}  {shown(one['token'])[:14]:14}  {share:5.1%}  {' | '.join(words)}")
    zero = view.vectors[view.vectors["zero"]]
    if len(zero):
        layers = sorted(set(zero["layer"]))
        where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        lines.append(f"{len(zero)} parts in {where} are 0 by construction: nothing that the loss reads comes from there.")
    return "\n".join([*lines, "  .table .vectors .matrices .targets .gradients .neurons(layer) .plot() .save(folder)"])


def best_words(view: BackwardLens, row: int, layer: int, matrix: str, pos: int, end: str, k: int = 5) -> str:
    """The tokens of one end of a vector, side by side."""
    table = view.table
    own = table[
        (table["row"] == row) & (table["layer"] == layer) & (table["pos"] == pos) & (table["end"] == end)
        & table["matrix"].map(lambda name: matrix in name.split())
    ]  # fmt: skip
    return "  ".join(shown(token) for token in own.sort_values("rank")["token"].head(k))
