"""Sets of directions of the residual stream that can be read in the vocabulary: heads' output rows, singular vectors, your own.

Singular vectors: "The Singular Value Decompositions of Transformer Weight Matrices are Highly Interpretable" (Millidge and
Black 2022). We differ from it in giving both ends of every vector, whose sign is arbitrary, and what random directions give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import BadArtifact, UnknownOption
from workbench.model import LanguageModel
from workbench.sites import parse_layers

if TYPE_CHECKING:
    import pandas as pd

READS = ("W_Q", "W_K", "W_V", "W_in", "W_gate")
"""Matrices that are multiplied by the stream: their left singular vectors are directions of it."""
WRITES = ("W_O", "W_out")
"""Matrices that give what is added to the stream: their right singular vectors are."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Rows of `d_model` numbers, in parts that are read when it is their turn, and what each is called."""

    kind: str
    """What they are, in a word or two."""
    labels: pd.DataFrame
    """One row a direction."""
    sizes: list[int]
    """Rows of each part."""
    read: Callable[[int], Float[Tensor, "rows d_model"]]
    """The rows of a part."""

    def __len__(self) -> int:
        return len(self.labels)


def head_directions(model: LanguageModel, layers: str | None = None) -> Directions:
    """The rows of `W_O`: what each number of a head's `z` writes. Labels: layer, head, row.

    They are taken as they are, before a post-norm where the family has one.

    Raises:
        LayerOutOfRange, MissingWeight: if a layer is not there, or has no attention.
    """
    import pandas as pd

    chosen = parse_layers(layers, model.n_layers)
    heads, d_head, _ = model.weight("W_O", chosen[0]).shape
    index = pd.MultiIndex.from_product([chosen, range(heads), range(d_head)], names=["layer", "head", "row"])

    def read(part: int) -> Tensor:
        return model.weight("W_O", chosen[part]).detach().flatten(0, 1)

    return Directions("attention output rows", index.to_frame(index=False), [heads * d_head] * len(chosen), read)


@torch.no_grad()
def singular_directions(model: LanguageModel, name: str, layer: int, n: int = 10, head: int | None = None) -> Directions:
    """The singular vectors of a matrix on its side of the stream, largest singular value first.

    Args:
        name: `W_in`, `W_gate`, `W_Q`, `W_K`, `W_V` (what they read), `W_out`, `W_O` (what they write), or `OV`, the product of
            a head's `W_V` and `W_O`: both what it reads and what it writes.
        n: How many.
        head: Of the attention's matrices, one head's alone (of `W_K` and `W_V` a key-value head's); needed for `OV`.

    Labels: layer, vector (0 the largest), part (`reads` or `writes`), singular_value, share (of the sum of squares). The sign,
    which is free, makes the component of the largest size positive; of OV that of what is written, and what is read follows.

    Raises:
        UnknownOption: if there is no such matrix or head.
        LayerOutOfRange, MissingWeight, UnreadableWeight: as `model.weight`.
    """
    import pandas as pd

    matrix, parts = _matrix(model, name, layer, head)
    U, values, V = torch.linalg.svd(matrix.float(), full_matrices=False)
    n = min(n, int((values > values[0] * 1e-6).sum()))
    sides = {"reads": U.T[:n], "writes": V[:n]}
    last = sides[parts[-1]]
    sign = last.gather(1, last.abs().argmax(1, keepdim=True)).sign()  # one of both sides: reading + writes +
    rows, labels = [], []
    for part in parts:
        rows.append(sides[part] * sign)
        labels.append(
            pd.DataFrame(
                {
                    "layer": layer % model.n_layers, "vector": range(n), "part": part,
                    "singular_value": values[:n].tolist(), "share": (values[:n] ** 2 / (values**2).sum()).tolist(),
                }
            )
        )  # fmt: skip
    where = name if head is None else f"{name} of head {head}"
    both = torch.cat(rows)
    return Directions(f"singular vectors of {where}", pd.concat(labels, ignore_index=True), [len(both)], lambda _: both)


def given_directions(
    model: LanguageModel, vectors: Tensor | np.ndarray | Mapping[str, Tensor] | str | Path, *, width: int | None = None
) -> Directions:
    """Directions of your own: a tensor `[n, width]`, tensors by name (each a vector or several), or a .safetensors or .npy
    file of them. Labels: name (of a tensor), row.

    Args:
        width: Of the site that they are of; that of the stream, if None.
    Raises:
        UnknownOption: if they are not of that width.
        BadArtifact: if a file cannot be read.
    """
    import pandas as pd

    kind = str(vectors) if isinstance(vectors, (str, Path)) else "vectors"
    named = _from_file(Path(vectors)) if isinstance(vectors, (str, Path)) else vectors
    named = dict(named) if isinstance(named, Mapping) else {"": torch.as_tensor(named)}
    width = model.d_model if width is None else width
    rows, labels = [], []
    for name, tensor in named.items():
        tensor = torch.atleast_2d(torch.as_tensor(tensor).detach())
        if tensor.ndim != 2 or tensor.shape[1] != width or not tensor.is_floating_point():
            raise UnknownOption(
                f"Vectors {name!r} have shape {list(tensor.shape)} ({str(tensor.dtype).removeprefix('torch.')}). Directions "
                f"of {model.name!r} here are floating-point rows of {width} numbers."
            )
        rows.append(tensor.float())
        labels.append(pd.DataFrame({"name": name, "row": range(len(tensor))}))
    if not sum(map(len, rows)):
        raise UnknownOption("No direction was given. Give one or more.")
    return Directions(kind, pd.concat(labels, ignore_index=True), [len(one) for one in rows], rows.__getitem__)


def _matrix(model: LanguageModel, name: str, layer: int, head: int | None) -> tuple[Tensor, Sequence[str]]:
    """The matrix, read left to right, and its sides of the stream."""
    by_head = ("W_Q", "W_K", "W_V", "W_O")
    if name not in (*READS, *WRITES, "OV"):
        raise UnknownOption(f"Matrix {name!r} is not known. Use one of {', '.join((*READS, *WRITES, 'OV'))}.")
    if head is not None and name not in (*by_head, "OV"):
        raise UnknownOption(f"head={head} was given, but {name} belongs to no head.")
    if name == "OV":
        if head is None:
            raise UnknownOption("OV is a head's own: say which with head=.")
        W_V, W_O = model.weight("W_V", layer), model.weight("W_O", layer)
        _one_of(W_O, "W_O", head)
        return W_V[head * len(W_V) // len(W_O)].float() @ W_O[head].float(), ("reads", "writes")
    matrix = model.weight(name, layer)
    if name in by_head and head is not None:
        matrix = _one_of(matrix, name, head)
    elif name in by_head:
        matrix = matrix.flatten(0, 1) if name == "W_O" else matrix.transpose(0, 1).flatten(1)
    return matrix, ("reads",) if name in READS else ("writes",)


def _one_of(matrix: Tensor, name: str, head: int) -> Tensor:
    if not 0 <= head < len(matrix):
        raise UnknownOption(f"Head {head} is not in {name}: it has heads 0 to {len(matrix) - 1}.")
    return matrix[head]


def _from_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".npy":
            return {"": torch.from_numpy(np.load(path, allow_pickle=False))}
        return dict(load_file(path))
    except (OSError, EOFError, TypeError, ValueError, SafetensorError) as error:
        raise BadArtifact(f"{str(path)!r} cannot be read as a .safetensors or .npy file ({error}). Give another.") from None
