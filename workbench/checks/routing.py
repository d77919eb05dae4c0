"""Identities of a mixture of experts: the router's logits choose the experts, and their sum is what the MLP adds."""

from collections.abc import Iterator

from torch import Tensor

from workbench.capturing import keeping
from workbench.checks.check import Check, check, error, real
from workbench.model import Batch, LanguageModel
from workbench.sites import Site
from workbench.tracer import Call, calls_of


def routing(model: LanguageModel, batch: Batch) -> Iterator[Check]:
    """What the experts are called with and give in one forward pass."""
    mixtures = {layer: experts for layer in range(model.n_layers) if (experts := model.row.block(layer).experts) is not None}
    if not mixtures:
        return
    sites = [Site(name, layer) for layer in mixtures for name in ("router_logits", "mlp_out")]
    called = {layer: model.block(layer).get_submodule(experts.path) for layer, experts in mixtures.items()}
    shared = {
        layer: model.block(layer).get_submodule(experts.shared)
        for layer, experts in mixtures.items()
        if experts.shared is not None
    }
    with calls_of(called) as calls, calls_of(shared) as shared_calls, keeping(model, sites, to_the_end=True) as kept:
        model.forward(batch)
    for layer, experts in mixtures.items():
        logits, added = (real(kept[Site(name, layer)], batch) for name in ("router_logits", "mlp_out"))
        added = added / model.row.block(layer).residual_multiplier
        yield check(
            "router_logits have an entry an expert", layer, lambda logits=logits: float(logits.shape[-1] != model.n_experts)
        )
        if experts.chosen_by_logits:
            yield check(
                "the largest router_logits choose the experts",
                layer,
                lambda layer=layer, logits=logits: _other_choices(_rows(calls[layer].args[1], batch), logits),
            )
        yield check(
            "routed and shared experts make mlp_out",
            layer,
            lambda layer=layer, added=added: _unexplained(
                added, _routed(calls[layer], model.n_experts, batch), shared_calls.get(layer), batch
            ),
        )


def _rows(x: Tensor, batch: Batch) -> Tensor:
    """The real tokens' rows of a tensor whose first axis, or axes, are batch and pos."""
    return real(x.reshape(*batch.mask.shape, -1), batch)


def _other_choices(chosen: Tensor, logits: Tensor) -> float:
    """Share of tokens with a chosen expert that is not among the largest logits; ties of half precision are no fault."""
    if chosen.is_floating_point() or len(chosen) != len(logits) or not 0 <= int(chosen.max()) < logits.shape[1]:
        return float("inf")  # no choice of these experts at all; to gather by it would end a CUDA context
    worst = logits.gather(1, chosen).amin(1)
    kth = logits.topk(chosen.shape[1], dim=1).values[:, -1]
    return float((worst < kth).double().mean())


def _routed(call: Call, n_experts: int, batch: Batch) -> Tensor:
    """The weighted sum over the experts: what their module gives, or, where it gives all of them, their sum."""
    out = call.output
    if out.numel() != batch.mask.numel() * out.shape[-1]:
        out = out.reshape(n_experts, -1, out.shape[-1]).sum(0)
    return _rows(out, batch)


def _unexplained(added: Tensor, routed: Tensor, shared: Call | None, batch: Batch) -> float:
    """How much of what is added is neither the routed experts nor, up to a gate of its own, the shared one."""
    if shared is None:
        return error(routed, added)
    own = _rows(shared.output, batch).double()
    rest = added.double() - routed.double()
    gate = (rest * own).sum(1, keepdim=True) / own.pow(2).sum(1, keepdim=True)
    return error(routed.double() + gate.clamp(0, 1) * own, added)
