"""One row a model family: where its blocks, norms and matrices are. The only file that knows Hugging Face's attribute paths.

A row is data. A family whose blocks depend on its config is a function from the config to a row. What a row claims is
checked on the model itself when it is loaded (`workbench.verification`); a row that is wrong is refused, not believed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.errors import MissingWeight, UnknownArchitecture, UnknownSite
from workbench.sites import Site


class Heads(NamedTuple):
    """Numbers that fused projections are cut by."""

    n_heads: int
    n_key_value_heads: int
    d_head: int


@dataclass(frozen=True)
class Part:
    """One weight matrix: the linear module it lies in, and which of that module's outputs are its own."""

    path: str
    """Path inside the block."""
    take: Callable[[Tensor, Heads], Tensor] | None = None
    """A view of the module's outputs (last axis); the same cut serves activations, weights and biases. All, if None."""


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its parts. The defaults are llama's, from which most families differ in a line or two."""

    model_type: str
    # Paths from the causal language model.
    embed: str = "model.embed_tokens"
    layers: str = "model.layers"
    ln_final: str = "model.norm"
    head: str = "lm_head"
    # Paths inside a block. A post-norm acts on what attention or MLP give, before it is added to the stream.
    attn: str = "self_attn"
    mlp: str = "mlp"
    ln1: str | None = "input_layernorm"
    ln1_post: str | None = None
    ln2: str | None = "post_attention_layernorm"
    ln2_post: str | None = None
    parallel: bool = False
    """Attention and MLP read the same stream and are added together: there is no stream between them."""
    q: Part = Part("self_attn.q_proj")
    k: Part = Part("self_attn.k_proj")
    v: Part = Part("self_attn.v_proj")
    o: Part = Part("self_attn.o_proj")
    up: Part = Part("mlp.up_proj")
    gate: Part | None = Part("mlp.gate_proj")
    down: Part = Part("mlp.down_proj")
    act: str = "mlp.act_fn"
    norm_gain_offset: float = 0.0
    """1 where the norm multiplies by `1 + weight` (Gemma)."""
    logit_scale: float = 1.0
    """Logits are multiplied by this before the soft cap."""
    softcap: float | None = None
    """Final logits are `c · tanh(logits / c)`."""

    @property
    def is_gated(self) -> bool:
        return self.gate is not None


class Tap(NamedTuple):
    """How a site is read from the model: a module, its input or output, and a view of that tensor."""

    path: str
    """Module path from the causal language model."""
    end: Literal["input", "output"]
    view: Callable[[Tensor], Tensor] | None


def architecture_of(config: Any) -> Architecture:
    """The row of the family that this config belongs to.

    Raises:
        UnknownArchitecture: if there is none.
    """
    model_type = getattr(config, "model_type", None)
    row = ROWS.get(model_type or "")
    if row is None:
        raise unknown_architecture(model_type)
    return row(config) if callable(row) else row


def unknown_architecture(model_type: str | None) -> UnknownArchitecture:
    """The error of a family without a row."""
    return UnknownArchitecture(
        f"Model family {model_type!r} has no row in workbench/architectures.py. Known families: "
        f"{', '.join(sorted(ROWS))}. Add a row (ten lines at most), or load a model of a known family."
    )


def missing_modules(row: Architecture, model: nn.Module) -> list[str]:
    """Paths of the row, those of the first block included, that lead nowhere in this model."""
    block = f"{row.layers}.0."
    inside = [row.attn, row.mlp, row.ln1, row.ln1_post, row.ln2, row.ln2_post, row.act]
    inside += [part.path for part in (row.q, row.k, row.v, row.o, row.up, row.gate, row.down) if part is not None]
    paths = [row.embed, row.layers, row.ln_final, row.head, *(block + path for path in inside if path is not None)]
    return [path for path in paths if not _leads_somewhere(model, path)]


def _leads_somewhere(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def tap(row: Architecture, site: Site, heads: Heads) -> Tap:
    """Where a site is read.

    Raises:
        UnknownSite: if the family does not have it; the text says why and what exists instead.
    """
    name = site.name
    if name == "embed":
        return Tap(row.embed, "output", None)
    if name == "ln_final":
        return Tap(row.ln_final, "output", None)
    if name == "resid_mid" and row.parallel:
        raise UnknownSite(
            f"Site '{site}' does not exist in {row.model_type!r}: attention and MLP run in parallel, "
            "so there is no stream between them. Use resid_pre or resid_post."
        )
    if name == "mlp_up" and not row.is_gated:
        raise UnknownSite(
            f"Site '{site}' does not exist in {row.model_type!r}: its MLP has no gate. "
            "Use mlp_pre (before the nonlinearity) or mlp_post (the neurons)."
        )
    block = f"{row.layers}.{site.layer}"
    pre = row.gate if row.gate is not None else row.up
    path, end, part = {
        "resid_pre": ("", "input", None),
        "resid_mid": (row.ln2 or row.mlp, "input", None),
        "resid_post": ("", "output", None),
        "attn_out": (row.ln1_post or row.attn, "output", None),
        "mlp_out": (row.ln2_post or row.mlp, "output", None),
        "q": (row.q.path, "output", row.q),
        "k": (row.k.path, "output", row.k),
        "v": (row.v.path, "output", row.v),
        "z": (row.o.path, "input", Part(row.o.path, _by_head)),
        "mlp_pre": (pre.path, "output", pre),
        "mlp_up": (row.up.path, "output", row.up),
        "mlp_post": (row.down.path, "input", None),
    }[name]
    take = None if part is None else part.take
    view = None if take is None else lambda x: take(x, heads)
    return Tap(f"{block}.{path}".rstrip("."), "input" if end == "input" else "output", view)


def linear_weight(module: nn.Module) -> Tensor:
    """A linear module's weight as `[d_in, d_out]`, so that `x @ W` reads like the paper. A view, never a copy.

    Raises:
        MissingWeight: if the module holds no plain floating-point matrix (quantised, or offloaded to disk).
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise MissingWeight(
            f"{type(module).__name__} holds no plain floating-point weight (is the model quantised?). "
            "Load it unquantised to read its weights; capturing activations works as it is."
        )
    if weight.is_meta:
        raise MissingWeight("This weight is offloaded (device 'meta'). Load the model without disk offload to read it.")
    return weight if isinstance(module, Conv1D) else weight.T


def norm_gain(norm: nn.Module, row: Architecture) -> Tensor | None:
    """What a norm multiplies the normalised stream by, `[d_model]`; None if it has no such weight.

    With an offset it is float32, as the norm itself adds it: in bfloat16 `1 + weight` would lose half the weight's bits.
    """
    weight = getattr(norm, "weight", None)
    if weight is None or not row.norm_gain_offset:
        return weight
    return weight.float() + row.norm_gain_offset


def norm_bias(norm: nn.Module) -> Tensor | None:
    """What a norm adds last, `[d_model]`; None if nothing."""
    return getattr(norm, "bias", None)


def _by_head(x: Tensor, heads: Heads) -> Tensor:
    return x.unflatten(-1, (-1, heads.d_head))


def _third_by_head(index: int) -> Callable[[Tensor, Heads], Tensor]:
    """Queries, keys and values side by side: GPT-2's `c_attn`."""
    return lambda x, heads: x.unflatten(-1, (3, heads.n_heads, heads.d_head))[..., index, :, :]


def _interleaved(index: int) -> Callable[[Tensor, Heads], Tensor]:
    """Query, key and value of a head side by side, head after head: GPT-NeoX."""
    return lambda x, heads: x.unflatten(-1, (heads.n_heads, 3, heads.d_head))[..., index, :]


def _separate(path: str) -> Part:
    return Part(path, _by_head)


_LLAMA = Architecture(
    "llama",
    q=_separate("self_attn.q_proj"),
    k=_separate("self_attn.k_proj"),
    v=_separate("self_attn.v_proj"),
)


def _gpt_neox(config: Any) -> Architecture:
    return Architecture(
        "gpt_neox",
        embed="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        ln_final="gpt_neox.final_layer_norm",
        attn="attention",
        parallel=config.use_parallel_residual,
        q=Part("attention.query_key_value", _interleaved(0)),
        k=Part("attention.query_key_value", _interleaved(1)),
        v=Part("attention.query_key_value", _interleaved(2)),
        o=Part("attention.dense"),
        up=Part("mlp.dense_h_to_4h"),
        gate=None,
        down=Part("mlp.dense_4h_to_h"),
        act="mlp.act",
    )


def _gemma(model_type: str) -> Callable[[Any], Architecture]:
    """Gemma 2 and 3: four norms a block, all `1 + weight`; the softcap is in the config (None in most of Gemma 3)."""
    return lambda config: replace(
        _LLAMA,
        model_type=model_type,
        ln1_post="post_attention_layernorm",
        ln2="pre_feedforward_layernorm",
        ln2_post="post_feedforward_layernorm",
        norm_gain_offset=1.0,
        softcap=config.final_logit_softcapping,
    )


ROWS: dict[str, Architecture | Callable[[Any], Architecture]] = {
    "gpt2": Architecture(
        "gpt2",
        embed="transformer.wte",
        layers="transformer.h",
        ln_final="transformer.ln_f",
        attn="attn",
        ln1="ln_1",
        ln2="ln_2",
        q=Part("attn.c_attn", _third_by_head(0)),
        k=Part("attn.c_attn", _third_by_head(1)),
        v=Part("attn.c_attn", _third_by_head(2)),
        o=Part("attn.c_proj"),
        up=Part("mlp.c_fc"),
        gate=None,
        down=Part("mlp.c_proj"),
        act="mlp.act",
    ),
    "gpt_neox": _gpt_neox,
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, model_type="mistral"),
    "qwen2": replace(_LLAMA, model_type="qwen2"),
    "qwen3": replace(_LLAMA, model_type="qwen3"),
    "gemma2": _gemma("gemma2"),
    "gemma3_text": _gemma("gemma3_text"),
}
"""Every family that can be loaded, by `config.model_type`."""
