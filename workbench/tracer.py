"""Reading and changing a model's inner tensors while it runs. The only file that registers hooks."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from workbench.architectures.cuts import WHOLE
from workbench.architectures.taps import Tap
from workbench.attention import Watch, eager
from workbench.errors import LengthMismatch, ReadOnlySite, UnknownOption, UnreadableWeight
from workbench.model import LanguageModel
from workbench.sites import Site

HookFunction = Callable[[Tensor], Tensor]
"""Given the tensor at a site, the tensor to put there."""

Place = Site | str
"""A site, or the path of a module, whose output is taken."""


@contextmanager
def edited(model: LanguageModel, edits: Mapping[Any, HookFunction]) -> Iterator[None]:
    """While open, every forward pass hands the tensor at each place to its edit and goes on with what that returns.

    An edit that returns the tensor it was given changes nothing, bitwise.

    Raises:
        UnknownSite: if the model does not have a site.
        ReadOnlySite: from the forward pass, if an edit changes a site past which the model's own tensor goes
            (`resid_mid`, `router_logits`).
    """
    taps = taps_of(model, edits)
    with ExitStack() as hooks:
        if any(tap.end == "inside" for tap in taps.values()):
            hooks.enter_context(eager(model.module(model.row.backbone)))
        axes: dict[str, tuple[int, int]] = {}
        for place, edit in edits.items():
            tap = taps[place]
            if getattr(place, "name", "") == "result" and _ours(model.module(tap.path)._forward_hooks, _Added):
                raise UnreadableWeight(
                    f"Site '{place}' is made with W_O, which is edited beside the weights here, so that it would not add up to "
                    "attn_out. Capture z or attn_out, or save the edited model and load that."
                )
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


@contextmanager
def starting_at(model: LanguageModel, layer: int, stream: Tensor) -> Iterator[None]:
    """While open, forward passes hand a block this stream, and do not run the blocks before it, the first one apart: from it is
    seen what blocks give beside the stream. What sites before the layer hold is not true then, but for the state that enters
    it.

    For runs of the same texts that differ from this block on: TransformerLens has `start_at_layer` for it. Hooks on the blocks
    that are left out would be heard again: see `is_hooked`. Before layer 2 there is no block to leave out, and nothing is done.

    Args:
        stream: What `resid_pre` of the layer holds for the batch, `[batch, pos, d_model]`.
    Raises:
        LayerOutOfRange: if the model has no such layer.
        LengthMismatch: from the forward pass, if the stream is of another batch.
    """
    model.block(layer)
    if layer < 2:
        yield
        return
    first = model.block(0)
    given: list[Any] = []

    def handed_on(seen: Tensor) -> Tensor:
        if seen.shape != stream.shape:
            raise LengthMismatch(
                f"A stream of {list(stream.shape)} (batch, pos, d_model) was given for a batch of {list(seen.shape)}. Give "
                "resid_pre of the same batch."
            )
        return stream.to(seen.device).clone()  # some blocks go on adding to it in place

    def note(module: nn.Module, args: Any, output: Any) -> None:
        given[:] = [output]

    with ExitStack() as hooks:
        hooks.enter_context(edited(model, {Site("resid_post", 0): handed_on}))
        hooks.callback(first.register_forward_hook(note).remove)  # after the edit: it notes the output with this stream
        for skipped in range(1, layer):
            hooks.enter_context(replaced(model.block(skipped), "forward", lambda *_, **__: given[0]))
        yield


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """While open, an object's method is this function."""
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def taps_of(model: LanguageModel, places: Iterable[Place]) -> dict[Place, Tap]:
    """Where each place is read from the modules.

    Raises:
        UnknownSite, UnknownOption: if the model does not have a site, or no module has the path.
    """
    return {place: model.tap(place) if isinstance(place, Site) else _module_tap(model, place) for place in places}


def is_edited(model: LanguageModel) -> bool:
    """Whether some block of edits (or of keeping) is open."""
    return any(
        _ours(m._forward_hooks, _Applied, _Added, Watch) or _ours(m._forward_pre_hooks, _Applied) for m in model.hf.modules()
    )


def is_hooked(model: LanguageModel) -> bool:
    """Whether some block of edits is open, or a hook of anyone else's is on a transformer block. What it does is then in the
    streams that are kept, and a pass that began at one of them would have it done again."""
    blocks = [model.block(layer) for layer in range(model.n_layers)]
    return is_edited(model) or any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def is_output_edited(module: nn.Module) -> bool:
    """Whether some open block hands this module's output to an edit."""
    return _ours(module._forward_hooks, _Applied)


def _ours(hooks: Mapping[int, Any], *kinds: type) -> bool:
    return any(isinstance(getattr(hook, "__self__", None), kinds) for hook in hooks.values())


@contextmanager
def announced(model: LanguageModel, begin: Callable[[dict[str, Any]], None], end: Callable[[], None]) -> Iterator[None]:
    """While open, `begin` is told what every forward pass of the whole model is given, its arguments by name, before it runs;
    `end` is called after it, also when it failed."""
    signature = inspect.signature(type(model.hf).forward)  # the class's: nnsight puts a function of its own on the instance

    def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin(signature.bind_partial(module, *args, **kwargs).arguments)

    with ExitStack() as hooks:
        hooks.callback(model.hf.register_forward_pre_hook(tell, with_kwargs=True).remove)
        hooks.callback(model.hf.register_forward_hook(lambda *_: end(), always_call=True).remove)
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
    return Tap(path, "output", WHOLE, model.heads, mutated=True)  # whether it is, no row says


_WATCHES: dict[nn.Module, Watch] = {}
"""One an attention module, shared by all edits inside it, so that they come in the order in which they were opened."""


@contextmanager
def _watched(module: nn.Module, name: str, edit: HookFunction) -> Iterator[None]:
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


class Factors(NamedTuple):
    """What went into linear modules, and the derivative at what came out, by path; a module that a pass calls again has
    several."""

    inputs: dict[str, list[Tensor]]
    derivatives: dict[str, list[Tensor]]
    """Filled by the backward pass, the last call first."""


@contextmanager
def factors_of(model: LanguageModel, items: Mapping[str, int]) -> Iterator[Factors]:
    """While open, a forward pass keeps what goes into modules, and the backward pass after it the derivatives at their outputs.

    Args:
        items: Paths of modules, and which item of the output is meant, where a module gives a tuple.
    """
    found = Factors({}, {})
    with ExitStack() as hooks:
        for path, item in items.items():
            noted = _Noted(found, path, item)
            hooks.callback(model.module(path).register_forward_hook(noted.on_output).remove)
        yield found


class _Noted(NamedTuple):
    """Notes both factors of a linear module. A hook on the tensor, not on the module: what is later changed in place does not
    reach the derivative at what the module itself gave."""

    found: Factors
    path: str
    item: int

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        value = output[self.item] if isinstance(output, tuple) else output
        self.found.inputs.setdefault(self.path, []).append(args[0].detach())
        value.register_hook(self.found.derivatives.setdefault(self.path, []).append)


@contextmanager
def low_rank_added(
    model: LanguageModel, added: Mapping[str, tuple[Tensor, Tensor]], acts_on: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """While open, linear modules give `x W + (x leftᵀ) right`, as if `leftᵀ right` had been added to their weights.

    Args:
        added: By path: left `[rank, d_in]` and right `[rank, d_out]`.
        acts_on: By path: 1 where a rank acts on a row of the batch, else 0, `[batch, rank]`; all act on all, if None.
    """
    with ExitStack() as hooks:
        for path, (left, right) in added.items():
            module, one = model.module(path), _Added(left, right, None if acts_on is None else acts_on[path])
            hooks.callback(module.register_forward_hook(one.on_output).remove)
        yield


class _Added(NamedTuple):
    left: Tensor
    right: Tensor
    acts_on: Tensor | None

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        left, right = self.left.to(x.device), self.right.to(x.device)
        read = x.to(left.dtype) @ left.T
        if self.acts_on is not None:
            rows = self.acts_on.to(read)
            if read.shape[:-1].numel() % len(rows) or (read.dim() == 3 and len(read) != len(rows)):
                raise LengthMismatch(
                    f"acts_on has {len(rows)} texts, and the batch {list(read.shape[:-1])} tokens. Give one row a text."
                )
            read = read * rows.repeat_interleave(read.shape[:-1].numel() // len(rows), 0).view_as(read)
        return (output + read @ right).to(output.dtype)


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
    edit: HookFunction
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
