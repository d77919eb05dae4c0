"""Rows for families that have none, guessed from the names and shapes in the module tree.

A guess is worth nothing by itself: `workbench.recognition` takes one only if the whole self-check passes with it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

from torch import nn

from workbench.architectures.cuts import ByHead, Cut, Grouped, Half, Stacked
from workbench.architectures.row import Architecture, Block, Experts, Part
from workbench.errors import UnknownArchitecture

_QUERY = ("q_proj", "query", "q", "wq", "to_q", "q_lin")
_KEY = ("k_proj", "key", "k", "wk", "to_k", "k_lin")
_VALUE = ("v_proj", "value", "v", "wv", "to_v", "v_lin")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "W_pack", "att_proj")
_ATTENTION_OUT = ("o_proj", "out_proj", "dense", "c_proj", "wo", "o", "out_lin", "proj")
_GATE_UP = ("gate_up_proj",)
_GATE = ("gate_proj", "w1", "wg")
_UP = ("up_proj", "w3", "fc1", "c_fc", "fc_in", "dense_h_to_4h", "linear_1", "w1")
_DOWN = ("down_proj", "w2", "fc2", "c_proj", "fc_out", "dense_4h_to_h", "linear_2")
_ACTIVATION = ("act_fn", "act", "activation_fn", "activation", "gelu_impl")
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")


def trunk(hf: Any, config: Any) -> Architecture:
    """Embedding, blocks, final norm and head, and the multipliers that configs name; the blocks are still unknown.

    Raises:
        UnknownArchitecture: if the tree holds no such things.
    """
    names = {module: name for name, module in hf.named_modules()}
    embed, head = names.get(hf.get_input_embeddings()), names.get(hf.get_output_embeddings())
    stacks = [name for name, module in hf.named_modules() if _is_stack(module, config.num_hidden_layers)]
    if not stacks or embed is None or head is None:
        sought = (("no list of blocks", stacks), ("no embedding", embed), ("no head", head))
        lacking = [what for what, found in sought if not found]
        raise UnknownArchitecture(
            f"{type(hf).__name__} has no row in workbench/architectures/families.py, and its module tree holds "
            f"{' and '.join(lacking)} that can be told. Load the causal language model itself, with its head, or write a row."
        )
    layers = max(stacks, key=lambda name: _common(name, embed))
    backbone = layers.rpartition(".")[0]
    if not embed.startswith(f"{backbone}."):
        backbone = ""
    norms = [name for name, module in hf.get_submodule(layers.rpartition(".")[0]).named_children() if _is_norm(name, module)]
    prefix = f"{backbone}." if backbone else ""
    above = layers.removeprefix(prefix).rpartition(".")[0]
    return Architecture(
        config.model_type,
        backbone=backbone,
        embed=embed.removeprefix(prefix),
        layers=layers.removeprefix(prefix),
        ln_final=f"{above}.{norms[-1] if norms else 'norm'}".strip("."),
        head=head,
        logit_scale=getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def rows(hf: Any, config: Any, base: Architecture) -> Iterator[Architecture]:
    """Every arrangement of norms that blocks are known to have, over the parts that the names tell.

    Raises:
        UnknownArchitecture: if a block's attention or MLP cannot be told.
    """
    stack = list(hf.get_submodule(base.path("layers")).children())
    parts = [_parts(block, config) for block in stack]
    norms = [name for name, module in stack[0].named_children() if _is_norm(name, module)]
    for arrangement in _arrangements(norms):
        yield replace(base, blocks=_merged([Block(**(one | arrangement)) for one in parts]))


def offsets(row: Architecture, config: Any) -> Iterator[Architecture]:
    """The same row as it is, with Gemma's norms, and with its embedding too."""
    for offset in (0.0, 1.0):
        for scale in (1.0, config.hidden_size**0.5):
            yield replace(row, norm_gain_offset=offset, embed_scale=scale)


def fused_cuts(row: Architecture) -> Iterator[Architecture]:
    """The same row with each way that queries, keys and values are known to lie in one matrix."""
    if not any(block.q is not None and isinstance(block.q.cut, Stacked) for block in row.blocks):
        yield row
        return
    for cut in (Stacked, Grouped):
        yield replace(row, blocks=tuple(_with_cut(block, cut) for block in row.blocks))


def _with_cut(block: Block, cut: Callable[[Any], Cut]) -> Block:
    if block.q is None or not isinstance(block.q.cut, Stacked):
        return block
    return replace(block, **{name: Part(block.q.path, cut(name)) for name in ("q", "k", "v")})


def _arrangements(norms: list[str]) -> Iterator[dict[str, Any]]:
    """Which norm is which, for as many as a block has."""
    if len(norms) == 1:
        yield {"ln1": norms[0], "ln2": norms[0], "parallel": True}
    for a, b in permutations(norms) if len(norms) == 2 else ():
        yield {"ln1": a, "ln2": b}
        yield {"ln1": a, "ln2": b, "parallel": True}
        yield {"ln1": None, "ln1_post": a, "ln2": None, "ln2_post": b}
    for a, b, c in permutations(norms[1:]) if len(norms) == 4 else ():
        yield {"ln1": norms[0], "ln1_post": a, "ln2": b, "ln2_post": c}


def _parts(block: nn.Module, config: Any) -> dict[str, Any]:
    """Attention and MLP of one block."""
    linear = [name for name, module in block.named_modules() if _is_linear(module)]
    found = _attention(block, linear) | _mlp(block, linear, config)
    multiplier = getattr(config, "residual_multiplier", None)
    return found if multiplier is None else found | {"residual_multiplier": multiplier}


def _attention(block: nn.Module, linear: list[str]) -> dict[str, Any]:
    fused, query = _named(linear, _FUSED), _named(linear, _QUERY)
    if fused is None and query is None:
        if "conv" in dict(block.named_children()):
            return {"attn": None, "q": None, "k": None, "v": None, "o": None}
        raise _untold(block, "queries", linear)
    attn = (fused or query or "").split(".")[0]
    inside = [name for name in linear if name.startswith(f"{attn}.") and name not in (fused, query)]
    out, key, value = _named(inside, _ATTENTION_OUT), _named(inside, _KEY), _named(inside, _VALUE)
    if out is None or (fused is None and (key is None or value is None)):
        raise _untold(block, "attention's projections", linear)
    parts: dict[str, Any] = {"attn": attn, "o": Part(out)}
    if fused is not None:
        return parts | {"q": Part(fused, Stacked("q")), "k": Part(fused, Stacked("k")), "v": Part(fused, Stacked("v"))}
    return parts | {"q": Part(query or "", ByHead()), "k": Part(key or "", ByHead()), "v": Part(value or "", ByHead())}


def _mlp(block: nn.Module, linear: list[str], config: Any) -> dict[str, Any]:
    stacked = next((name for name, module in block.named_modules() if _is_experts(module)), None)
    if stacked is not None:
        return _mixture(block, stacked)
    attention = (_named(linear, _FUSED) or _named(linear, _QUERY) or "conv").split(".")[0]
    inside = [name for name in linear if not name.startswith(f"{attention}.")]
    fused, gate, up, down = (_named(inside, names) for names in (_GATE_UP, _GATE, _UP, _DOWN))
    if down is None or (fused is None and up is None):
        raise _untold(block, "the MLP's projections", linear)
    mlp = down.rpartition(".")[0] or down
    parts: dict[str, Any] = {"mlp": mlp, "down": Part(down)} | _activation(block, mlp, config)
    if fused is not None:
        return parts | {"gate": Part(fused, Half(0)), "up": Part(fused, Half(1))}
    return parts | {"gate": None if gate is None or gate == up else Part(gate), "up": Part(up or "")}


def _mixture(block: nn.Module, stacked: str) -> dict[str, Any]:
    mlp, experts = stacked.rpartition(".")[0], block.get_submodule(stacked)
    if not mlp:
        raise _untold(block, "the module around the experts", [stacked])
    children = dict(block.get_submodule(mlp).named_children())
    router = next((name for name in ("gate", "router") if name in children), None)
    shared = next((name for name in _SHARED if name in children), None)
    if router is None:
        raise _untold(block, "the router", list(children))
    down = experts.get_parameter("down_proj")
    weight = getattr(children[router], "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise _untold(block, "the router's weight", list(children))
    return {
        "mlp": mlp,
        "up": None,
        "gate": None,
        "down": None,
        "flattened": frozenset({"router_logits"}),
        "experts": Experts(
            path=stacked,
            router=f"{mlp}.{router}",
            out_in=down.shape[1] == weight.shape[1],
            shared=None if shared is None else f"{mlp}.{shared}",
        ),
    }


def _activation(block: nn.Module, mlp: str, config: Any) -> dict[str, Any]:
    for name, _ in block.get_submodule(mlp).named_children():
        if name in _ACTIVATION:
            return {"act": f"{mlp}.{name}"}
    named = (getattr(config, name, None) for name in ("hidden_act", "hidden_activation", "activation_function"))
    return {"act_function": next(filter(None, named), "silu")}


def _merged(blocks: list[Block]) -> tuple[Block, ...]:
    """One block for all layers, where they are alike."""
    return (blocks[0],) if all(block == blocks[0] for block in blocks) else tuple(blocks)


def _untold(block: nn.Module, what: str, names: list[str]) -> UnknownArchitecture:
    return UnknownArchitecture(
        f"{type(block).__name__} has no row in workbench/architectures/families.py, and among its modules ({', '.join(names)}) "
        f"{what} cannot be told. Write a row (see `workbench families` for those there are)."
    )


def _named(paths: list[str], names: tuple[str, ...]) -> str | None:
    """The first path whose last part is one of the names, in the order of the names."""
    return next((path for name in names for path in paths if path.rpartition(".")[2] == name), None)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _is_experts(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Parameter) for name in ("gate_up_proj", "down_proj"))


def _is_norm(name: str, module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() or "norm" in name.lower()


def _is_stack(module: nn.Module, n_layers: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == n_layers and len(list(module[0].children())) > 1


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
