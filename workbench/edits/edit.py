"""What every edit has: a site, and which of its entries are changed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from operator import index
from typing import Any, ClassVar, Literal, get_args

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
    skip: int = 0
    """Leave the first so many tokens of every text as they are. Attention rests on the first (the first four hold the sinks of
    most models), and its state is like no other's: what was fitted on ordinary tokens says nothing of it."""

    def __init_subclass__(cls, kind: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind
        if kind:
            KINDS[kind] = cls

    def __post_init__(self) -> None:
        require_one_of("when", self.when, get_args(When))
        if self.skip < 0:
            raise UnknownOption(f"{self!r}: skip={self.skip} is below 0. Give how many first tokens to leave alone.")

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

    @property
    def tells_rows_apart(self) -> bool:
        """Whether rows are edited differently: then they must be texts, not beams."""
        return self.rows is not None

    def require_for(self, site: str) -> None:  # noqa: B027 - most edits are the same for all sites
        """
        Raises:
            UnknownOption: if what is to be put is not known for this site.
        """

    def applied(self, value: Tensor, site: str, at: Pass) -> Tensor:
        """The site's tensor after the edit: the very same one, if none of its tokens are chosen."""
        name = site.split(".")[0]
        pairs = name in PAIRS
        seen = value.transpose(1, 2) if pairs else value
        if name == "k_rot":  # all keys, cached ones too, in every pass: the cache holds them as they were before the edit
            at = at.over_keys(seen.shape[1])
        tokens = self.tokens(at)
        if not tokens.any():
            return value
        new = torch.where(self._entries(tokens, seen, name, at), self.new(seen, site, at).to(seen), seen)
        return new.transpose(1, 2) if pairs else new

    def tokens(self, at: Pass) -> Tensor:
        """Which tokens of this pass are chosen, `[batch, pos]`.

        Raises:
            UnknownOption: for a row that the batch does not have, or a negative position (with `when="prompt"`, any) that some
                chosen prompt does not reach.
        """
        chosen = (at.positions >= 0) & self._row_mask(len(at.positions))[:, None]
        for position in self.positions or ():
            self._require_reached(position, at, chosen.any(1))
        if self.when != "all":
            chosen &= (at.positions >= at.lengths[:, None]) == (self.when == "new")
        if self.positions is not None:
            chosen &= at.matching(self.positions, at.positions)
        return chosen & (at.positions >= self.skip)

    def met(self, at: Pass) -> set[tuple[str, int]]:
        """Which of the positions and keys asked for some chosen token of this pass stands at, or looks at."""
        chosen = self.tokens(at)
        found = {("positions", one) for one in self.positions or () if (chosen & at.matching((one,), at.positions)).any()}
        rows = chosen.any(1)
        return found | {("keys", one) for one in self.keys or () if at.matching((one,), at.keys)[rows].any()}

    def _row_mask(self, batch: int) -> Tensor:
        if self.rows is None:
            return torch.ones(batch, dtype=torch.bool)
        mask = torch.zeros(batch, dtype=torch.bool)
        for row in self.rows:
            if not -batch <= row < batch:
                raise UnknownOption(f"{self!r}: row {row} does not exist; the batch has {batch}, counted from 0.")
            mask[row] = True
        return mask

    def _require_reached(self, position: int, at: Pass, rows: Tensor) -> None:
        if position >= 0 and self.when != "prompt":
            return  # a generation may still come to it
        wanted = at.absolute(position)
        missing = ((wanted < 0) | (wanted >= at.lengths)) & rows
        if missing.any():
            row = int(missing.nonzero()[0])
            length = int(at.lengths[row])
            raise UnknownOption(
                f"{self!r}: position {position} was asked for, but text {row} has {length} tokens: 0 to {length - 1}, or "
                "negative from its end."
            )

    def _entries(self, tokens: Tensor, seen: Tensor, name: str, at: Pass) -> Tensor:
        """Which entries are chosen: the tokens' mask with as many axes as the tensor has, narrowed by the other selectors."""
        mask = tokens.reshape(*tokens.shape, *[1] * (seen.dim() - 2))
        for selector, axis in (("heads", 2), ("neurons", -1)):
            if (chosen := getattr(self, selector)) is not None:
                of_axis = torch.zeros(seen.shape[axis], dtype=torch.bool)
                of_axis[list(chosen)] = True
                mask = mask & (of_axis[:, None] if selector == "heads" else of_axis)
        if name not in PAIRS:
            return mask.to(seen.device)
        keys = at.keys[:, -seen.shape[-1] :]
        visible = (keys[:, None] >= 0) & (keys[:, None] <= at.positions[..., None])  # neither padding nor what comes later
        if self.keys is not None:
            visible &= at.matching(self.keys, keys)[:, None]
        mask = (mask & visible[:, :, None]).to(seen.device)
        # What a window hides stays hidden: scores at the least number, and weights of zero that were not asked for by name.
        if name == "attn_scores":
            return mask & (seen > torch.finfo(seen.dtype).min / 2)
        return mask if self.keys is not None else mask & (seen > 0)


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
        found = (_index(value),)
    except TypeError:
        try:
            found = tuple(map(_index, value))
        except TypeError:
            words = ", 'last' or 'all'" if name == "positions" else ""
            raise UnknownOption(
                f"{name}={value!r} is not understood. Give an index or several, counted from 0 (negative: from the end){words}."
            ) from None
    if not found:
        raise UnknownOption(f"{name}={value!r} chooses nothing. Give at least one index, or leave it out for all.")
    return found


def _index(value: Any) -> int:
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        raise TypeError("a mask, where an index is wanted")
    return index(value)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"[{' x '.join(map(str, value.shape))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_short(item)}' for name, item in value.items())}}}"
    return repr(value)
