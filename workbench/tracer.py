"""Reading and changing a model's inner tensors while it runs. The only file that registers hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workbench.architectures.taps import Tap
from workbench.attention import Watch, eager
from workbench.errors import ReadOnlySite, WorkbenchError
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
        try:
            name = str(Site.parse(site, self._n_layers))
        except WorkbenchError as unknown:
            raise KeyError(str(unknown)) from unknown
        if name not in self._values:
            raise KeyError(f"{site} was not captured; captured: {', '.join(self._values)}")
        return self._values[name]

    def __contains__(self, site: object) -> bool:
        try:
            return str(Site.parse(str(site), self._n_layers)) in self._values
        except WorkbenchError:
            return False

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
    taps = {site: model.tap(site) for site in edits}
    with ExitStack() as hooks:
        if any(tap.end == "inside" for tap in taps.values()):
            hooks.enter_context(eager(model.module(model.row.backbone)))
        axes: dict[str, tuple[int, int]] = {}
        for site, edit in edits.items():
            tap = taps[site]
            if tap.block is not None and tap.block not in axes:
                axes[tap.block] = (0, 0)
                block, seen = model.module(tap.block), _Axes(axes, tap.block)
                hooks.callback(block.register_forward_pre_hook(seen.on_input, with_kwargs=True).remove)
            module, applied = model.module(tap.path), _Applied(site, edit, tap, axes)
            if tap.end == "inside":
                hooks.enter_context(_watched(module, site.name, applied.to))
            elif tap.end == "output":
                hooks.callback(module.register_forward_hook(applied.on_output).remove)
            else:
                hooks.callback(module.register_forward_pre_hook(applied.on_input, with_kwargs=True).remove)
        yield


_WATCHES: dict[nn.Module, Watch] = {}
"""One an attention module, shared by all edits inside it, so that they come in the order in which they were opened."""


@contextmanager
def _watched(module: nn.Module, name: str, edit: Edit) -> Iterator[None]:
    """Hand what is at a site inside an attention module to the edit."""
    with ExitStack() as hooks:
        if module not in _WATCHES:
            watch = _WATCHES[module] = Watch()
            hooks.callback(_WATCHES.pop, module)
            hooks.callback(module.register_forward_pre_hook(watch.start).remove)
            hooks.callback(module.register_forward_hook(watch.stop, always_call=True).remove)
        edits = _WATCHES[module].edits[name]
        edits.append(edit)
        hooks.callback(edits.remove, edit)
        yield


class Call(NamedTuple):
    """What a module was called with, and what it gave: it can be run again alone."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@contextmanager
def calls_of(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Call]]:
    """While open, forward passes put the last call of each module into the dict."""
    calls: dict[int, Call] = {}
    with ExitStack() as hooks:
        for key, module in modules.items():
            hooks.callback(module.register_forward_hook(_Recorder(calls, key).on_output, with_kwargs=True).remove)
        yield calls


class _Recorder(NamedTuple):
    calls: dict[int, Call]
    key: int

    def on_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # A copy: some models go on adding to it in place.
        self.calls[self.key] = Call(args, kwargs, output.clone() if isinstance(output, Tensor) else output)


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
