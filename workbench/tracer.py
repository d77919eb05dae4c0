"""Reading and changing a model's inner tensors while it runs. The only file that registers hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workbench.architectures.taps import Tap
from workbench.errors import ReadOnlySite
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
    with keeping(model, wanted) as kept:
        model.forward(batch)
    return Activations({site: kept[site] for site in wanted}, batch, model.n_layers)


@contextmanager
def keeping(model: LanguageModel, sites: Sequence[Site], *, to_the_end: bool = False) -> Iterator[dict[Site, Tensor]]:
    """While open, forward passes put the tensors at the sites into the dict, and end after the last, unless `to_the_end`.

    Raises:
        UnknownSite: if the model does not have a site.
    """
    kept: dict[Site, Tensor] = {}
    last = None if to_the_end else len(sites)
    with torch.no_grad(), edited(model, {site: _Keeper(site, kept, last) for site in sites}), suppress(_Complete):
        yield kept


class _Keeper(NamedTuple):
    """An edit that changes nothing, but keeps what it sees."""

    site: Site
    kept: dict[Site, Tensor]
    last: int | None
    """How many are to be kept before the pass may end."""

    def __call__(self, value: Tensor) -> Tensor:
        self.kept[self.site] = value
        if len(self.kept) == self.last:
            raise _Complete
        return value


@contextmanager
def edited(model: LanguageModel, edits: Mapping[Site, Edit]) -> Iterator[None]:
    """While open, every forward pass hands the tensor at each site to its edit and goes on with what that returns.

    An edit that returns the tensor it was given changes nothing, bitwise.

    Raises:
        UnknownSite: if the model does not have a site.
        ReadOnlySite: from the forward pass, if an edit changes a site past which the model's own tensor goes
            (`resid_mid`, `router_logits`).
    """
    handles: list[Any] = []
    axes: dict[str, tuple[int, int]] = {}
    try:
        for site, edit in edits.items():
            tap = model.tap(site)
            module = model.module(tap.path)
            if tap.block is not None and tap.block not in axes:
                axes[tap.block] = (0, 0)
                seen = _Axes(axes, tap.block)
                handles.append(model.module(tap.block).register_forward_pre_hook(seen.on_input, with_kwargs=True))
            applied = _Applied(site, edit, tap, axes)
            if tap.end == "output":
                handles.append(module.register_forward_hook(applied.on_output))
            else:
                handles.append(module.register_forward_pre_hook(applied.on_input, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class BlockCall(NamedTuple):
    """What a block was called with in a forward pass: it can be run again alone."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def block_calls(model: LanguageModel) -> Iterator[list[BlockCall]]:
    """While open, the calls of every block in a forward pass are put into the list, in order."""
    calls: list[BlockCall] = []
    handles = [
        model.block(layer).register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(BlockCall(args, kwargs)), with_kwargs=True
        )
        for layer in range(model.n_layers)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class _Applied(NamedTuple):
    """An edit at its site, as hooks on a module."""

    site: Site
    edit: Edit
    tap: Tap
    axes: dict[str, tuple[int, int]]

    def to(self, value: Tensor) -> Tensor:
        """The tensor to go on with, of the module's own."""
        axes = None if self.tap.block is None else self.axes[self.tap.block]
        seen = self.tap.read(value, axes)
        new = self.edit(seen)
        if new is seen:
            return value
        if self.tap.passed_by is not None:
            raise ReadOnlySite(f"Site '{self.site}' can be read, but not written: {self.tap.passed_by}.")
        return self.tap.write(value, new, axes)

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            new = self.to(output)
            return None if new is output else new
        # Attention modules, routers, and some blocks and MLPs, give a tuple.
        item = self.tap.item
        new = self.to(output[item])
        return None if new is output[item] else (*output[:item], new, *output[item + 1 :])

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = _hidden_states(args, kwargs)
        new = self.to(value)
        if new is value:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


class _Axes(NamedTuple):
    """Notes batch and pos of what a block is given."""

    axes: dict[str, tuple[int, int]]
    block: str

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch, pos, _ = _hidden_states(args, kwargs).shape
        self.axes[self.block] = (batch, pos)


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Positional almost everywhere; attention modules take them by name."""
    return args[0] if args else kwargs["hidden_states"]
