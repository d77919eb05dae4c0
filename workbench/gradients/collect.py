"""One forward and one backward pass, of which both factors of every matrix's gradient are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.capturing import keeping
from workbench.errors import NoGradient, NotFinite
from workbench.gradients.gradient import Gradient
from workbench.gradients.matrices import WRITING, Matrix, matrices_of
from workbench.model import Batch, LanguageModel
from workbench.sites import Site
from workbench.tracer import edited, factors_of

log = logging.getLogger("workbench")

Loss = Callable[[Float[Tensor, "batch kept d_vocab"], Batch], Float[Tensor, ""]]
"""From logits, in the columns that are kept, to one number."""

SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
"""What a loss in float16 is multiplied by, the first that does not overflow: derivatives of 6e-8 and less are 0 in it."""


@dataclass(frozen=True, eq=False, repr=False)
class Gradients(Mapping[str, Gradient]):
    """`gradients["W_out.3"]` is the gradient of a matrix of a block; those that no row names are under their module's path.

    `gradients["W_E"]` and `gradients["W_U"]` are those of embedding and head, apart also where they are one matrix. Projections
    that lie in one module are told apart; heads stand side by side in `W_Q`, `W_K` and `W_V` (`[d_model, heads · d_head]`).
    """

    model: LanguageModel
    batch: Batch
    loss: float
    """Of all texts together, in nats where it is the targets' own."""
    matrices: dict[str, Matrix]
    stream: dict[str, Float[Tensor, "token d_model"]]
    """Derivative of the loss at the stream after attention or MLP, by `attn_out.3` or `mlp_out.3`, where it is not that at the
    matrix which writes there: behind a norm or a multiplier."""
    columns: Int[Tensor, " kept"] | None
    """Columns of the batch whose logits the loss was made of; None: all."""
    inputs: dict[str, Float[Tensor, "batch pos d_in"]]
    derivatives: dict[str, Float[Tensor, "batch pos d_out"]]

    def __getitem__(self, name: str) -> Gradient:
        """
        Raises:
            KeyError: if it is not among those asked for; the text names some.
        """
        row, pos = self.tokens_at
        if name == "W_E":
            ids = self.batch.tokens[self.batch.mask]
            X = torch.zeros(len(ids), self.model.d_vocab, dtype=self.model.dtype, device=ids.device)
            X[torch.arange(len(ids)), ids] = torch.tensor(self.model.row.embed_scale).to(X)  # Gemma keeps it in float32
            return Gradient(name, X, self._real(self.derivatives["embed"]), row, pos)
        if name == "W_U":
            mask = self.batch.mask if self.columns is None else self.batch.mask[:, self.columns]
            place = self._places if self.columns is None else self._places[:, self.columns]
            X, D = (found["head"][mask.to(found["head"].device)] for found in (self.inputs, self.derivatives))
            return Gradient(name, X, D, mask.nonzero()[:, 0], place[mask])
        if name not in self.matrices:
            raise KeyError(f"{name} has no gradient here; there are {', '.join(list(self.matrices)[:8])} … W_E, W_U")
        one = self.matrices[name]
        D = self.derivatives[one.path]
        if one.part is not None:
            D = one.part.cut.take(D, self.model.heads)
            D = D.flatten(2) if D.dim() == 4 else D
        return Gradient(name, self._real(self.inputs[one.path]), self._real(D), row, pos)

    def __iter__(self) -> Iterator[str]:
        return iter([*self.matrices, "W_E", "W_U"])

    def __len__(self) -> int:
        return len(self.matrices) + 2

    def __repr__(self) -> str:
        rows, tokens = len(self.batch.mask), int(self.batch.mask.sum())
        return f"Gradients of {self.model.name}: {len(self)} matrices, {rows} texts, {tokens} tokens, loss {self.loss:.4f}"

    def influence(self, other: Gradients) -> dict[str, float]:
        """By how much a step of size 1 on this loss, of one matrix alone, changes the other loss, to first order."""
        shared = [name for name in self.matrices if name in other.matrices]
        return {name: -self[name].inner(other[name]) for name in shared}

    @property
    def tokens_at(self) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
        """Text and position of every real token, in the order of all factors."""
        return self.batch.mask.nonzero()[:, 0], self._places[self.batch.mask]

    @property
    def _places(self) -> Int[Tensor, "batch pos"]:
        return self.batch.mask.long().cumsum(1) - 1

    def _real(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if bool(self.batch.mask.all()) else x[self.batch.mask.to(x.device)]


def collect_gradients(
    model: LanguageModel,
    batch: Batch,
    loss: Loss,
    *,
    columns: Int[Tensor, " kept"] | None = None,
    layers: str | None = None,
    matrices: Sequence[str] | None = None,
) -> Gradients:
    """Run the model forward and backward once, and keep both factors of the gradients of its matrices.

    Derivatives are taken of activations alone: no gradient of the size of a weight is ever made. Of float16 models the loss is
    multiplied by a power of 2 before the backward pass, and what is found divided by it, in float32.

    Args:
        loss: From logits and batch to a number.
        columns: Columns of the batch whose logits it needs; all, if None.
        layers: Blocks, as `parse_layers` reads them; all, if None.
        matrices: As `matrices_of`.
    Raises:
        NoGradient: if the loss does not depend on the texts by way of a graph, the weights take none, or a matrix's input is
            not one row a token.
        NotFinite: if the loss, or a derivative at every scale, is NaN or infinite.
        MissingWeight, LayerOutOfRange, TextTooLong: as `matrices_of` and `capture`.
    """
    if torch.is_inference_mode_enabled() or next(model.hf.parameters()).is_inference():
        raise NoGradient(
            f"{model.name!r} was loaded, or is run, in torch.inference_mode(), where nothing can be differentiated. Leave that "
            "block before both (torch.no_grad() does no harm)."
        )
    chosen = {one.name: one for one in matrices_of(model, layers, matrices)}
    items = {one.path: one.item for one in chosen.values()} | {model.row.head: 0}
    stream: dict[str, Tensor] = {}
    embed = Site("embed")
    with (
        frozen(model),
        factors_of(model, items) as factors,
        edited(model, {site: partial(_noted, stream, name) for name, site in _apart(model, chosen.values()).items()}),
        keeping(model, [embed], to_the_end=True, gradients=True) as kept,
    ):
        logits = model.forward(batch, columns)
        number = loss(logits, batch)
        _require_graph(model, number)
        for scale in SCALES if model.dtype == torch.float16 else (1.0,):
            for found in (*factors.derivatives.values(), stream):
                found.clear()
            (start,) = torch.autograd.grad(number * scale, kept[embed], retain_graph=scale > 1, allow_unused=True)
            if start is None:
                raise _no_graph(model, number)
            if torch.isfinite(start).all():
                break
        else:
            raise NotFinite(
                "The derivative of the loss is NaN or infinite. Find where it arises (wb.capture of the same texts), or load "
                "the model in another dtype."
            )
    if scale > 1:
        log.warning(
            "float16 holds no derivative below 6e-8: the loss was multiplied by %d for the backward pass, and what was found "
            "divided by it. bfloat16 or float32 need neither.", int(scale),
        )  # fmt: skip
    if start[~batch.mask.to(start.device)].any():
        raise NoGradient(
            "The loss reads columns that are padding, which are no tokens of the texts. Choose columns by batch.mask, or give "
            "texts of equal length."
        )
    unscaled = partial(_unscaled, scale=scale)
    shape = batch.tokens.shape
    (of_head, *_), (at_head, *_) = factors.inputs.pop(model.row.head), factors.derivatives.pop(model.row.head)
    if columns is not None and of_head.shape[1] == shape[1]:  # of a model that cannot leave the other columns out
        of_head, at_head = of_head[:, columns.cpu()], at_head[:, columns.cpu()]
    inputs = {path: _one_row_a_token(path, found, shape) for path, found in factors.inputs.items()}
    derivatives = {path: unscaled(_one_row_a_token(path, found, shape)) for path, found in factors.derivatives.items()}
    return Gradients(
        model, batch, float(number.detach()), {name: one for name, one in chosen.items() if one.path in inputs},
        {name: unscaled(found.reshape(*shape, -1)[batch.mask.to(found.device)]) for name, found in stream.items()},
        columns, inputs | {"head": of_head}, derivatives | {"head": unscaled(at_head), "embed": unscaled(start)},
    )  # fmt: skip


@contextmanager
def frozen(model: LanguageModel) -> Iterator[None]:
    """While open, no weight asks for a gradient, so that passes keep nothing for one."""
    asking = [weight for weight in model.hf.parameters() if weight.requires_grad]
    for weight in asking:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)


def _apart(model: LanguageModel, matrices: Iterable[Matrix]) -> dict[str, Site]:
    """Where the stream has what `attn_out` or `mlp_out` add, for matrices that write to it through a norm or a multiplier."""
    found = {}
    for one in matrices:
        block, attention = model.row.block(one.layer), one.kind == "W_O"
        behind = block.residual_multiplier != 1 or (block.ln1_post if attention else block.ln2_post) is not None
        if one.kind in WRITING and behind:
            after = Site("resid_mid" if attention and not block.parallel else "resid_post", one.layer)
            found[f"{'attn_out' if attention else 'mlp_out'}.{one.layer}"] = after
    return found


def _noted(stream: dict[str, Tensor], name: str, seen: Tensor) -> Tensor:
    """The tensor itself, whose derivative the backward pass will note."""
    seen.register_hook(partial(stream.__setitem__, name))
    return seen


def _one_row_a_token(path: str, calls: list[Tensor], shape: torch.Size) -> Tensor:
    """`[batch, pos, d]`, of a module that saw every token once and in order.

    Raises:
        NoGradient: if it did not.
    """
    if len(calls) != 1 or calls[0].numel() // calls[0].shape[-1] != shape.numel():
        raise NoGradient(
            f"{path} was not given one row a token ({[list(one.shape) for one in calls]} for {list(shape)} tokens): it is an "
            "expert, or is called several times a pass (gradient checkpointing does so), and its gradient cannot be laid out "
            "by token. Name the matrices (W_Q, W_O, …)."
        )
    return calls[0].reshape(*shape, -1)


def _unscaled(found: Tensor, scale: float) -> Tensor:
    return found if scale == 1.0 else found.float() / scale


def _require_graph(model: LanguageModel, number: Any) -> None:
    """
    Raises:
        NoGradient: if no derivative can be taken of the loss.
        NotFinite: if it is NaN or infinite.
    """
    if not isinstance(number, Tensor) or number.dim() or not number.requires_grad:
        raise _no_graph(model, number)
    if not bool(torch.isfinite(number)):
        raise NotFinite(
            f"The loss is {float(number.detach())}: there is no gradient of it. Look at the logits (wb.capture(logits=True))."
        )


def _no_graph(model: LanguageModel, number: Any) -> NoGradient:
    found = f"shape {list(number.shape)}, requires_grad {number.requires_grad}" if isinstance(number, Tensor) else repr(number)
    return NoGradient(
        f"The loss is no single number that depends on the texts through {model.name!r} ({found}): is it a tensor made of the "
        "logits it was given, and does the model compute with plain tensors?"
    )
