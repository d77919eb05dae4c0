"""The rows: one a family of models. A row is data; a family whose blocks depend on its config is a function to a row.

What a row claims is checked on the model itself when it is loaded (`workbench.verification`); a row that is wrong is
refused, not believed. Facts are read from transformers' own modelling files (5.23, and held by tests on tiny models).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.architectures.cuts import ByHead, Grouped, Half, Heads, OfHead, Stacked
from workbench.architectures.row import Architecture, Block, Experts, Part
from workbench.errors import UnknownArchitecture

Row = Architecture | Callable[[Any], Architecture]

LLAMA = Block()
"""Two pre-norms, separate projections, a gated MLP: also Mistral, Qwen, and most of what came after."""


def heads_of(config: Any, d_model: int) -> Heads:
    """Heads by the config's usual fields."""
    n_heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or d_model // n_heads
    return Heads(n_heads, getattr(config, "num_key_value_heads", None) or n_heads, d_head, d_head)


def _plain(path_up: str, path_act: str, path_down: str) -> dict[str, Any]:
    """An MLP without a gate."""
    return {"up": Part(path_up), "gate": None, "down": Part(path_down), "act": path_act}


def _attention(q: str, k: str, v: str, o: str) -> dict[str, Any]:
    return {"q": Part(q, ByHead()), "k": Part(k, ByHead()), "v": Part(v, ByHead()), "o": Part(o)}


def _fused(cut: type[Stacked] | type[Grouped], path: str, o: str) -> dict[str, Any]:
    """Queries, keys and values in one module."""
    return {"q": Part(path, cut("q")), "k": Part(path, cut("k")), "v": Part(path, cut("v")), "o": Part(o)}


_GATE_UP: dict[str, Any] = {
    "gate": Part("mlp.gate_up_proj", Half(0)), "up": Part("mlp.gate_up_proj", Half(1)), "act": "mlp.activation_fn",
}  # fmt: skip
_POST_ONLY: dict[str, Any] = {
    "ln1": None, "ln1_post": "post_attention_layernorm", "ln2": None, "ln2_post": "post_feedforward_layernorm",
}  # fmt: skip
"""OLMo 2 and its kind: attention and MLP read the stream as it is, and what they give is normed."""


def _like_llama(model_type: str, **changes: Any) -> Architecture:
    return Architecture(model_type, blocks=(replace(LLAMA, **changes),))


# GPT and its kin -----------------------------------------------------------------------------------------------------

_GPT_PATHS: dict[str, Any] = {"backbone": "transformer", "embed": "wte", "layers": "h", "ln_final": "ln_f"}
_GPT_MLP: dict[str, Any] = _plain("mlp.c_fc", "mlp.act", "mlp.c_proj")

GPT2 = Architecture(
    "gpt2",
    **_GPT_PATHS,
    blocks=(Block(attn="attn", ln1="ln_1", ln2="ln_2", **_fused(Stacked, "attn.c_attn", "attn.c_proj"), **_GPT_MLP),),
)

_GPT_NEO_ATTENTION: dict[str, Any] = _attention(*(f"attn.attention.{name}_proj" for name in ("q", "k", "v", "out")))
GPT_NEO = Architecture(
    "gpt_neo", **_GPT_PATHS, blocks=(Block(attn="attn", ln1="ln_1", ln2="ln_2", **_GPT_NEO_ATTENTION, **_GPT_MLP),)
)

GPTJ = Architecture(
    "gptj",
    **_GPT_PATHS,
    blocks=(
        Block(
            attn="attn",
            ln1="ln_1",
            ln2="ln_1",
            parallel=True,
            **_attention("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"),
            **_plain("mlp.fc_in", "mlp.act", "mlp.fc_out"),
        ),
    ),
)

_H_TO_4H: dict[str, Any] = _plain("mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h")


def gpt_neox(config: Any) -> Architecture:
    """Also Pythia. Parallel blocks have two norms of the same stream."""
    block = Block(
        attn="attention",
        parallel=config.use_parallel_residual,
        **_fused(Grouped, "attention.query_key_value", "attention.dense"),
        **_H_TO_4H,
    )
    return Architecture("gpt_neox", backbone="gpt_neox", embed="embed_in", ln_final="final_layer_norm", blocks=(block,))


def opt(config: Any) -> Architecture:
    """Fully connected layers without a module of their own, which see `[batch·pos, d]`."""
    projected = config.word_embed_proj_dim != config.hidden_size
    if not config.do_layer_norm_before or projected or config._remove_final_layer_norm:
        raise UnknownArchitecture(
            "This OPT (as opt-350m) norms the stream itself after each addition, projects it at both ends, or has no final "
            "norm, so no site would be what its name says. The other OPT models have a row."
        )
    block = Block(
        attn="self_attn",
        mlp="fc2",
        ln1="self_attn_layer_norm",
        ln2="final_layer_norm",
        **_attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        **_plain("fc1", "activation_fn", "fc2"),
        flattened=frozenset({"resid_mid", "ln2", "mlp_pre", "mlp_post", "mlp_out"}),
    )
    return Architecture("opt", backbone="model.decoder", ln_final="final_layer_norm", blocks=(block,))


def bloom(config: Any) -> Architecture:
    """Its attention and MLP modules add the stream themselves: what they add is read from their last linear layers."""
    if config.apply_residual_connection_post_layernorm:
        raise UnknownArchitecture(
            "This BLOOM adds to the normed stream (apply_residual_connection_post_layernorm), which no released one does: "
            "resid_pre + attn_out = resid_mid would not hold. There is no row for it."
        )
    block = Block(
        attn="self_attention.dense",
        mlp="mlp.dense_4h_to_h",
        **_fused(Grouped, "self_attention.query_key_value", "self_attention.dense"),
        **dict(_H_TO_4H, act="mlp.gelu_impl"),
    )
    return Architecture("bloom", **dict(_GPT_PATHS, embed="word_embeddings"), blocks=(block,))


def falcon(config: Any) -> Architecture:
    """Three kinds: sequential (rw), parallel with one norm (7b), parallel with two (40b and later, grouped heads)."""
    if config.new_decoder_architecture and not config.parallel_attn:
        raise UnknownArchitecture("The newer Falcon has parallel blocks: with parallel_attn=False transformers cannot run it.")
    parallel = config.new_decoder_architecture or config.parallel_attn
    two_norms = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    if two_norms:
        norms: dict[str, Any] = {"ln1": "ln_attn", "ln2": "ln_mlp"}
    else:
        norms = {"ln1": "input_layernorm", "ln2": "input_layernorm" if parallel else "post_attention_layernorm"}
    if config.new_decoder_architecture:
        n_kv, cut = config.num_kv_heads, Grouped
    else:
        n_kv, cut = (1, Stacked) if config.multi_query else (config.num_attention_heads, Grouped)
    d_head = config.hidden_size // config.num_attention_heads
    block = Block(
        attn="self_attention",
        **norms,
        parallel=parallel,
        **_fused(cut, "self_attention.query_key_value", "self_attention.dense"),
        **_H_TO_4H,
        mutated=frozenset({"mlp_out"} if parallel else ()),  # mlp_output += attention_output
        no_pattern="Hugging Face's eager Falcon adds its position bias twice" if config.alibi else "",
    )
    return Architecture(
        "falcon",
        **dict(_GPT_PATHS, embed="word_embeddings"),
        blocks=(block,),
        heads=Heads(config.num_attention_heads, n_kv, d_head, d_head),
    )


# Llama and its kin ---------------------------------------------------------------------------------------------------


def _gemma(model_type: str, *, post_norms: bool) -> Row:
    """Norms multiply by `1 + weight`, the embedding by the root of d_model; from Gemma 2 on there are four norms a block.
    The soft cap is in the config (None in most of Gemma 3)."""
    four: dict[str, Any] = {
        "ln1_post": "post_attention_layernorm",
        "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
    }

    def row(config: Any) -> Architecture:
        if getattr(config, "use_bidirectional_attention", False):
            raise UnknownArchitecture(f"This {model_type} looks ahead (use_bidirectional_attention): it is not causal.")
        return replace(
            _like_llama(model_type, **(four if post_norms else {})),
            embed_scale=config.hidden_size**0.5,
            norm_gain_offset=1.0,
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    return row


def olmo(config: Any) -> Architecture:
    """Norms without any weight. With `clip_qkv` the projections are clamped in place after the site."""
    clipped = frozenset({"q", "k", "v"} if config.clip_qkv is not None else ())
    return _like_llama("olmo", mutated=clipped)


def stablelm(config: Any) -> Architecture:
    """With parallel blocks there is one norm."""
    if not config.use_parallel_residual:
        return _like_llama("stablelm")
    return _like_llama("stablelm", ln2="input_layernorm", parallel=True)


def granite(config: Any) -> Architecture:
    """Multipliers on what is added and on the logits (and, outside any site, on the embedding and the scores)."""
    return replace(
        _like_llama("granite", residual_multiplier=config.residual_multiplier), logit_scale=1 / config.logits_scaling
    )


def _cohere(model_type: str) -> Row:
    """Parallel blocks with one norm that has no bias; logits are scaled."""
    return lambda config: replace(_like_llama(model_type, ln2="input_layernorm", parallel=True), logit_scale=config.logit_scale)


PHI = Architecture(
    "phi",
    ln_final="final_layernorm",
    blocks=(
        Block(
            ln2="input_layernorm",
            parallel=True,
            **_attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
            **_plain("mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
        ),
    ),
)

_GLM4_NORMS: dict[str, Any] = {"ln1_post": "post_self_attn_layernorm", "ln2_post": "post_mlp_layernorm"}


def lfm2(config: Any) -> Architecture:
    """Some layers mix positions by a short convolution; the norm called `embedding_norm` is the final one."""
    mlp: dict[str, Any] = {
        "mlp": "feed_forward", "gate": Part("feed_forward.w1"), "up": Part("feed_forward.w3"), "down": Part("feed_forward.w2"),
        "ln1": "operator_norm", "ln2": "ffn_norm", "act_function": "silu",
    }  # fmt: skip
    attention = Block(**dict(mlp, o=Part("self_attn.out_proj")))
    convolution = Block(**mlp, attn=None, q=None, k=None, v=None, o=None)
    blocks = tuple(attention if kind == "full_attention" else convolution for kind in config.layer_types)
    return Architecture("lfm2", ln_final="embedding_norm", blocks=blocks)


# Mixtures of experts -------------------------------------------------------------------------------------------------


def _mixture(experts: Experts, **changes: Any) -> Block:
    """Llama's block, with experts for an MLP."""
    changes = {"up": None, "gate": None, "down": None, "flattened": frozenset({"router_logits"})} | changes
    return replace(LLAMA, **changes, experts=experts)


def _some_dense(model_type: str, experts: Experts, is_dense: Callable[[Any, int], bool]) -> Row:
    """Llama's blocks, of which some have experts."""

    def row(config: Any) -> Architecture:
        layers = range(config.num_hidden_layers)
        return Architecture(
            model_type, blocks=tuple(LLAMA if is_dense(config, layer) else _mixture(experts) for layer in layers)
        )

    return row


def _qwen_is_dense(config: Any, layer: int) -> bool:
    return layer in config.mlp_only_layers or config.num_experts == 0 or (layer + 1) % config.decoder_sparse_step != 0


def granitemoe(config: Any) -> Architecture:
    """Granite's multipliers, and experts under another name."""
    experts = Experts(path="block_sparse_moe.experts", router="block_sparse_moe.router")
    block = _mixture(experts, mlp="block_sparse_moe", residual_multiplier=config.residual_multiplier)
    return Architecture("granitemoe", blocks=(block,), logit_scale=1 / config.logits_scaling)


def deepseek_v3(config: Any) -> Architecture:
    """Multi-head latent attention: queries and values come out of compressed streams, keys partly shared by all heads."""
    nope, n_heads = config.qk_nope_head_dim, config.num_attention_heads
    low_rank = config.q_lora_rank is not None
    attention: dict[str, Any] = {
        "q": Part("self_attn.q_b_proj" if low_rank else "self_attn.q_proj", ByHead(), reads_stream=not low_rank),
        "k": None,
        "v": Part("self_attn.kv_b_proj", OfHead(nope), reads_stream=False),
    }
    dense, sparse = (
        replace(LLAMA, **attention),
        _mixture(Experts(shared="mlp.shared_experts", chosen_by_logits=False), **attention),
    )
    return Architecture(
        "deepseek_v3",
        blocks=tuple(dense if i < config.first_k_dense_replace else sparse for i in range(config.num_hidden_layers)),
        heads=Heads(n_heads, n_heads, nope + config.qk_rope_head_dim, config.v_head_dim),
    )


def _clamped_swish(experts: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """GPT-OSS: gate and up are clamped, and 1 is added to up."""
    limit, alpha = float(experts.limit), float(experts.alpha)  # pyright: ignore[reportArgumentType]

    def combine(gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)

    return combine


GPT_OSS = Architecture(
    "gpt_oss",
    blocks=(_mixture(Experts(router="mlp.router", out_in=False, interleaved=True, combine=_clamped_swish), sinks=True),),
)


def _all_experts(experts: nn.Module, x: Tensor, expert: int) -> Tensor:
    """Llama 4's experts all run on all rows, which its router has scaled before."""
    n = experts.get_parameter("down_proj").shape[0]
    return experts(x.repeat(n, 1)).unflatten(0, (n, -1))[expert]


def llama4_text(config: Any) -> Architecture:
    """Experts in some layers, beside one that all tokens go through; their inputs, not their outputs, are weighted."""
    prefix = "feed_forward"
    dense = {name: Part(f"{prefix}.{name}_proj") for name in ("up", "gate", "down")}
    experts = Experts(
        path=f"{prefix}.experts", router=f"{prefix}.router", router_item=1, out_in=False, call=_all_experts,
        shared=f"{prefix}.shared_expert", chosen_by_logits=False,
    )  # fmt: skip
    sparse = _mixture(experts, mlp=prefix, flattened=frozenset({"router_logits", "mlp_out"}))
    plain = replace(LLAMA, mlp=prefix, act=f"{prefix}.activation_fn", **dense)
    layers = range(config.num_hidden_layers)
    return Architecture("llama4_text", blocks=tuple(sparse if i in config.moe_layers else plain for i in layers))


ROWS: dict[str, Row] = {
    "bloom": bloom,
    "cohere": _cohere("cohere"),
    "cohere2": _cohere("cohere2"),
    "deepseek_v3": deepseek_v3,
    "exaone4": _like_llama("exaone4", **_POST_ONLY),
    "falcon": falcon,
    "gemma": _gemma("gemma", post_norms=False),
    "gemma2": _gemma("gemma2", post_norms=True),
    "gemma3_text": _gemma("gemma3_text", post_norms=True),
    "glm": _like_llama("glm", **_GATE_UP),
    "glm4": _like_llama("glm4", **_GATE_UP, **_GLM4_NORMS),
    "gpt2": GPT2,
    "gpt_neo": GPT_NEO,
    "gpt_neox": gpt_neox,
    "gpt_oss": GPT_OSS,
    "gptj": GPTJ,
    "granite": granite,
    "granitemoe": granitemoe,
    "helium": _like_llama("helium"),
    "hunyuan_v1_dense": _like_llama("hunyuan_v1_dense"),
    "lfm2": lfm2,
    "llama": _like_llama("llama"),
    "llama4_text": llama4_text,
    "ministral": _like_llama("ministral"),
    "ministral3": _like_llama("ministral3"),
    "mistral": _like_llama("mistral"),
    "mixtral": Architecture("mixtral", blocks=(_mixture(Experts()),)),
    "nemotron": replace(_like_llama("nemotron", **_plain("mlp.up_proj", "mlp.act_fn", "mlp.down_proj")), norm_gain_offset=1.0),
    "olmo": olmo,
    "olmo2": _like_llama("olmo2", **_POST_ONLY),
    "olmo3": _like_llama("olmo3", **_POST_ONLY),
    "opt": opt,
    "phi": PHI,
    "phi3": _like_llama("phi3", **_GATE_UP, **_fused(Stacked, "self_attn.qkv_proj", "self_attn.o_proj")),
    "qwen2": _like_llama("qwen2"),
    "qwen2_moe": _some_dense("qwen2_moe", Experts(shared="mlp.shared_expert"), _qwen_is_dense),
    "qwen3": _like_llama("qwen3"),
    "qwen3_moe": _some_dense("qwen3_moe", Experts(), _qwen_is_dense),
    "seed_oss": _like_llama("seed_oss"),
    "smollm3": _like_llama("smollm3"),
    "stablelm": stablelm,
    "starcoder2": _like_llama("starcoder2", **_plain("mlp.c_fc", "mlp.act", "mlp.c_proj")),
}
"""Every family with a row, by `config.model_type`."""
