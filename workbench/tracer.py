"""Reading and changing a model's inner tensors while it runs. The only file that registers hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from workbench.model import Batch, LanguageModel
from workbench.sites import Site, parse_sites

Edit = Callable[[Tensor], Tensor]
"""Given the tensor at a site, the tensor to put there."""


class Activations(Mapping[str, Tensor]):
    """What was captured: `acts["resid_post.3"]` is a tensor whose first axes are batch and pos."""

    def __init__(self, values: dict[Site, Tensor], batch: Batch, n_layers: int):
        self._values = {str(site): value for site, value in values.items()}
        self._n_layers = n_layers
        self.tokens, self.mask = batch

    def __getitem__(self, site: str) -> Tensor:
        """The tensor at a site, in any spelling that `capture` takes."""
        if site in self._values:
            return self._values[site]
        name = str(Site.parse(site, self._n_layers))
        if name not in self._values:
            raise KeyError(f"{site} was not captured; captured: {', '.join(self._values)}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        lines = [f"{name:<14} {list(value.shape)} {value.dtype}" for name, value in self._values.items()]
        return "\n".join(["Activations", *(f"  {line}" for line in lines)])


class _Complete(Exception):
    """Raised from the hook that captured the last site, to end the forward pass there."""


def capture(
    model: LanguageModel,
    inputs: str | Sequence[str] | Batch,
    sites: str | Sequence[str],
) -> Activations:
    """Run the model and keep the tensors at the given sites; the pass ends after the last of them.

    Args:
        inputs: Texts, or a batch that was tokenised already.
        sites: One or several, as `parse_sites` reads them: `resid_post.3`, `mlp_post.4:8`, `resid_pre`, TransformerLens names.
    Returns:
        Tensors `[batch, pos, …]`, detached, on the model's device; `q k v z` are `[batch, pos, heads, d_head]`.
    Raises:
        UnknownSite, LayerOutOfRange: if the model does not have a site.
    """
    wanted = parse_sites([sites] if isinstance(sites, str) else sites, model.n_layers)
    batch = inputs if isinstance(inputs, Batch) else model.tokenize(inputs)
    kept: dict[Site, Tensor] = {}

    def keep(site: Site) -> Edit:
        def hook(value: Tensor) -> Tensor:
            kept[site] = value
            if len(kept) == len(wanted):
                raise _Complete
            return value

        return hook

    with torch.no_grad(), edited(model, {site: keep(site) for site in wanted}), suppress(_Complete):
        model.forward(batch)
    return Activations({site: kept[site] for site in wanted}, batch, model.n_layers)


@contextmanager
def edited(model: LanguageModel, edits: Mapping[Site, Edit]) -> Iterator[None]:
    """While open, every forward pass hands the tensor at each site to its edit and goes on with what that returns.

    An edit that returns the tensor it was given changes nothing, bitwise. `resid_mid` is read, but not written, where it
    only feeds the MLP's norm: the stream itself passes by.
    """
    handles = []
    try:
        for site, edit in edits.items():
            path, end, view = model.tap(site)
            module = model.module(path)
            if end == "output":
                handles.append(module.register_forward_hook(_output_hook(edit, view)))
            else:
                handles.append(module.register_forward_pre_hook(_input_hook(edit, view), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(edit: Edit, view: Edit | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        # Attention modules, and some blocks, give a tuple whose first item is the tensor.
        value = output[0] if isinstance(output, tuple) else output
        new = _applied(value, edit, view)
        if new is value:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _input_hook(edit: Edit, view: Edit | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Hidden states are positional almost everywhere; attention modules take them by name.
        value = args[0] if args else kwargs["hidden_states"]
        new = _applied(value, edit, view)
        if new is value:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _applied(value: Tensor, edit: Edit, view: Edit | None) -> Tensor:
    if view is None:
        return edit(value)
    seen = view(value)
    new = edit(seen)
    if new is seen:
        return value
    whole = value.clone()
    view(whole).copy_(new)
    return whole
