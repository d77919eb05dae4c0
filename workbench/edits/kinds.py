"""The kinds of edits."""

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.activations import holds_pairs
from workbench.edits.edit import Edit
from workbench.edits.passing import Pass
from workbench.errors import LengthMismatch, UnknownOption


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Clamp(Edit, kind="clamp"):
    """Every chosen entry becomes one number."""

    value: float

    def new(self, seen: Tensor, site: str, at: Pass) -> Tensor:
        if torch.finfo(seen.dtype).max < abs(self.value) < torch.inf:
            raise UnknownOption(
                f"{self!r}: {seen.dtype} does not hold {self.value:g}. Choose a smaller value, or another dtype."
            )
        return torch.full_like(seen, self.value)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Scale(Edit, kind="scale"):
    """Every chosen entry is multiplied by one number."""

    factor: float

    def new(self, seen: Tensor, site: str, at: Pass) -> Tensor:
        return seen * self.factor


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Add(Edit, kind="add"):
    """A vector is added at every chosen token."""

    vector: Tensor
    """`[width]` of the site's last axis, or `[heads, width]`."""
    factor: float = 1.0

    def new(self, seen: Tensor, site: str, at: Pass) -> Tensor:
        axes = self.vector.dim()
        if not 1 <= axes <= seen.dim() - 2 or self.vector.shape != seen.shape[-axes:]:
            raise _misfit(self, self.vector.shape, seen)
        dtype = torch.promote_types(seen.dtype, torch.float32)  # rounded once, not at every step
        return seen.to(dtype) + self.factor * self.vector.to(seen.device, dtype)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ProjectOut(Edit, kind="project_out"):
    """What lies in the span of some directions is removed: x - (x - center) read basisᵀ."""

    basis: Tensor
    """Orthonormal, `[width, directions]`."""
    read: Tensor | None = None
    """What says how much of each direction there is, `[width, directions]`, readᵀ basis = 1; the basis itself, if None: an
    orthogonal projection."""
    center: Tensor | None = None
    """What is left as it is, `[width]`; the origin, if None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for one, shape in ((self.read, self.basis.shape), (self.center, self.basis.shape[:1])):
            if one is not None and one.shape != shape:
                raise UnknownOption(
                    f"{self!r}: a tensor of {list(one.shape)} does not fit a basis of {list(self.basis.shape)}."
                )

    def new(self, seen: Tensor, site: str, at: Pass) -> Tensor:
        dtype = torch.promote_types(seen.dtype, torch.float32)
        if self.basis.dim() != 2 or self.basis.shape[0] != seen.shape[-1]:
            raise _misfit(self, self.basis.shape[:1], seen)
        basis, x = self.basis.to(seen.device, dtype), seen.to(dtype)
        read = basis if self.read is None else self.read.to(seen.device, dtype)
        moved = x if self.center is None else x - self.center.to(seen.device, dtype)
        return (x - (moved @ read) @ basis.T).to(seen.dtype)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FromOtherTexts(Edit, ABC):
    """What is put was computed by another run."""

    values: dict[str, Tensor]
    """By site."""

    def require_for(self, site: str) -> None:
        if site not in self.values:
            raise UnknownOption(
                f"{self!r}: it holds nothing for '{site}', only for {', '.join(self.values)}. Name one of these."
            )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Mean(FromOtherTexts, kind="mean"):
    """Every chosen token gets the mean over other texts: values are `[…]`, without batch and pos."""

    def new(self, seen: Tensor, site: str, at: Pass) -> Tensor:
        return _fitting(self, self.values[site], seen).expand_as(seen)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Resample(FromOtherTexts, kind="resample"):
    """Every chosen token gets the tensor of a token of other texts, drawn by row, position and seed alone: the same one with
    and without a key-value cache. Values are `[tokens, …]`."""

    seed: int = 0

    @property
    def tells_rows_apart(self) -> bool:
        return True

    def new(self, seen: Tensor, site: str, at: Pass) -> Tensor:
        bank = self.values[site]
        rows = torch.arange(len(at.positions))[:, None]
        return _fitting(self, bank[_scattered(rows, at.positions, self.seed) % len(bank)], seen)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Patch(FromOtherTexts, kind="patch"):
    """Every chosen token gets the tensor of the token at the same position of another run: values are `[rows, pos, …]`, real
    tokens first; of attention pairs `[rows, pos, heads, pos]`."""

    lengths: tuple[int, ...]
    """Real tokens of each row."""
    source_positions: tuple[int, ...] | None = None
    """Where the tensors for `positions` stand in the other run, one for each; the same positions, if None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        n_source, n_own = len(self.source_positions or ()), len(self.positions or ())
        if self.source_positions is not None and n_source != n_own:
            raise UnknownOption(f"{self!r}: {n_source} source_positions for {n_own} positions. Give one for each.")
        if self.source_positions not in (None, self.positions) and any(map(holds_pairs, self.values)):
            raise UnknownOption(f"{self!r}: what a token looks at from another position are other tokens. Patch the same ones.")

    @property
    def tells_rows_apart(self) -> bool:
        return super().tells_rows_apart or len(self.lengths) > 1

    def new(self, seen: Tensor, site: str, at: Pass) -> Tensor:
        source, index = self._rows(len(at.positions)), self._index(at)
        value = self.values[site][source[:, None], index]
        if holds_pairs(site):  # keys as far as the token itself are there in both runs; no others are put
            keys = at.keys[:, -seen.shape[-1] :].clamp(0, value.shape[-1] - 1)
            value = value.gather(-1, keys[:, None, None].expand(*value.shape[:-1], -1))
        return _fitting(self, value, seen)

    def _rows(self, batch: int) -> Tensor:
        """Which row of the other run each row of this one takes from."""
        n = len(self.lengths)
        if n == 1:
            return torch.zeros(batch, dtype=torch.long)
        if self.rows is not None and n == len(self.rows):
            return torch.zeros(batch, dtype=torch.long).index_put((torch.tensor(self.rows),), torch.arange(n))
        if n == batch:
            return torch.arange(batch)
        raise LengthMismatch(
            f"{self!r}: the other run has {n} texts and this one {batch}. Patch from one text, or from as many as are edited."
        )

    def _index(self, at: Pass) -> Tensor:
        """Where each token's tensor stands in the other run, `[batch, pos]`."""
        chosen, lengths = self.tokens(at), torch.tensor(self.lengths)[self._rows(len(at.positions))]
        if self.positions is None:
            index, apart = at.positions, (lengths != at.lengths) & chosen.any(1)
            if apart.any():
                row = int(apart.nonzero()[0])
                raise LengthMismatch(
                    f"{self!r}: text {row} has {int(at.lengths[row])} tokens and the text patched from {int(lengths[row])}, so "
                    "their positions do not correspond. Use prompts of equal length, or say which positions "
                    "(positions=, source_positions=; negative ones count from each text's end)."
                )
        else:
            index = torch.zeros_like(at.positions)
            for position, source in zip(self.positions, self.source_positions or self.positions, strict=True):
                there = lengths + source if source < 0 else torch.full_like(lengths, source)
                here = at.positions == at.absolute(position)[:, None]
                index = torch.where(here, there[:, None], index)
        outside = ((index < 0) | (index >= lengths[:, None])) & chosen
        if outside.any():
            row, column = outside.nonzero()[0].tolist()
            raise LengthMismatch(
                f"{self!r}: the token at position {int(at.positions[row, column])} of text {row} would come from position "
                f"{int(index[row, column])} of a text of {int(lengths[row])} tokens. Name positions that both have, or patch "
                "only the prompt (when='prompt')."
            )
        return torch.where(chosen, index, 0)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Replace(Edit, kind="replace"):
    """What a function gives for the site's tensor is put at the chosen entries. Cannot be saved."""

    function: Callable[[Tensor], Tensor]
    """From `[batch, pos, …]` to the same shape; of attention pairs `[batch, pos, heads, keys]`."""

    def new(self, seen: Tensor, site: str, at: Pass) -> Tensor:
        found = self.function(seen.clone())  # a copy: one that works in place would change what was not chosen too
        if not isinstance(found, Tensor) or found.shape != seen.shape:
            given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UnknownOption(f"{self!r}: the function gave {given} for {list(seen.shape)}. Return the same shape.")
        return found


def _fitting(edit: Edit, value: Tensor, seen: Tensor) -> Tensor:
    """The value on the site's device and in its dtype, if it can be spread over it.

    Raises:
        UnknownOption: if it cannot.
    """
    try:
        torch.broadcast_shapes(value.shape, seen.shape)
    except RuntimeError:
        raise _misfit(edit, value.shape, seen) from None
    return value.to(seen)


def _misfit(edit: Edit, shape: torch.Size, seen: Tensor) -> UnknownOption:
    return UnknownOption(f"{edit!r}: a tensor of {list(shape)} does not fit the site's {list(seen.shape)}. Mend its last axes.")


def _scattered(rows: Tensor, positions: Tensor, seed: int) -> Tensor:
    """Numbers that look random, a function of row, position and seed alone (Marsaglia's xorshift after a mixing product)."""
    x = (positions + 1) * 2_654_435_761 + (rows + 1) * 2_246_822_519 + (seed + 1) * 3_266_489_917
    for shift in (16, 13, 16):
        x = ((x & 0xFFFFFFFF) ^ ((x & 0xFFFFFFFF) >> shift)) * 2_246_822_519
    return (x & 0xFFFFFFFF) >> 8
