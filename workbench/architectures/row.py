"""What a row is: where a family keeps its parts. Plain data, with llama's as defaults, from which most differ in a line."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from workbench.architectures.cuts import WHOLE, ByHead, Cut, Heads


@dataclass(frozen=True)
class Part:
    """One weight matrix: the linear module it lies in, and which of that module's outputs are its own."""

    path: str
    """Path inside the block."""
    cut: Cut = WHOLE
    reads_stream: bool = True
    """Whether the module's input is the normed stream itself. In multi-head latent attention it is a compressed one, so
    the module's weight is no map from the stream."""


def multiplied(experts: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """`act(gate) · up`, with the activation that the experts' module holds."""
    return lambda gate, up: experts.get_submodule("act_fn")(gate) * up


def called_for_one(experts: nn.Module, x: Tensor, expert: int) -> Tensor:
    """What one expert gives, had it alone been chosen with weight 1: the call of Hugging Face's own experts module."""
    rows = x.shape[0]
    return experts(x, x.new_full((rows, 1), expert).long(), x.new_ones(rows, 1))


@dataclass(frozen=True)
class Experts:
    """Routed experts, their matrices stacked in the parameters `gate_up_proj` and `down_proj` of one module."""

    path: str = "mlp.experts"
    router: str = "mlp.gate"
    """Module that scores the experts; its weight is `[n_experts, d_model]`."""
    router_item: int = 0
    """Which item of the router's output holds the logits."""
    out_in: bool = True
    """Whether a matrix is stored `[d_out, d_in]`, as linear modules store theirs."""
    interleaved: bool = False
    """Whether the gate's and the up projection's outputs alternate; else the gate's come first."""
    combine: Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]] = multiplied
    """From the experts' module to the function of gate and up outputs that gives the neurons."""
    call: Callable[[nn.Module, Tensor, int], Tensor] = called_for_one
    """What one expert gives for rows `x`, asked of the model's own module: for the self-check."""
    chosen_by_logits: bool = True
    """Whether a token goes through the experts of its largest logits. DeepSeek corrects them first; in Llama 4 every token
    goes through all, with its inputs weighted."""
    shared: str | None = None
    """An expert that every token goes through, with `gate_proj up_proj down_proj` of its own."""


@dataclass(frozen=True)
class Block:
    """Where one block keeps its parts; paths inside the block. A post-norm acts on what attention or MLP give, before it is
    added to the stream."""

    attn: str | None = "self_attn"
    """Module whose output attention adds (before a post-norm and the multiplier); None: this block has no attention."""
    mlp: str = "mlp"
    """Module whose output the MLP adds."""
    ln1: str | None = "input_layernorm"
    ln1_post: str | None = None
    ln2: str | None = "post_attention_layernorm"
    """The norm that feeds the MLP, whatever it is called."""
    ln2_post: str | None = None
    parallel: bool = False
    """Attention and MLP read the same stream and are added together: there is no stream between them."""
    q: Part | None = Part("self_attn.q_proj", ByHead())
    k: Part | None = Part("self_attn.k_proj", ByHead())
    v: Part | None = Part("self_attn.v_proj", ByHead())
    o: Part | None = Part("self_attn.o_proj")
    up: Part | None = Part("mlp.up_proj")
    """None, as `down`, in a mixture of experts."""
    gate: Part | None = Part("mlp.gate_proj")
    down: Part | None = Part("mlp.down_proj")
    act: str = "mlp.act_fn"
    """The nonlinearity's module."""
    act_function: str | None = None
    """Its name among transformers' activations, where the family calls it without a module."""
    experts: Experts | None = None
    residual_multiplier: float = 1.0
    """What attention and MLP give is multiplied by this when it is added (Granite)."""
    flattened: frozenset[str] = frozenset()
    """Sites whose tensors come as `[batch·pos, …]`."""
    sinks: bool = False
    """Whether each row of scores has one column more, which takes attention to no token (GPT-OSS)."""
    no_pattern: str = ""
    """Why nothing inside the attention function can be seen, where it cannot."""
    mutated: frozenset[str] = frozenset()
    """Sites whose tensors the block changes in place later: they are copied when kept."""

    @property
    def is_gated(self) -> bool:
        return self.gate is not None

    def parts(self) -> list[Part]:
        """Every matrix of the block that is not an expert's."""
        return [part for part in (self.q, self.k, self.v, self.o, self.up, self.gate, self.down) if part is not None]


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its parts."""

    model_type: str
    backbone: str = "model"
    """Path of the decoder without its head. In a vision-language wrapper it lies deeper; see `loading`."""
    embed: str = "embed_tokens"
    layers: str = "layers"
    ln_final: str = "norm"
    head: str = "lm_head"
    """Path from the causal language model; the three above are paths from the backbone."""
    blocks: tuple[Block, ...] = (Block(),)
    """One for all layers, or one a layer."""
    heads: Heads | None = None
    """Where the config's usual fields do not say it."""
    embed_scale: float = 1.0
    """What the embedding module multiplies its rows by (Gemma)."""
    norm_gain_offset: float = 0.0
    """1 where a norm multiplies by `1 + weight` (Gemma, Nemotron)."""
    logit_scale: float = 1.0
    """Logits are multiplied by this before the soft cap."""
    softcap: float | None = None
    """Final logits are `c · tanh(logits / c)`."""

    def block(self, layer: int) -> Block:
        """The parts of the block at a layer (from 0)."""
        return self.blocks[layer % len(self.blocks)]

    def path(self, name: str, layer: int | None = None) -> str:
        """From the causal language model: `embed`, `layers`, `ln_final`, or what a path inside a block is at a layer."""
        inner = getattr(self, name) if layer is None else f"{self.layers}.{layer}.{name}"
        return f"{self.backbone}.{inner}".strip(".")


def as_source(row: Any) -> str:
    """The Python expression that makes a row, without the fields that have their default."""
    if is_dataclass(row) and not isinstance(row, (type, Cut)):
        given = []
        for field in fields(row):
            value = getattr(row, field.name)
            if field.default is MISSING or value != field.default:
                given.append(f"{field.name}={as_source(value)}")
        return f"{type(row).__name__}({', '.join(given)})"
    if isinstance(row, tuple) and not isinstance(row, Heads):
        return f"({', '.join(map(as_source, row))},)"
    return row.__qualname__ if callable(row) and hasattr(row, "__qualname__") else repr(row)
