"""A norm with its statistics held at what they are for one state: a linear map, so that what it gives is a sum of parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.architectures.weights import norm_gain
from workbench.errors import UnknownNorm
from workbench.model import LanguageModel
from workbench.projection import accumulation_dtype

ROUNDING = 1e-5
"""How far the linear form may be from what the norm gives, relative to its length. Many norms compute in float32 even where
the model is float64; over all families the worst was 3e-7."""
ROUNDING_OF_HALVES = 2e-2
"""The same where the norm's output is rounded to bfloat16 or float16."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """`bias + scale · gain ⊙ (h - mean(h))`, the mean only if it is `centred`: at the state where it was frozen, the norm.

    Elsewhere it is not the norm, but linear up to the bias, so that the parts of a sum can be followed through it. All in
    float32, or float64 for float64 states.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    """What the norm gives for 0."""
    scale: float
    """One over the state's standard deviation (or root mean square)."""
    centred: bool
    """Whether the mean of the entries is taken off first, as LayerNorm does and RMS norms do not."""

    @classmethod
    @torch.no_grad()
    def of(cls, norm: Callable[[Tensor], Tensor], gain: Tensor | None, state: Float[Tensor, " d_model"]) -> FrozenNorm:
        """Freeze a norm at a state. It is called, never re-implemented: its scale is found from what it gives.

        Args:
            gain: Its effective gain, `1 + weight` where the family has it so; None for a norm without one.
        Raises:
            UnknownNorm: if what it gives is not of the form above; the error that was found is named.
        """
        dtype = accumulation_dtype(state)
        bias = norm(torch.zeros_like(state)).to(dtype)
        found = norm(state).to(dtype) - bias
        shift = state.to(dtype).square().mean().sqrt().to(state.dtype)
        moved = norm(state + shift).to(dtype) - bias
        # A shift of the state's own size turns it by some 45 degrees, which only a norm that centres does not see.
        centred = bool((moved - found).norm() < 0.1 * found.norm())
        gain = torch.ones_like(found) if gain is None else gain.detach().to(found)
        inner = state.to(dtype) - state.to(dtype).mean() * centred
        form = gain * inner
        scale = (found @ form) / form.square().sum().clamp_min(1e-30)
        error = float((found - scale * form).norm() / found.norm().clamp_min(1e-30))
        allowed = allowed_error(state.dtype)
        if not error <= allowed:
            raise UnknownNorm(
                "The norm cannot be frozen: what it gives is not bias + scale · gain ⊙ (h - mean), nor the same "
                f"without the mean (relative error {error:.1e}, allowed {allowed:.0e}). Parts of a sum can be followed "
                "through LayerNorm and RMS norms alone; capture what goes into this one, and take that apart."
            )
        return cls(gain, bias, float(scale), centred)

    def __call__(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What it makes of states."""
        h = h.to(self.gain)
        return self.bias + self.scale * self.gain * (h - h.mean(-1, keepdim=True) if self.centred else h)

    def scales(self, norm: Callable[[Tensor], Tensor], states: Float[Tensor, "token d_model"]) -> Float[Tensor, " token"]:
        """What `scale` is at each of several states, as the norm gives them."""
        h = states.to(self.gain)
        form = self.gain * (h - h.mean(-1, keepdim=True) if self.centred else h)
        return ((norm(states).to(self.gain) - self.bias) * form).sum(-1) / form.square().sum(-1).clamp_min(1e-30)

    def pulled_back(self, direction: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The direction before the norm that reads what `direction` reads after it, the bias apart:
        `h @ pulled_back(d) = (norm(h) - bias) @ d`."""
        back = self.scale * self.gain * direction.to(self.gain)
        return back - back.mean(-1, keepdim=True) if self.centred else back


def allowed_error(dtype: torch.dtype) -> float:
    """How far a sum may be from its parts, relative to its length, where it is stored in this dtype."""
    return ROUNDING if dtype.itemsize > 2 else ROUNDING_OF_HALVES


def frozen_norm(model: LanguageModel, path: str, state: Float[Tensor, " d_model"]) -> FrozenNorm:
    """One of a model's norms of the stream, by its module path, frozen at a state.

    Raises:
        UnknownNorm: if it is neither a LayerNorm nor an RMS norm.
    """
    norm = model.module(path)
    return FrozenNorm.of(norm.forward, norm_gain(norm, model.row), state)  # not the module: its hooks may edit
