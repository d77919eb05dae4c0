"""What every edit has: a site, and which of its entries are changed."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import index
from typing import Any, ClassVar, Literal, SupportsIndex, get_args

import torch
from torch import Tensor

from workbench.activations import PAIRS
from workbench.edits.passing import Pass
from workbench.errors import UnknownOption, require_one_of

When = Literal["all", "prompt", "new"]
Indices = tuple[int, ...] | None

SELECTORS = ("rows", "positions", "heads", "neurons", "keys", "source_positions")
"""Fields that choose by index."""

KINDS: dict[str, type["Edit"]] = {}
"""Every kind of edit by its name."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Edit(ABC):
    """A change of the tensor at one or several sites. All selectors together choose the entries; None chooses all."""

    kind: ClassVar[str]

    site: str
    """As `parse_sites` reads it: `mlp_up.12`, `resid_post.4:8`."""
    rows: Indices = None
    """Texts of the batch; negative from its end."""
    positions: Indices = None
    """Tokens, counted among a row's real ones from 0, and on through what is generated; negative from the prompt's end."""
    heads: Indices = None
    """Heads, at the sites that have them; groups of heads at `k`, `v` and `k_rot`."""
    neurons: Indices = None
    """Entries of the last axis: neurons, or dimensions of the stream or of a head."""
    keys: Indices = None
    """Tokens looked at, as `positions`; at `pattern` and `attn_scores`, whose positions are the tokens that look."""
    when: When = "all"
    """`prompt`: only what is given; `new`: only what is generated after it, token by token."""

    def __init_subclass__(cls, kind: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind
        KINDS[kind] = cls

    def __post_init__(self) -> None:
        require_one_of("when", self.when, get_args(When))

    def __repr__(self) -> str:
        shown = [repr(self.site)]
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name != "site" and value != one.default:
                shown.append(f"{one.name}={_short(value)}")
        return f"{self.kind}({', '.join(shown)})"

    @abstractmethod
    def new(self, seen: Tensor, site: str, at: Pass) -> Tensor:
        """What would stand at the site `[batch, pos, …]` if all of it were chosen; anything that broadcasts to it.

        Args:
            seen: The site's tensor; of attention pairs `[batch, pos, heads, keys]`.
            site: Its canonical name.
        """

    def applied(self, value: Tensor, site: str, at: Pass) -> Tensor:
        """The site's tensor after the edit: the very same one, if none of its tokens are chosen."""
        tokens = self.tokens(at)
        if not tokens.any():
            return value
        pairs = site.split(".")[0] in PAIRS
        seen = value.transpose(1, 2) if pairs else value
        new = torch.where(self._entries(tokens, seen, at), self.new(seen, site, at).to(seen), seen)
        return new.transpose(1, 2) if pairs else new

    def tokens(self, at: Pass) -> Tensor:
        """Which tokens of this pass are chosen, `[batch, pos]`.

        Raises:
            UnknownOption: for a row that the batch does not have, or a position that its prompt does not reach.
        """
        chosen = at.positions >= 0
        if self.when != "all" and at.new != (self.when == "new"):
            return torch.zeros_like(chosen)
        if self.rows is not None:
            chosen &= self._row_mask(len(chosen))[:, None]
        if self.positions is not None:
            chosen &= self._matching(self.positions, at.positions, at, chosen)
        return chosen

    def positions_in(self, at: Pass) -> set[int]:
        """Which of the positions asked for some chosen token of this pass stands at."""
        chosen = self.tokens(at)
        return {one for one in self.positions or () if (chosen & (at.positions == at.absolute(one)[:, None])).any()}

    def _row_mask(self, batch: int) -> Tensor:
        mask = torch.zeros(batch, dtype=torch.bool)
        for row in self.rows or ():
            if not -batch <= row < batch:
                raise UnknownOption(f"{self!r}: row {row} does not exist; the batch has {batch}, counted from 0.")
            mask[row] = True
        return mask

    def _matching(self, asked: Iterable[int], of: Tensor, at: Pass, rows: Tensor) -> Tensor:
        """Which columns stand at one of the positions."""
        found = torch.zeros_like(of, dtype=torch.bool)
        for position in asked:
            wanted = at.absolute(position)
            late = wanted >= at.lengths if self.when == "prompt" else torch.zeros_like(wanted, dtype=torch.bool)
            missing = ((wanted < 0) | late) & rows.any(1)
            if not at.new and missing.any():
                row = int(missing.nonzero()[0])
                length = int(at.lengths[row])
                raise UnknownOption(
                    f"{self!r}: position {position} was asked for, but text {row} has {length} tokens: 0 to {length - 1}, or "
                    "negative from its end."
                )
            found |= of == wanted[:, None]
        return found

    def _entries(self, tokens: Tensor, seen: Tensor, at: Pass) -> Tensor:
        """Which entries are chosen: the tokens' mask with as many axes as the tensor has, narrowed by the other selectors."""
        mask = tokens.reshape(*tokens.shape, *[1] * (seen.dim() - 2))
        for name, axis in (("heads", 2), ("neurons", -1)):
            if (chosen := getattr(self, name)) is not None:
                of_axis = torch.zeros(seen.shape[axis], dtype=torch.bool)
                of_axis[list(chosen)] = True
                mask = mask & (of_axis[:, None] if name == "heads" else of_axis)
        if self.keys is not None:
            columns = at.keys[:, -seen.shape[-1] :]  # a window's cache holds the last ones alone
            mask = mask & self._matching(self.keys, columns, at, tokens)[:, None, None]
        return mask.to(seen.device)


def indices(name: str, value: Any) -> Indices:
    """As a selector holds them, of what a user gives: one index, several, or (for positions) the words that `capture` takes.

    Raises:
        UnknownOption: if it is none of these, or empty.
    """
    if value is None or (name == "positions" and value == "all"):
        return None
    if name == "positions" and value == "last":
        return (-1,)
    try:
        found = (index(value),) if isinstance(value, SupportsIndex) else tuple(map(index, value))
    except TypeError:
        raise UnknownOption(f"{name}={value!r} is not understood. Give an index or several, counted from 0.") from None
    if not found:
        raise UnknownOption(f"{name}={value!r} chooses nothing. Give at least one index, or leave it out for all.")
    return found


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"[{' x '.join(map(str, value.shape))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_short(item)}' for name, item in value.items())}}}"
    return repr(value)
