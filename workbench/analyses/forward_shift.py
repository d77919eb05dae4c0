"""Editing without a gradient: what a step would write, written by a forward pass alone.

Source: Katz et al. 2024 (arXiv 2402.12865), section 7: `W_out + η xᵀ e`, where x is what the neurons of a layer say at a
prompt's last token and e the vector of a target. Where the same x comes again, the layer writes `η |x|² e` more, which adds `η
|x|² |e|²` to the target's logit before the final norm. The paper takes e from the embedding, which in GPT-2 is the head too;
here it is the head's column, also where the two differ.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.capturing import capture
from workbench.errors import UnknownOption
from workbench.gradients.targets import Target, with_targets
from workbench.model import LanguageModel
from workbench.projection import accumulation_dtype
from workbench.weight_edits import WeightEdit


def forward_shift(
    model: LanguageModel,
    prompt: str,
    target: Target,
    layer: int,
    *,
    strength: float | None = None,
    step: float | None = None,
) -> WeightEdit:
    """The edit of one layer's `W_out` that raises the first token of a target after a prompt. For `wb.edit_weights` or
    `wb.save_edited`.

    Args:
        strength: How long what is written at the prompt's last token is, relative to the stream there; behind a norm (Gemma 2,
            OLMo 2), which sets the length of all that reaches the stream, relative to what the matrix itself gives there.
            (Neurons are of very unequal size from layer to layer: one η is a whisper in one and destroys the next.)
        step: The paper's η, in the place of a strength.
    Raises:
        UnknownOption: if not one of strength and step is given.
        MissingWeight: if the layer has no `W_out` of its own (a mixture of experts).
        LayerOutOfRange, UnknownToken, TextTooLong: as `capture` and `with_targets`.
    """
    if (strength is None) == (step is None):
        raise UnknownOption(f"strength={strength}, step={step}: give one of the two.")
    if model.block_row(layer).down is None:
        model.weight("W_out", layer)  # says why there is none
    layer %= model.n_layers
    acts = capture(model, prompt, [f"mlp_post.{layer}", f"resid_post.{layer}"], positions="last")
    x, h = acts[f"mlp_post.{layer}"][0, 0], acts[f"resid_post.{layer}"][0, 0]
    token = int(with_targets(model, prompt, target).token[0])
    return shift_of(model, layer, x, h, token, strength=strength, step=step)


def shift_of(
    model: LanguageModel,
    layer: int,
    x: Float[Tensor, " d_mlp"],
    h: Float[Tensor, " d_model"],
    token: int,
    *,
    strength: float | None = None,
    step: float | None = None,
) -> WeightEdit:
    """`forward_shift` of neurons x and stream h that are known."""
    x = x.to(accumulation_dtype(x))
    e = model.vocabulary.direction(token).detach().to(x)
    if step is None:
        assert strength is not None
        block = model.block_row(layer)
        own = h.to(x) / block.residual_multiplier if block.ln2_post is None else _given(model, layer, x)
        step = float(strength * own.norm() / (x.square().sum() * e.norm()))
    return WeightEdit(f"W_out.{layer}", x[None], step * e[None])


def _given(model: LanguageModel, layer: int, x: Float[Tensor, " d_mlp"]) -> Float[Tensor, " d_model"]:
    """What the matrix gives for the neurons."""
    bias = model.optional_weight("b_out", layer)
    given = x @ model.weight("W_out", layer).detach().to(x)
    return given if bias is None else given + bias.detach().to(x)


def random_like(edit: WeightEdit, seed: int) -> WeightEdit:
    """The null of an edit of rank 1: it acts at the same inputs and is as long, but writes a random direction."""
    assert len(edit.left) == 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(edit.right.shape, generator=generator).to(edit.right)
    return WeightEdit(edit.name, edit.left, drawn * (edit.right.norm() / drawn.norm()))
