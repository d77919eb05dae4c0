"""Weights as the modules hold them: linear maps read left to right, effective gains of norms, one expert's matrices."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.architectures.row import Architecture, Experts
from workbench.errors import UnreadableWeight


def linear_weight(module: nn.Module) -> Tensor:
    """A linear module's weight as `[d_in, d_out]`, so that `x @ W` reads like the paper: a view, unless it is offloaded.

    Raises:
        UnreadableWeight: if there is no plain floating-point matrix that is all the module multiplies by.
    """
    weight = parameter(module, "weight")
    assert weight is not None
    return weight if isinstance(module, Conv1D) else weight.T


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """A weight or bias of a module; None if it has none of that name.

    Raises:
        UnreadableWeight: if it is quantised, on no device, or only a part of what the module computes (an adapter's base).
    """
    if hasattr(module, "base_layer"):  # an adapter of the peft library wraps the linear module
        if unmerged := unmerged_adapters(module):
            raise UnreadableWeight(
                f"The adapter {', '.join(unmerged)} is not merged into this weight: alone it is not what the model multiplies "
                "by. Capturing works as it is; to read weights, load model.merge_and_unload()."
            )
        module = module.get_submodule("base_layer")
    found = getattr(module, name, None)
    if found is None and name != "weight":
        return None
    if not isinstance(found, Tensor) or not found.is_floating_point() or type(found.data) is not Tensor:
        raise UnreadableWeight(
            f"{type(module).__name__} holds no plain floating-point {name} (is the model quantised?). "
            "Load it unquantised to read its weights; capturing activations works as it is."
        )
    return _materialised(module, name) if found.is_meta else found


def unmerged_adapters(module: nn.Module) -> list[str]:
    """Adapters of the peft library that a module adds to its base layer's output; none if it wraps no base layer."""
    if not hasattr(module, "base_layer") or getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return []
    return [str(name) for name in getattr(module, "active_adapters", [])]


def _materialised(module: nn.Module, name: str) -> Tensor:
    """A parameter that accelerate keeps elsewhere (`device_map` with CPU or disk offload), read from there."""
    from accelerate.utils import align_module_device

    try:
        with align_module_device(module, torch.device("cpu")):
            return module.get_parameter(name).detach().clone()
    except ValueError:
        raise UnreadableWeight(
            "This weight is on no device ('meta'): it was never loaded. Load the model again, all of it."
        ) from None


def entries(module: nn.Module, name: str, at: Tensor) -> Tensor | None:
    """Some entries of a parameter as if it were flat, on the CPU; of one that stays in a safetensors file these alone are read.
    None if it is nowhere to be read."""
    found = module.get_parameter(name)
    if not found.is_meta:
        return found.detach().flatten()[at.to(found.device)].cpu()
    held = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    place = getattr(getattr(held, "dataset", None), "index", {}).get(f"{getattr(held, 'prefix', '')}{name}", {})
    if "safetensors_file" not in place:
        return None
    from safetensors import safe_open

    with safe_open(place["safetensors_file"], framework="pt") as file:
        matrix = file.get_slice(place.get("weight_name", name))
        places = zip(*(axis.tolist() for axis in torch.unravel_index(at, matrix.get_shape())), strict=True)
        one_by_one = [matrix[tuple(slice(i, i + 1) for i in place)].flatten() for place in places]
    return torch.cat(one_by_one).to(found.dtype)


def d_in(module: nn.Module) -> int:
    """Inputs of a linear module, also where its weight cannot be read."""
    return int(module.nx if isinstance(module, Conv1D) else module.in_features)  # pyright: ignore[reportArgumentType]


def norm_gain(norm: nn.Module, row: Architecture) -> Tensor | None:
    """What a norm multiplies the normalised stream by, `[d_model]`; None if it has no such weight.

    With an offset it is float32, as the norm itself adds it: in bfloat16 `1 + weight` would lose half the weight's bits.
    """
    if getattr(norm, "weight", None) is None:
        return None
    weight = parameter(norm, "weight")
    return weight if weight is None or not row.norm_gain_offset else weight.float() + row.norm_gain_offset


def norm_bias(norm: nn.Module) -> Tensor | None:
    """What a norm adds last, `[d_model]`; None if nothing."""
    return parameter(norm, "bias")


class Expert(NamedTuple):
    """Matrices and biases of one expert, as a gated MLP has them: read left to right, views of the stacked parameters."""

    W_gate: Tensor
    W_in: Tensor
    W_out: Tensor
    b_gate: Tensor | None = None
    b_in: Tensor | None = None
    b_out: Tensor | None = None


def routed_expert(module: nn.Module, experts: Experts, index: int) -> Expert:
    """One of the routed experts.

    Raises:
        UnreadableWeight: as `parameter`.
    """

    def of(name: str) -> Tensor | None:
        stacked = parameter(module, name) if hasattr(module, name) else None
        return None if stacked is None else stacked[index]

    def matrix(name: str) -> Tensor:
        found = of(name)
        assert found is not None
        return found.T if experts.out_in else found

    def halves(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if x is None:
            return None, None
        if experts.interleaved:
            return x[..., ::2], x[..., 1::2]
        first, second = torch.chunk(x, 2, -1)
        return first, second

    W_gate, W_in = halves(matrix("gate_up_proj"))
    b_gate, b_in = halves(of("gate_up_proj_bias"))
    assert W_gate is not None
    assert W_in is not None
    return Expert(W_gate, W_in, matrix("down_proj"), b_gate, b_in, of("down_proj_bias"))


def shared_expert(block: nn.Module, experts: Experts) -> Expert:
    """The expert that every token goes through.

    Raises:
        UnreadableWeight: as `parameter`.
    """
    assert experts.shared is not None
    projections = [block.get_submodule(f"{experts.shared}.{name}_proj") for name in ("gate", "up", "down")]
    return Expert(*map(linear_weight, projections), *(parameter(module, "bias") for module in projections))


def n_experts(block: nn.Module, experts: Experts) -> int:
    """How many routed experts a block has."""
    return int(block.get_submodule(experts.path).get_parameter("down_proj").shape[0])


def linear_modules(block: nn.Module) -> list[str]:
    """Paths of the modules of a block that multiply by one matrix; of those that carry an adapter, the whole."""
    found: list[str] = []
    for path, module in block.named_modules():
        inside = bool(found) and path.startswith(f"{found[-1]}.")  # what an adapter is made of
        if not inside and (isinstance(module, (nn.Linear, Conv1D)) or "base_layer" in module._modules):
            found.append(path)
    return found
