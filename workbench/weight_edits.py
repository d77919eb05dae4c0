"""Changes of weight matrices of low rank: made for a while, beside the weights, or written into a copy of the model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from workbench.architectures.weights import parameter
from workbench.artifacts import output_folder
from workbench.errors import CannotWrite, LengthMismatch, MissingWeight, UnreadableWeight
from workbench.gradients.collect import frozen
from workbench.gradients.gradient import Gradient
from workbench.gradients.matrices import Matrix, matrices_of
from workbench.model import Batch, LanguageModel
from workbench.projection import accumulation_dtype
from workbench.tracer import low_rank_added

log = logging.getLogger("workbench")

ROUNDED_AWAY = 0.05
"""Share of an edit, in norm, from which on it is said that the weights' dtype does not hold it."""


@dataclass(frozen=True, eq=False, repr=False)
class WeightEdit:
    """`W + leftᵀ right` of a matrix that is read left to right (`x @ W`)."""

    name: str
    """`W_out.3`"""
    left: Float[Tensor, "rank d_in"]
    right: Float[Tensor, "rank d_out"]

    @classmethod
    def step(cls, gradient: Gradient, step: float) -> WeightEdit:
        """One step of plain gradient descent: `W - step · Xᵀ D`."""
        dtype = accumulation_dtype(gradient.X)
        return cls(gradient.name, gradient.X.to(dtype), -step * gradient.D.to(dtype))

    def __repr__(self) -> str:
        return f"WeightEdit({self.name}, rank {len(self.left)}, norm {self.norm():.3g})"

    def norm(self) -> float:
        """Frobenius norm of what is added."""
        left, right = self.left.double(), self.right.double()
        return max(float(((left @ left.T) * (right @ right.T)).sum()), 0.0) ** 0.5

    def times(self, factor: float) -> WeightEdit:
        """The same, so many times as large."""
        return replace(self, right=self.right * factor)


@contextmanager
def edit_weights(model: LanguageModel, *edits: WeightEdit, acts_on: Bool[Tensor, "batch edit"] | None = None) -> Iterator[None]:
    """While open, every forward pass of the model is that of the edited weights. The weights themselves are not touched (nor is
    what `model.weight` gives): what the edit adds to a product is worked out in float32 and added to the product, which a model
    of half precision then rounds.

    Args:
        acts_on: Which edits act on which texts of the batch, so that one pass tries many; all on all, if None.
    Raises:
        MissingWeight: if the model has no such matrix, or it is a router, whose choice is made inside its module.
        LengthMismatch: if acts_on has another number of edits; from the forward pass, of texts.
    """
    if acts_on is not None and acts_on.shape[1:] != (len(edits),):
        raise LengthMismatch(f"acts_on is {list(acts_on.shape)} for {len(edits)} edits: give [texts, {len(edits)}].")
    added = _by_path(model, edits)
    acts = None if acts_on is None else {path: acts_on[:, one.edit] for path, one in added.items()}
    with low_rank_added(model, {path: (one.left, one.right) for path, one in added.items()}, acts):
        yield


class FirstOrder(NamedTuple):
    """Logits as they are, and what edits add to them, to first order in the edits."""

    logits: Float[Tensor, "batch kept d_vocab"]
    change: Float[Tensor, "batch kept d_vocab"]


def first_order(model: LanguageModel, batch: Batch, columns: Int[Tensor, " kept"], edits: Sequence[WeightEdit]) -> FirstOrder:
    """What small edits add to all logits: `d logits / d s` of edits that are s times as large, at 0, by one forward pass and
    two backward ones (the derivative of `vᵀ d logits / d s` by v), through torch's unfused attention: the fused one cannot be
    differentiated twice. Forward-mode differentiation would be less work, but several families' functions have none.

    Raises:
        MissingWeight: if the model has no such matrix.
    """
    size = torch.zeros((), requires_grad=True)  # one number, on the CPU: tensors of any device can be multiplied by it
    with sdpa_kernel(SDPBackend.MATH), frozen(model), torch.enable_grad():
        added = {path: (one.left, size * one.right) for path, one in _by_path(model, edits).items()}
        with low_rank_added(model, added):
            logits = model.forward(batch, columns)
        probe = torch.zeros_like(logits, requires_grad=True)
        (along,) = torch.autograd.grad(logits, size, probe, create_graph=True)
        (change,) = torch.autograd.grad(along, probe)
    return FirstOrder(logits.detach(), change)


def save_edited(model: LanguageModel, folder: str | Path, *edits: WeightEdit) -> Path:
    """Write a copy of the model with edited weights, as an ordinary Hugging Face folder with its tokenizer.

    The model itself stays as it is. Where the weights' dtype cannot hold an edit (bfloat16 has 8 bits), a warning says how much
    of it was rounded away.

    Raises:
        CannotWrite: if the folder exists and is not empty, or cannot be written; nothing half-written is left.
        MissingWeight, UnreadableWeight: if a matrix does not exist, is not one plain tensor, or the model carries adapters.
    """
    weights = {}
    for path, added in _by_path(model, edits).items():
        module = model.module(path)
        old = parameter(module, "weight")
        assert old is not None
        exact = old.detach().to(accumulation_dtype(old))
        change = (
            (added.left.to(exact).T @ added.right.to(exact))
            if isinstance(module, Conv1D)
            else (added.right.to(exact).T @ added.left.to(exact))
        )
        weights[f"{path}.weight"] = exact + change
    return save_with(model, folder, weights)


def save_with(model: LanguageModel, folder: str | Path, weights: Mapping[str, Tensor], *, untied: bool = False) -> Path:
    """Write a copy of the model with other values of some weights, as an ordinary Hugging Face folder with its tokenizer.

    Args:
        weights: By their names in the model's state dict, in at least float32.
        untied: Write the unembedding beside the embedding, where the model has one matrix for both.
    Raises:
        CannotWrite, UnreadableWeight: as `save_edited`.
    """
    folder = Path(folder)
    require_new_folder(folder)
    if getattr(model.hf, "_hf_peft_config_loaded", False) or any(hasattr(m, "base_layer") for m in model.hf.modules()):
        raise UnreadableWeight(
            f"{model.name!r} carries adapters of the peft library, which a plain model folder does not hold. Save the edit of "
            "model.merge_and_unload()."
        )
    whole = dict(model.hf.state_dict())
    for name, new in weights.items():
        old = whole[name]
        change = new.to(old.device) - old.to(new.dtype)
        rounded = new.to(old.device, old.dtype)
        lost = float((rounded.to(new.dtype) - old.to(new.dtype) - change).norm() / change.norm().clamp_min(1e-30))
        if lost > ROUNDED_AWAY:
            log.warning("%s: %.0f %% of the edit was rounded away in %s. Save a float32 model.", name, 100 * lost, old.dtype)
        whole[name] = rounded
    output_folder(folder.parent, "Name another")
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    config: Any = model.hf.config
    tied = config.tie_word_embeddings
    try:
        if untied:  # what save_pretrained leaves out, and what loading ties, is decided by the config alone
            config.tie_word_embeddings = False
        model.hf.save_pretrained(beside, state_dict=whole)
        model.tokenizer.save_pretrained(beside)
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except OSError as error:
        raise CannotWrite(
            f"{str(folder)!r} could not be written ({error.strerror or error}). Make room, or name another."
        ) from None
    finally:
        config.tie_word_embeddings = tied
        shutil.rmtree(beside, ignore_errors=True)
    return folder


class _Added(NamedTuple):
    """All that is added to one module's weight."""

    left: Float[Tensor, "rank d_in"]
    right: Float[Tensor, "rank d_out"]
    """As wide as the module's outputs."""
    edit: Int[Tensor, " rank"]
    """Of which edit each rank is."""


def _by_path(model: LanguageModel, edits: Sequence[WeightEdit]) -> dict[str, _Added]:
    """
    Raises:
        MissingWeight: if the model has no such matrix, or it is a router.
    """
    known = {one.name: one for one in matrices_of(model)}
    found: dict[str, list[_Added]] = {}
    for i, edit in enumerate(edits):
        if (matrix := known.get(edit.name)) is None:
            raise MissingWeight(f"{model.name} has no matrix {edit.name!r} that can be edited. Name one as W_out.3.")
        if matrix.kind == "W_router":
            raise MissingWeight(f"{edit.name} chooses its experts inside its module: no edit beside it reaches the choice.")
        which = torch.full((len(edit.left),), i)
        found.setdefault(matrix.path, []).append(_Added(edit.left, _as_wide(model, matrix, edit.right), which))
    return {path: _Added(*map(torch.cat, zip(*several, strict=True))) for path, several in found.items()}


def require_new_folder(folder: Path) -> None:
    """
    Raises:
        CannotWrite: if there is something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CannotWrite(f"{str(folder)!r} is not empty, or no folder. Name a new folder for the edited model.")


def _as_wide(model: LanguageModel, matrix: Matrix, right: Tensor) -> Tensor:
    """What is added to all outputs of the matrix's module."""
    module = model.module(matrix.path)
    width = int(getattr(module, "out_features", 0) or getattr(module, "nf", 0) or right.shape[1])
    if matrix.part is None or width == right.shape[1]:
        return right
    whole = right.new_zeros(len(right), width)
    own = matrix.part.cut.take(whole, model.heads)
    matrix.part.cut.put(whole, model.heads, right.reshape(own.shape))
    return whole
