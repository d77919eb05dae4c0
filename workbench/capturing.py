"""What a model computes at its sites: run it, keep the tensors, and end the pass after the last of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.activations import PAIRS, Activations
from workbench.edits.edit import indices
from workbench.errors import NotFinite, UnknownOption, UnknownSite, require_one_of
from workbench.heap import keep_pages
from workbench.model import Batch, LanguageModel
from workbench.sites import Site, parse_sites
from workbench.tracer import Place, edited, is_edited

Positions = str | int | Sequence[int] | Tensor
"""Which tokens: `all`, the `last` real one of each row, an index or several among a row's real tokens (negative: from its end),
or a mask `[batch, pos]` with equally many tokens in each row."""


Select = Callable[[Place, Tensor], Tensor]
"""What to keep of the tensor at a place."""


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
    backend: str = "hooks",
    remote: bool = False,
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
        backend: What reads the tensors, `hooks` or `nnsight`. The latter gives the same ones, without gradients and without the
            sites inside the attention function, and goes on to the logits.
        remote: Let NDIF run it (`nnsight` only), on weights of its own, those of the model's name on the Hugging Face hub.
            Whether NDIF runs that model is asked first; nothing goes over the network otherwise. (Tried here against
            recorded answers and nnsight's own simulation of a server, not against NDIF.)
    Returns:
        Tensors `[batch, pos, …]` on the model's device, detached unless `gradients`.
    Raises:
        UnknownSite, LayerOutOfRange: if the model does not have a site.
        UnknownOption: if a position is not in a text, no module has the path, or the backend cannot do it.
        MissingPackage, RemoteUnavailable: if nnsight is not installed, or NDIF does not run the model for this user now.
        NotFinite: if a site holds NaN or infinity; the first in the order of the forward pass is named.
        ReadOnlySite: if a gradient is asked at a site that the stream passes by.
    """
    batch = inputs if isinstance(inputs, Batch) else model.tokenize(inputs)
    wanted: list[Place] = [*parse_sites([sites] if isinstance(sites, str) else sites, model.n_layers), *modules]
    chosen = _columns(batch, positions)
    if not wanted and not logits:
        raise UnknownSite("Nothing was asked for. Name sites, such as 'resid_post.3', or modules, or logits=True.")
    require_one_of("backend", backend, ("hooks", "nnsight"))
    if remote and backend == "hooks":
        raise UnknownOption("remote=True runs through nnsight. Pass backend='nnsight' with it.")
    select = _Selection(chosen, dtype, device)
    if backend == "nnsight":
        from workbench.interop.nnsight import read_through

        seen, found = read_through(model, batch, wanted, gradients=gradients, remote=remote)
        kept = {place: select.of(place, value) for place, value in seen.items()}
    else:
        keep_pages()
        with keeping(model, wanted, to_the_end=logits or gradients, gradients=gradients, select=select.of) as kept:
            found = model.forward(batch)
    values = {str(place): kept[place] for place in wanted if place in kept}
    for path in modules:
        if path not in values:
            raise UnknownOption(f"Module {path!r} was not called in the forward pass.")
    if finite:
        follows = backend == "hooks" and dtype != torch.float16 and not is_edited(model)
        _require_finite(kept, follows=follows)
    own = found if logits or gradients else None
    return Activations(model, values, batch.tokens, batch.mask, chosen, own)


@contextmanager
def keeping(
    model: LanguageModel,
    places: Sequence[Place],
    *,
    to_the_end: bool = False,
    gradients: bool = False,
    select: Select | None = None,
) -> Iterator[dict[Any, Tensor]]:
    """While open, forward passes put the tensors at the places into the dict, and end after the last, unless `to_the_end`.

    The dict holds what `select` makes of each, called from the hook; the tensors themselves, if it is None.

    Raises:
        UnknownSite: if the model does not have a site.
    """
    kept: dict[Any, Tensor] = {}
    last = None if to_the_end else len(set(places))
    keepers = {place: _Keeper(place, kept, last, gradients, select) for place in places}
    with torch.set_grad_enabled(gradients), edited(model, keepers):
        try:
            yield kept
        except _Complete as complete:
            # It holds the frames of the pass, which hold it and the tensors: Python 3.12 would free them only at a collection.
            complete.__traceback__ = None


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
    select: Select | None = None

    def __call__(self, value: Tensor) -> Tensor:
        if self.gradients:
            value = value.clone()  # a tensor of its own in the graph: a view beside it would have no gradient
            value.requires_grad_()  # also where all weights are frozen
        self.kept[self.place] = value if self.select is None else self.select(self.place, value)
        if len(self.kept) == self.last:
            raise _Complete
        return value


def _columns(batch: Batch, positions: Positions) -> Tensor | None:
    """Columns of the padded batch, `[batch, kept]`; None for all."""
    mask = batch.mask
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        chosen = positions.to(mask.device) & mask
        if positions.shape != mask.shape or len(set(chosen.sum(1).tolist())) != 1 or not chosen.any():
            raise UnknownOption(
                f"A mask of positions must be {list(mask.shape)}, as the tokens, with equally many real tokens in each row; "
                f"found {list(positions.shape)} with {chosen.sum(-1).tolist()} tokens a row."
            )
        return chosen.nonzero()[:, 1].reshape(len(mask), -1)
    asked = indices("positions", positions)
    if asked is None:
        return None
    lengths = mask.sum(1)
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


_REACHES_STREAM = frozenset({"embed", "resid_pre", "z", "result", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post"})
"""Sites from which NaN and infinity go on into the stream, at the same token. (From a gate or a key they need not.)"""
_STREAM = ("resid_pre", "resid_post")


def _require_finite(kept: dict[Place, Tensor], *, follows: bool) -> None:
    """
    Args:
        kept: In the order of the forward pass.
        follows: Whether nothing comes between a site and the stream after it (an edit might, or a dtype of narrow range): then
            the last state kept speaks for all that goes into it, and reading the rest again, 2 % of a pass on a CPU, is saved.
    Raises:
        NotFinite: naming the first place that holds NaN or infinity.
    """
    places = list(kept)
    states = [i for i, place in enumerate(places) if isinstance(place, Site) and place.name in _STREAM]
    spoken_for: set[Place] = set()
    if follows and states and _is_finite(kept[places[states[-1]]]):
        before = places[: states[-1] + 1]
        spoken_for = {place for place in before if isinstance(place, Site) and place.name in _REACHES_STREAM}
    looked = {
        place: value.detach()
        for place, value in kept.items()
        if place not in spoken_for and value.is_floating_point() and getattr(place, "name", "") != "attn_scores"
    }
    # Sums first, which are read only after all were started: on a GPU, waiting for each in turn would show.
    sums = {place: value.sum() for place, value in looked.items()}
    for place, total in sums.items():
        if bool(torch.isfinite(total)) or _is_finite(looked[place]):  # a sum of half precision may be infinite by itself
            continue
        wrong = ~torch.isfinite(looked[place])
        where = wrong.nonzero()[0].tolist()
        raise NotFinite(
            f"{place} holds {int(wrong.sum())} values that are NaN or infinite, the first at {where}. Find where they arise "
            "(capture the layers below), load the model in another dtype, or pass finite=False to see them."
        )


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value.detach()).all())
