"""Jacobian lenses as their authors and TransformerLens (3.9) write them: a `.pt` file with a matrix a block.

Source: "Verbalizable Representations Form a Global Workspace in Language Models" (Gurnee et al. 2026,
transformer-circuits.pub/2026/workspace). J[l][i, j] is the mean derivative of the last block's output i by the output j of
block l, before the final norm, so that a column h goes to J h: the transpose of a map of rows. There is no intercept, and
nothing is read before the first block. A fit that was not finished holds sums over prompts and their number instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.errors import BadArtifact, NotComparable
from workbench.lenses.foreign import Published, numbers
from workbench.model import LanguageModel
from workbench.sites import state

_LENS, _FIT = "J", "jacobian_sum"


def is_jacobian_lens(values: dict[Any, Any]) -> bool:
    """Whether it is a lens or a fit of one."""
    return _LENS in values or _FIT in values


def jacobian_lens(file: Path, values: dict[Any, Any], model: LanguageModel) -> Published:
    """
    Raises:
        BadArtifact: if a matrix that it says it has is missing or damaged, or no prompt was averaged.
        NotComparable: if it was made for a model of another shape, or to another state than the last.
        NotFinite: if there is NaN or infinity in it.
    """
    is_fit = _LENS not in values
    matrices = _by_layer(file, values[_FIT if is_fit else _LENS])
    says = _said(values)
    _require_shape(file, matrices, values.get("d_model"), says.get("target_layer"), model)
    named = says.get("source_layers")
    if isinstance(named, list) and (missing := [layer for layer in named if layer not in matrices]):
        raise BadArtifact(f"{str(file)!r} says that it has layers {named}; {missing} are not there. Fetch it again, whole.")
    prompts = values.get("n_done", 0)
    if is_fit and not (isinstance(prompts, int) and prompts > 0):
        raise BadArtifact(
            f"{str(file)!r} is a fit that has done n_done={prompts!r} prompts, so there is no mean yet. Go on with it."
        )
    d, n, maps = model.d_model, model.n_layers, {}
    for layer, value in sorted(matrices.items()):
        matrix = numbers(file, f"layer {layer}", value, (d, d))
        left = (matrix.float() / prompts if is_fit else matrix).T.contiguous()
        maps[state(layer + 1, n)] = left, torch.zeros(d, dtype=left.dtype)
    name = says.get("model_name")
    made = f"jacobian-lens{' (unfinished fit)' if is_fit else ''}"
    return Published("jacobian", made, maps, False, name if isinstance(name, str) else None, {"metadata": says})


def _by_layer(file: Path, matrices: object) -> dict[int, Any]:
    if not (isinstance(matrices, dict) and matrices and all(str(layer).isdecimal() for layer in matrices)):
        raise BadArtifact(f"{str(file)!r} should hold a matrix by layer, and holds none. The file is damaged.")
    return {int(layer): matrix for layer, matrix in matrices.items()}


def _said(values: dict[Any, Any]) -> dict[str, Any]:
    """What it says of itself, as JSON can hold it: TransformerLens nests it, fits of the authors' have it at the top."""
    nested = values.get("metadata")
    top = {name: value for name, value in values.items() if name not in (_LENS, _FIT, "metadata")}
    return _plain(top | (nested if isinstance(nested, dict) else {}))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else f"({type(value).__name__})"


def _require_shape(file: Path, matrices: dict[int, Any], width: Any, target: Any, model: LanguageModel) -> None:
    first = next(iter(matrices.values()))
    found = width if width is not None or not isinstance(first, Tensor) else first.shape[-1]
    if found != model.d_model:
        raise NotComparable(
            f"{str(file)!r} is a lens of a model of d_model {found}; {model.name!r} has {model.d_model}. Name the model that "
            "it was made for."
        )
    last = model.n_layers - 1
    if target not in (None, last):
        raise NotComparable(
            f"{str(file)!r} leads to the output of block {target}; the last one of {model.name!r} is {last}. Name the model "
            "that it was made for; a lens to a block before the last is not read."
        )
    if max(matrices) >= last:
        raise NotComparable(
            f"{str(file)!r} has a map from the output of block {max(matrices)}; in {model.name!r} there are some from 0 to "
            f"{last - 1}. Name the model that it was made for."
        )
