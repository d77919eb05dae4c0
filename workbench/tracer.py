"""Reading and changing a model's inner tensors while it runs. The only file that registers hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workbench.activations import PAIRS, Activations
from workbench.architectures.cuts import WHOLE
from workbench.architectures.taps import Tap
from workbench.attention import Watch, eager
from workbench.errors import NotFinite, ReadOnlySite, UnknownOption, UnknownSite
from workbench.heap import keep_pages
from workbench.model import Batch, LanguageModel
from workbench.sites import Site, parse_sites

Edit = Callable[[Tensor], Tensor]
"""Given the tensor at a site, the tensor to put there."""

Positions = str | Sequence[int] | Tensor
"""Which tokens: `all`, the `last` real one of each row, indices among a row's real tokens (negative: from its end), or a mask
`[batch, pos]` with equally many tokens in each row."""

Place = Site | str
"""A site, or the path of a module, whose output is taken."""


class _Complete(Exception):
    """Raised from the hook that captured the last site, to end the forward pass there."""


def capture(
    model: LanguageModel,
    inputs: str | Sequence[str] | Batch,
    sites: str | Sequence[str] = (),
    *,
    modules: Sequence[str] = (),
    positions: Positions = "all",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    gradients: bool = False,
    logits: bool = False,
    finite: bool = True,
) -> Activations:
    """Run the model and keep the tensors at the given sites; the pass ends after the last of them.

    Args:
        inputs: Texts, or a batch that was tokenised already.
        sites: One or several, as `parse_sites` reads them: `resid_post.3`, `mlp_post.4:8`, `resid_pre`, TransformerLens names.
        modules: Paths of modules whose outputs are kept as they are (the first item of a tuple); for what no site names.
        positions: Which tokens to keep of every site: see `Positions`. Modules are kept whole.
        dtype, device: Of what is kept; as the model has it, if not given.
        gradients: Keep the graph, so that `acts.gradients(number)` can be asked; the pass then goes on to the logits.
        logits: Also keep the model's logits.
        finite: Look for NaN and infinity in what was kept (attention scores apart, which are masked by them).
    Returns:
        Tensors `[batch, pos, …]` on the model's device, detached unless `gradients`.
    Raises:
        UnknownSite, LayerOutOfRange: if the model does not have a site.
        UnknownOption: if a position is not in a text, or no module has the path.
        NotFinite: if a site holds NaN or infinity; the first in the order of the forward pass is named.
        ReadOnlySite: if a gradient is asked at a site that the stream passes by.
    """
    batch = inputs if isinstance(inputs, Batch) else model.tokenize(inputs)
    wanted: list[Place] = [*parse_sites([sites] if isinstance(sites, str) else sites, model.n_layers), *modules]
    chosen = _columns(batch, positions)
    if not wanted and not logits:
        raise UnknownSite("Nothing was asked for. Name sites, such as 'resid_post.3', or modules, or logits=True.")
    select = _Selection(chosen, dtype, device)
    keep_pages()
    with keeping(model, wanted, to_the_end=logits or gradients, gradients=gradients, select=select) as kept:
        found = model.forward(batch)
    values = {str(place): kept[place] for place in wanted if place in kept}
    for path in modules:
        if path not in values:
            raise UnknownOption(f"Module {path!r} was not called in the forward pass.")
    if finite:
        _require_finite({str(place): value for place, value in kept.items()})
    own = found if logits or gradients else None
    return Activations(model, values, batch.tokens, batch.mask, chosen, own)


@contextmanager
def keeping(
    model: LanguageModel,
    places: Sequence[Place],
    *,
    to_the_end: bool = False,
    gradients: bool = False,
    select: "_Selection | None" = None,
) -> Iterator[dict[Any, Tensor]]:
    """While open, forward passes put the tensors at the places into the dict, and end after the last, unless `to_the_end`.

    Raises:
        UnknownSite: if the model does not have a site.
    """
    kept: dict[Any, Tensor] = {}
    last = None if to_the_end else len(places)
    keepers = {place: _Keeper(place, kept, last, gradients, select) for place in places}
    with nullcontext() if gradients else torch.no_grad(), edited(model, keepers), suppress(_Complete):
        yield kept


class _Selection(NamedTuple):
    """What to keep of a tensor."""

    columns: Tensor | None
    dtype: torch.dtype | None
    device: str | torch.device | None

    def of(self, place: Place, value: Tensor) -> Tensor:
        if self.columns is not None and isinstance(place, Site):
            axis = 2 if place.name in PAIRS else 1
            columns = self.columns.to(value.device)
            index = columns.reshape(columns.shape[0], *[1] * (axis - 1), columns.shape[1], *[1] * (value.dim() - axis - 1))
            shape = list(value.shape)
            shape[axis] = columns.shape[1]
            value = value.gather(axis, index.expand(shape))
        return value if self.dtype is None and self.device is None else value.to(self.device, self.dtype)


class _Keeper(NamedTuple):
    """An edit that changes nothing, but keeps what it sees."""

    place: Place
    kept: dict[Any, Tensor]
    last: int | None
    """How many are to be kept before the pass may end."""
    gradients: bool = False
    select: _Selection | None = None

    def __call__(self, value: Tensor) -> Tensor:
        if self.gradients:
            value = value.clone()  # a tensor of its own in the graph: a view beside it would have no gradient
        self.kept[self.place] = value if self.select is None else self.select.of(self.place, value)
        if len(self.kept) == self.last:
            raise _Complete
        return value


def _columns(batch: Batch, positions: Positions) -> Tensor | None:
    """Columns of the padded batch, `[batch, kept]`; None for all."""
    mask = batch.mask
    if isinstance(positions, str):
        if positions not in ("all", "last"):
            raise UnknownOption(f"positions={positions!r} is not known. Use 'all', 'last', indices, or a mask [batch, pos].")
        if positions == "all":
            return None
        positions = [-1]
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        chosen = positions.to(mask.device) & mask
        if positions.shape != mask.shape or len(set(chosen.sum(1).tolist())) != 1 or not chosen.any():
            raise UnknownOption(
                f"A mask of positions must be {list(mask.shape)}, as the tokens, with equally many real tokens in each row; "
                f"found {list(positions.shape)} with {chosen.sum(-1).tolist()} tokens a row."
            )
        return chosen.nonzero()[:, 1].reshape(len(mask), -1)
    lengths = mask.sum(1)
    asked = [int(position) for position in positions]
    if not asked:
        raise UnknownOption("An empty list of positions was given. Name at least one, or 'all'.")
    for position in asked:
        short = (lengths < (position + 1 if position >= 0 else -position)).nonzero()
        if short.numel():
            row, length = int(short[0]), int(lengths[int(short[0])])
            raise UnknownOption(
                f"Position {position} was asked for, but text {row} has {length} tokens: 0 to {length - 1}, or negative from "
                "its end."
            )
    first = mask.long().argmax(1)
    return torch.stack([first + (position if position >= 0 else lengths + position) for position in asked], 1)


def _require_finite(values: dict[str, Tensor]) -> None:
    """Sums first, which are read only after all were started: on a GPU, waiting for each in turn would show."""
    looked = {n: v.detach() for n, v in values.items() if v.is_floating_point() and not n.startswith("attn_scores")}
    sums = {name: value.sum() for name, value in looked.items()}
    for name, total in sums.items():
        if bool(torch.isfinite(total)):
            continue
        wrong = ~torch.isfinite(looked[name])
        if wrong.any():  # a sum of half precision may be infinite by itself
            where = wrong.nonzero()[0].tolist()
            raise NotFinite(
                f"{name} holds {int(wrong.sum())} values that are NaN or infinite, the first at {where}. Find where they arise "
                "(capture the layers below), load the model in another dtype, or pass finite=False to see them."
            )


@contextmanager
def edited(model: LanguageModel, edits: Mapping[Any, Edit]) -> Iterator[None]:
    """While open, every forward pass hands the tensor at each place to its edit and goes on with what that returns.

    An edit that returns the tensor it was given changes nothing, bitwise.

    Raises:
        UnknownSite: if the model does not have a site.
        ReadOnlySite: from the forward pass, if an edit changes a site past which the model's own tensor goes
            (`resid_mid`, `router_logits`).
    """
    taps = {place: model.tap(place) if isinstance(place, Site) else _module_tap(model, place) for place in edits}
    with ExitStack() as hooks:
        if any(tap.end == "inside" for tap in taps.values()):
            hooks.enter_context(eager(model.module(model.row.backbone)))
        axes: dict[str, tuple[int, int]] = {}
        for place, edit in edits.items():
            tap = taps[place]
            if tap.block is not None and tap.block not in axes:
                axes[tap.block] = (0, 0)
                block, seen = model.module(tap.block), _Axes(axes, tap.block)
                hooks.callback(block.register_forward_pre_hook(seen.on_input, with_kwargs=True).remove)
            module, applied = model.module(tap.path), _Applied(place, edit, tap, axes)
            if tap.end == "inside":
                hooks.enter_context(_watched(module, place.name, applied.to))
            elif tap.end == "output":
                hooks.callback(module.register_forward_hook(applied.on_output).remove)
            else:
                hooks.callback(module.register_forward_pre_hook(applied.on_input, with_kwargs=True).remove)
        yield


def _module_tap(model: LanguageModel, path: str) -> Tap:
    """A module's output as it is.

    Raises:
        UnknownOption: if no module has the path.
    """
    try:
        model.module(path)
    except AttributeError:
        raise UnknownOption(
            f"No module of {model.name!r} has the path {path!r}. Paths are those of model.hf.named_modules(), such as "
            f"{model.row.path('layers')}.0."
        ) from None
    return Tap(path, "output", WHOLE, model.heads)


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

    place: Place
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
            raise ReadOnlySite(f"Site '{self.place}' can be read, but not written: {self.tap.passed_by}.")
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
