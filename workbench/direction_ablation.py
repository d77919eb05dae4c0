"""Directions taken out of all that writes to the stream: by edits of the forward pass, and the same written into weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from workbench.architectures.weights import parameter
from workbench.edits.edit import Edit
from workbench.edits.kinds import ProjectOut
from workbench.edits.make import project_out
from workbench.errors import NotExact, UnknownOption
from workbench.intervention import intervene
from workbench.model import Batch, LanguageModel
from workbench.weight_edits import save_with

if TYPE_CHECKING:
    import pandas as pd

WRITERS = ("resid_pre.0", "attn_out", "mlp_out")
"""What is added up in the stream: the embedding with positions, and what blocks add."""
TOKENS, ALLOWED, ALLOWED_HALF = 48, 1e-3, 0.2
"""Tokens on which weights are held against edits, and how far logits may be apart, over their spread; the last where half
precision rounds both."""


@dataclass(frozen=True, eq=False, repr=False)
class DirectionAblation:
    """Weights that write nothing along some directions: W (1 - B Bᵀ) for every matrix W, read left to right, that writes to the
    stream, and so for its bias and the embeddings."""

    model: LanguageModel
    basis: Float[Tensor, "d_model directions"]
    """Orthonormal."""
    weights: dict[str, Tensor]
    """New values by name in the model's state dict, in at least float32."""
    table: pd.DataFrame
    """A row a weight: weight, norm, norm_after, and spent: the share of its squares that lay along the directions."""
    untied: bool
    apart: float
    """Largest difference of a logit from what the edits give, over the logits' spread."""

    def __repr__(self) -> str:
        spent = (self.table["norm"] ** 2 - self.table["norm_after"] ** 2).sum() / (self.table["norm"] ** 2).sum()
        most = self.table.loc[self.table["spent"].idxmax()]
        untied = ", embedding and unembedding untied" if self.untied else ""
        n = self.basis.shape[1]
        return (
            f"DirectionAblation of {self.model.name!r}: {n} of {len(self.basis)} directions from {len(self.weights)} "
            f"weights{untied}; {spent:.2%} of their squares go (of {most['weight']} {most['spent']:.2%}); "
            f"{self.apart:.1e} from the edits"
        )

    def edits(self) -> list[Edit]:
        """The same for `wb.intervene`."""
        return _edits(self.basis)

    def save(self, folder: str | Path) -> Path:
        """Write the model with these weights, as an ordinary Hugging Face folder with its tokenizer.

        Raises:
            CannotWrite: if the folder exists and is not empty, or cannot be written.
        """
        return save_with(self.model, folder, self.weights, untied=self.untied)


@torch.no_grad()
def ablate_directions(
    model: LanguageModel, directions: Float[Tensor, "*n d_model"], *, untie: bool = False
) -> DirectionAblation:
    """Write into the weights what `wb.project_out` does at `resid_pre.0` and all `attn_out` and `mlp_out`: the stream then
    never has anything along the directions, wherever it is read. The model itself stays as it is.

    It is checked by running both on some tokens. It is a projection about the origin; an eraser's own is about the mean.

    Args:
        directions: `[d_model]` or `[n, d_model]`, of any length; of an eraser, `eraser.write_.T`.
        untie: Where one matrix is both embedding and unembedding, save two; or the directions would be taken out of the
            unembedding too, which no edit of the stream does.
    Raises:
        NotExact: if embedding and unembedding are one matrix (and `untie` is not asked for), a norm acts on what attention or
            MLP give before it is added, a block has parts that cannot be edited so, or the logits differ from the edits'.
        UnknownOption: if the directions are of another width, or all zero.
        UnreadableWeight: if a weight is quantised, or an adapter's base.
    """
    import pandas as pd

    edit = project_out("resid_post", torch.as_tensor(directions))
    assert isinstance(edit, ProjectOut)
    basis = edit.basis
    if len(basis) != model.d_model:
        raise UnknownOption(f"Directions have {len(basis)} numbers, and the stream of {model.name!r} {model.d_model}.")
    if model.is_tied and not untie:
        raise NotExact(
            f"In {model.name!r} the embedding is the unembedding too: what is taken out of one would be taken out of the "
            "other, and logits would change otherwise than by edits. Give untie=True to save them apart, or use edits()."
        )
    weights, rows = {}, []
    for name, old, out_first in _writers(model):
        exact = old.detach().to(torch.promote_types(old.dtype, torch.float32))
        own = basis.to(exact)
        along = own.T @ exact if out_first else exact @ own
        weights[name] = exact - (own @ along if out_first else along @ own.T)
        norm, gone = float(exact.norm()), float(along.norm())
        rows.append(
            {
                "weight": name,
                "norm": norm,
                "norm_after": float(weights[name].norm()),
                "spent": (gone / norm) ** 2 if norm else 0.0,
            }
        )
    apart = _apart(model, weights, basis)
    if apart > (ALLOWED if model.dtype in (torch.float32, torch.float64) else ALLOWED_HALF):
        raise NotExact(
            f"Logits of {model.name!r} with these weights are {apart:.2g} spreads from those with edits: something else writes "
            "to its stream, or reads it otherwise. Use wb.project_out in wb.intervene."
        )
    return DirectionAblation(model, basis, weights, pd.DataFrame(rows), model.is_tied, apart)


def _edits(basis: Tensor) -> list[Edit]:
    return [ProjectOut(site=site, basis=basis) for site in WRITERS]


def _writers(model: LanguageModel) -> list[tuple[str, Tensor, bool]]:
    """Name, value, and whether outputs are the first axis, of all that writes to the stream.

    Raises:
        NotExact: if one is no plain matrix, or is normed before it is added.
    """
    row, found = model.row, []
    backbone = model.module(row.backbone)
    layers = row.path("layers")
    for name, module in backbone.named_modules(prefix=row.backbone):
        if isinstance(module, nn.Embedding) and not name.startswith(f"{layers}."):
            found.append((f"{name}.weight", name, False))
    for layer in range(model.n_layers):
        block = model.block_row(layer)
        if block.ln1_post or block.ln2_post:
            raise NotExact(
                f"Blocks of {model.name!r} norm what attention and MLP give before it is added: a projection before such a "
                "norm is undone by its gains. Use wb.project_out in wb.intervene."
            )
        if block.experts is not None or block.o is None or block.down is None:
            what = "routed experts" if block.experts is not None else "no attention or MLP of the usual kind"
            raise NotExact(
                f"Layer {layer} of {model.name!r} has {what}, whose weights are not edited here. Use wb.project_out."
            )
        for part in (block.o, block.down):
            path = row.path(part.path, layer)
            found += [(f"{path}.{kind}", path, not isinstance(model.module(path), Conv1D)) for kind in ("weight", "bias")]
    values = []
    for name, path, out_first in found:
        value = parameter(model.module(path), name.rpartition(".")[2])
        if value is not None:
            if value.shape[0 if out_first else -1] != model.d_model:
                raise NotExact(
                    f"{name} of {model.name!r} is {list(value.shape)}: it does not write to the stream of {model.d_model}."
                )
            values.append((name, value, out_first))
    return values


def _apart(model: LanguageModel, weights: dict[str, Tensor], basis: Tensor) -> float:
    tokens = torch.randint(model.d_vocab, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    cast = {name: value.to(model.dtype) for name, value in weights.items()}
    inputs: Any = model.inputs(batch)
    written = functional_call(model.hf, cast, kwargs=inputs, tie_weights=False).logits.double()
    with intervene(model, *_edits(basis)):
        edited = model.forward(batch).double()
    return float((written - edited).abs().max() / edited.std())
