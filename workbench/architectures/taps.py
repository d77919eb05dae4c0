"""Where each site is read from the modules, and why a family does not have it where it does not."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workbench.architectures.cuts import WHOLE, Cut, Heads, Pairs, RotatedKeys, RotatedQueries, Values
from workbench.architectures.row import Architecture, Block
from workbench.attention import INSIDE
from workbench.errors import UnknownSite
from workbench.sites import Site

_NEURONS = {"mlp_pre", "mlp_up", "mlp_post"}
_ATTENTION = {"attn_out", "q", "k", "v", "z", "result", *INSIDE}


@dataclass(frozen=True)
class Tap:
    """How a site is read from the model, and written: a module, its input or output, and what makes the site of that."""

    path: str
    """Module path from the causal language model."""
    end: Literal["input", "output", "inside"]
    """`inside`: between two calls of the attention function, see `workbench.attention`."""
    cut: Cut
    heads: Heads
    item: int = 0
    """Which item, where the module gives a tuple."""
    scale: float = 1.0
    """The site is the tensor times this."""
    block: str | None = None
    """Where the tensor comes as `[batch·pos, …]`: the block, whose input has the two axes."""
    mutated: bool = False
    """Whether the model changes the tensor in place later."""
    passed_by: str | None = None
    """Why writing here would not reach the model, where it would not."""

    def read(self, value: Tensor, axes: tuple[int, int] | None) -> Tensor:
        """The site, of the module's tensor; `axes` are batch and pos, where that tensor has lost them."""
        seen = self.cut.take(self._unflattened(value, axes), self.heads)
        if self.scale != 1.0:
            return seen * self.scale
        return seen.clone() if self.mutated else seen

    def write(self, value: Tensor, new: Tensor, axes: tuple[int, int] | None) -> Tensor:
        """The module's tensor with the site set to `new`; neither is changed."""
        if self.scale != 1.0:
            new = new.reshape(value.shape)
            whole = new / self.scale
            # What was not changed must stay bitwise, which a division need not give; but a gradient goes through it.
            new = whole if whole.requires_grad else torch.where(new == value * self.scale, value, whole)
        new = new.to(value.dtype)
        if self.cut is WHOLE:
            return new.reshape(value.shape).clone() if self.mutated else new.reshape(value.shape)
        whole = value.clone()
        self.cut.put(self._unflattened(whole, axes), self.heads, new)
        return whole

    def _unflattened(self, value: Tensor, axes: tuple[int, int] | None) -> Tensor:
        return value if axes is None or value.dim() != 2 else value.unflatten(0, axes)


def tap(row: Architecture, site: Site, heads: Heads) -> Tap:
    """Where a site is read.

    Raises:
        UnknownSite: if this layer does not have it; the text says why and what exists instead.
    """
    if site.name == "embed":
        return Tap(row.path("embed"), "output", WHOLE, heads)
    if site.name == "ln_final":
        return Tap(row.path("ln_final"), "output", WHOLE, heads)
    assert site.layer is not None
    block = row.block(site.layer)
    if (reason := why_not(block, site.name)) is not None:
        raise UnknownSite(f"Site '{site}' does not exist in {row.model_type!r}: {reason}")
    path, end, cut = _place(block, site.name)
    name, experts = site.name, block.experts
    return Tap(
        path=row.path(path, site.layer).rstrip("."),
        end=end,
        cut=cut,
        heads=heads,
        item=experts.router_item if name == "router_logits" and experts is not None else 0,
        scale=block.residual_multiplier if name in ("attn_out", "mlp_out", "result") else 1.0,
        block=row.path("", site.layer).rstrip(".") if name in block.flattened else None,
        mutated=name in block.mutated,
        passed_by=READ_ONLY.get(name),
    )


READ_ONLY = {
    "result": "the heads are added up in one product. Write z, of which it is made",
    "resid_mid": "the stream itself passes this place by. Write attn_out, which is added to it, or resid_post",
    "router_logits": "the router has chosen its experts already when it gives them. Write mlp_out, or the router's weight",
}
"""Sites where writing would not reach the model, and why."""


def why_not(block: Block, name: str) -> str | None:
    """Why a block does not have a site, and what it has instead; None if it has it."""
    if name in _ATTENTION and block.attn is None:
        return (
            "this layer mixes positions without attention. Use resid_mid - resid_pre for what it adds; layers with "
            "attention have q k v z attn_out."
        )
    if name in INSIDE and block.no_pattern:
        return f"{block.no_pattern}. Use q, k and v before it and z after it."
    if name == "k" and block.k is None:
        return "keys are put together of a part a head and a part that all heads share. Use q and v, or attn_out."
    if name == "ln1" and block.ln1 is None:
        return "attention reads the stream as it is, and what it gives is normed. Use resid_pre, which it reads, or attn_out."
    if name == "ln2" and block.ln2 is None:
        return "the MLP reads the stream as it is, and what it gives is normed. Use resid_mid, which it reads, or mlp_out."
    if name == "resid_mid" and block.parallel:
        return "attention and MLP run in parallel, so there is no stream between them. Use resid_pre or resid_post."
    if name in _NEURONS and block.up is None:
        return (
            "this layer is a mixture of experts: each token has the neurons of its own experts, and no tensor holds "
            "them in one order. Use mlp_out, router_logits, or weight('W_in', layer, expert=0)."
        )
    if name == "mlp_up" and not block.is_gated:
        return "its MLP has no gate. Use mlp_pre (before the nonlinearity) or mlp_post (the neurons)."
    if name == "router_logits" and block.experts is None:
        return "this layer has no experts to choose from. Use mlp_pre or mlp_post, its neurons."
    return None


def _place(block: Block, name: str) -> tuple[str, Literal["input", "output", "inside"], Cut]:
    """Module inside the block, its end, and the cut of a site that the block has."""
    if name in ("resid_pre", "resid_post"):
        return "", "input" if name == "resid_pre" else "output", WHOLE
    if name in ("attn_out", "mlp_out"):
        module = (block.ln1_post or block.attn) if name == "attn_out" else (block.ln2_post or block.mlp)
        assert module is not None
        return module, "output", WHOLE
    if name in ("ln1", "ln2"):
        norm = block.ln1 if name == "ln1" else block.ln2
        assert norm is not None
        return norm, "output", WHOLE
    if name == "resid_mid":
        return block.ln2 or block.mlp, "input", WHOLE
    if name == "router_logits":
        assert block.experts is not None
        return block.experts.router, "output", WHOLE
    if name in INSIDE:
        assert block.o is not None
        scores = Pairs(block.sinks)
        cuts = {"q_rot": RotatedQueries(), "k_rot": RotatedKeys(), "attn_scores": scores, "pattern": scores}
        return block.o.path.rpartition(".")[0], "inside", cuts[name]
    part = {
        "q": block.q, "k": block.k, "v": block.v, "z": block.o, "result": block.o,
        "mlp_pre": block.gate or block.up, "mlp_up": block.up, "mlp_post": block.down,
    }[name]  # fmt: skip
    assert part is not None
    if name in ("z", "result"):
        return part.path, "input", Values()
    return part.path, "input" if name == "mlp_post" else "output", part.cut
