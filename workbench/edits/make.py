"""The words for edits: `wb.clamp("mlp_up.12", 345, 8.0)`, `wb.ablate(...)`, …; each gives a value for `wb.intervene`.

All take the selectors of `Edit` (rows, positions, heads, neurons, keys, when, skip): what is not chosen stays bitwise as it
was.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, SupportsIndex, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.activations import Activations, holds_pairs
from workbench.edits.edit import SELECTORS, Edit, When, indices
from workbench.edits.kinds import Add, Clamp, Mean, Patch, ProjectOut, Replace, Resample, Scale
from workbench.errors import NotFinite, UnknownOption, UnknownSite, require_one_of
from workbench.sites import parse_sites

Some = SupportsIndex | Iterable[SupportsIndex] | None


class Where(TypedDict, total=False):
    """Which entries an edit changes: see `Edit`."""

    rows: Some
    positions: str | Some
    heads: Some
    keys: Some
    when: When
    skip: int


def clamp(site: str, neurons: Some, value: float, **where: Unpack[Where]) -> Edit:
    """Set neurons (or dimensions) to a number.

    Davies 2025 (arXiv 2501.02688) clamps a neuron's up projection, before the gate multiplies it: `mlp_up`.
    """
    return Clamp(site=site, value=float(value), **located(where, neurons))


def scale(site: str, factor: float, *, neurons: Some = None, **where: Unpack[Where]) -> Edit:
    """Multiply by a number; by 1 nothing changes, bitwise."""
    return Scale(site=site, factor=float(factor), **located(where, neurons))


def add(site: str, vector: Tensor, factor: float = 1.0, *, neurons: Some = None, **where: Unpack[Where]) -> Edit:
    """Steer: add `factor · vector`, `[width]` of the site's last axis, or `[heads, width]`.

    Raises:
        NotFinite: if the vector holds NaN or infinity.
    """
    return Add(site=site, vector=_finite("add: the vector", vector), factor=float(factor), **located(where, neurons))


def project_out(site: str, directions: Tensor, **where: Unpack[Where]) -> Edit:
    """Remove what lies in the span of directions, `[width]` or `[n, width]`; they need not be orthogonal or of unit length.

    Raises:
        NotFinite: if a direction holds NaN or infinity.
        UnknownOption: if all directions are zero.
    """
    rows = torch.atleast_2d(_finite("project_out: a direction", directions)).double()
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    if not sizes.numel() or not sizes.max() > 0:
        raise UnknownOption("project_out: all directions are zero, so they span nothing. Give at least one that is not.")
    kept = basis[sizes > sizes.max() * max(rows.shape) * torch.finfo(torch.float32).eps]
    return ProjectOut(site=site, basis=kept.T.float().contiguous(), **located(where))


def ablate(
    site: str,
    neurons: Some = None,
    *,
    to: Literal["zero", "mean", "resample"] = "zero",
    source: Activations | None = None,
    seed: int = 0,
    **where: Unpack[Where],
) -> Edit:
    """Take away what a site says: put zero, the mean over other texts, or the tensor of one of their tokens, in its place.

    Args:
        source: Other texts, captured at this site; for `mean` and `resample`.
        seed: For `resample`: which token each gets.
    Raises:
        UnknownOption: if the source is missing, or does not hold the site.
    """
    require_one_of("to", to, ("zero", "mean", "resample"))
    common: dict[str, Any] = {"site": site, **located(where, neurons)}
    if to == "zero":
        if source is not None:
            raise UnknownOption(
                "ablate(to='zero') puts zeros and takes no source=. Leave it out, or ablate to 'mean' or 'resample'."
            )
        return Clamp(value=0.0, **common)
    if source is None:
        raise UnknownOption(f"ablate(to={to!r}) needs source=: other texts, captured at {site!r} (wb.capture).")
    values = {}
    for name in _named(site, source):
        if holds_pairs(name):
            raise UnknownSite(f"Tokens of other texts have no {name!r} with the tokens of this one. Ablate it to zero.")
        real = source.kept_mask
        values[name] = source[name].detach()[real.to(source[name].device)].cpu()
    if to == "mean":
        means = {
            name: value.double().mean(0).to(torch.promote_types(value.dtype, torch.float32)) for name, value in values.items()
        }
        return Mean(values=means, **common)
    return Resample(values=values, seed=seed, **common)


def patch(
    site: str, source: Activations, *, neurons: Some = None, source_positions: Some = None, **where: Unpack[Where]
) -> Edit:
    """Put the tensors of another run at the same positions, counted among real tokens, so that padding does not matter.

    Args:
        source: The other run, captured at this site, all positions: one text, or as many as are edited.
        source_positions: Where in the other run the tensors for `positions` stand, if elsewhere; one for each.
        where: Only the prompt is patched, unless `when` says otherwise.
    Raises:
        UnknownOption: if the source does not hold the site whole.
        LengthMismatch: from the forward pass, if the prompts have other numbers of tokens and no positions were named.
    """
    chosen = {"when": "prompt", "source_positions": indices("source_positions", source_positions), **located(where, neurons)}
    if source.positions is not None:
        raise UnknownOption("patch: the source was captured at some positions only. Capture it whole; positions= chooses.")
    lengths = source.mask.sum(1).tolist()
    values = {}
    for name in _named(site, source):
        pairs = holds_pairs(name)
        value = source[name].detach().cpu()
        value = value.transpose(1, 2) if pairs else value
        aligned = value.new_zeros(value.shape)
        for row, (mask, length) in enumerate(zip(source.mask.cpu(), lengths, strict=True)):
            own = value[row, mask]
            aligned[row, :length] = F.pad(own[..., mask], (0, own.shape[-1] - length)) if pairs else own
        values[name] = aligned
    return Patch(site=site, values=values, lengths=tuple(lengths), **chosen)


def replace(site: str, function: Callable[[Tensor], Tensor], *, neurons: Some = None, **where: Unpack[Where]) -> Edit:
    """Put what a function makes of the site's tensor, `[batch, pos, …]`, at the chosen entries. Cannot be saved as JSON."""
    return Replace(site=site, function=function, **located(where, neurons))


def _named(site: str, source: Activations) -> list[str]:
    """The canonical names of the sites, all of which the source must hold.

    Raises:
        UnknownOption: if it lacks one.
    """
    names = [str(one) for one in parse_sites([site], source.model.n_layers)]
    for name in names:
        if name not in source:
            raise UnknownOption(f"The source has no {name!r}; it has {', '.join(source)}. Capture {site!r} of the other texts.")
    return names


def located(where: Where, neurons: Some = None) -> dict[str, Any]:
    """The selectors as an edit holds them, of what a user gives."""
    given: dict[str, Any] = {"neurons": neurons, **where}
    return {name: indices(name, value) if name in SELECTORS else value for name, value in given.items()}


def _finite(what: str, value: Tensor) -> Tensor:
    """
    Raises:
        NotFinite: if it holds NaN or infinity.
    """
    value = torch.atleast_1d(torch.as_tensor(value)).detach().cpu()
    value = value if value.is_floating_point() else value.float()
    if not torch.isfinite(value).all():
        raise NotFinite(f"{what} holds NaN or infinity. Find where it arises before it is put into a model.")
    return value
