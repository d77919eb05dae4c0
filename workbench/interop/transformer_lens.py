"""TransformerLens: the Hugging Face model inside a TransformerBridge, and captures as an ActivationCache."""

from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from workbench.activations import Activations
from workbench.errors import UnknownModel, UnknownOption, WorkbenchError
from workbench.interop.wrapped import required
from workbench.model import LanguageModel
from workbench.sites import Site


def inside(bridge: Any, *, moved: bool) -> tuple[nn.Module, Any]:
    """Hugging Face's model as it was before the bridge was put around its modules, and the bridge's tokenizer.

    A bridge replaces modules of the model by wrappers, and computes attention and split projections itself. What is given here
    is a second tree of Hugging Face's own modules, which holds the very same parameters: its code is Hugging Face's, its paths
    are the usual ones, and the bridge, its hooks and its wrappers are not touched. So hooks of the bridge do not fire, the
    logits are Hugging Face's, from which a bridge's differ in a few families, and what was changed in copies of the bridge's
    own (its `q`, `k`, `v` of one fused matrix) is not seen.

    Raises:
        UnknownModel: if it holds no Hugging Face model, or its weights were folded or centred.
        UnknownOption: if the weights are to be moved: the bridge has copies of some that would stay behind.
    """
    hf: Any = getattr(bridge, "original_model", None)
    if not hasattr(hf, "config"):
        raise UnknownModel(
            f"A {type(bridge).__name__} of TransformerLens was given, which holds no Hugging Face model. Pass a "
            "TransformerBridge of one (TransformerBridge.boot_transformers), or the model itself."
        )
    if getattr(bridge, "_weights_processed", False):
        raise UnknownModel(
            "The weights of this TransformerBridge were folded or centred (enable_compatibility_mode), and only some of them "
            "in Hugging Face's modules, which compute something else now. Boot the bridge afresh and load it before, or "
            "call enable_compatibility_mode(no_processing=True)."
        )
    if moved:
        raise UnknownOption(
            "dtype= and device= would tear the model from its TransformerBridge, which has copies of some weights. Call "
            "bridge.to(...) and load it then."
        )
    return _without_wrappers(hf, {}), bridge.tokenizer


def _without_wrappers(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module like this one, sharing its parameters and buffers, whose children are none of the bridge's."""
    while (wrapped := module._modules.get("_original_component")) is not None:
        module = wrapped
    if module not in twins:
        twin = twins[module] = object.__new__(type(module))
        twin.__dict__.update({name: _for_twin(name, value, module, twin) for name, value in module.__dict__.items()})
        children = module._modules.items()
        twin.__dict__["_modules"] = {
            name: None if child is None else _without_wrappers(child, twins) for name, child in children
        }
    return twins[module]


def _for_twin(name: str, value: Any, module: nn.Module, twin: nn.Module) -> Any:
    if isinstance(value, dict) and "_hooks" in name:
        return value.copy()  # hooks on the twin are its own
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)  # a forward that was patched: TransformerLens's Falcon blocks
    if isinstance(value, partial) and value.args[:1] == (module,):
        return partial(value.func, twin, *value.args[1:], **value.keywords)  # accelerate's
    return value


def cache_of(acts: Activations) -> Any:
    """See `Activations.to_transformer_lens`."""
    library = required("transformer_lens", "transformer-lens", "to_transformer_lens()")
    tensors: dict[str, Tensor] = {}
    for name, value in acts.tensors.items():
        try:
            theirs = Site.parse(name, acts.model.n_layers).transformer_lens
        except WorkbenchError:  # the path of a module
            continue
        if theirs is not None:
            tensors[theirs] = value
    return library.ActivationCache(tensors, _Standin(acts.model))


class _Standin:
    """What the methods of an ActivationCache ask a model for, as far as a capture can tell."""

    def __init__(self, model: LanguageModel) -> None:
        self.ln_final = model.module(model.row.path("ln_final"))
        self.blocks = [_Block(model, layer) for layer in range(model.n_layers)]
        self.cfg = SimpleNamespace(
            n_layers=model.n_layers, n_heads=model.n_heads, d_model=model.d_model, d_mlp=model.d_mlp, attn_only=False,
            device=model.device, normalization_type="RMS" if "RMS" in type(self.ln_final).__name__ else "LN",
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"A captured cache has no {name!r}: give it a bridge to ask, `cache.model = bridge`.")


class _Block(NamedTuple):
    """A block's weights, read when they are asked for: `block.attn.W_O`, `block.mlp.W_out`."""

    model: LanguageModel
    layer: int

    @property
    def attn(self) -> "_Block":
        return self

    mlp = attn

    @property
    def W_O(self) -> Tensor:
        return self.model.weight("W_O", self.layer)

    @property
    def W_out(self) -> Tensor:
        return self.model.weight("W_out", self.layer)
