"""Units: what has one number a token. Neurons and other coordinates of a site, directions, heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import LengthMismatch, UnknownOption
from workbench.model import LanguageModel
from workbench.sites import Site

HEADS = ("heads", "kv_heads")


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one site."""

    site: Site
    index: list[int]
    """Their numbers: of a coordinate, a head, or a direction."""
    kind: str
    """`coordinate`, `head` (the length of its vector) or `direction`."""
    directions: Float[Tensor, "unit d"] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def values(self, kept: Tensor) -> Float[Tensor, "token unit"]:
        """Of the tensor that the site has, `[token, …]`."""
        if self.directions is not None:
            return kept @ self.directions.T.to(kept)
        if self.kind == "head":
            kept = kept.float().norm(dim=-1)
        return kept if len(self.index) == kept.shape[1] else kept[:, self.index]


def units_of(
    model: LanguageModel, site: Site, index: int | Sequence[int] | None, directions: Float[Tensor, "unit d"] | None
) -> Units:
    """
    Args:
        index: Which; all, if None.
    Raises:
        UnknownSite: if the model does not have the site.
        LengthMismatch: if directions have another length than the site's tensor.
        UnknownOption: if there is no unit of such a number.
    """
    sizes = {axis: size for axis, size in model.axes(site).items() if size is not None}
    kind = "direction" if directions is not None else "head" if set(sizes) & set(HEADS) else "coordinate"
    if directions is not None:
        if len(sizes) != 1 or directions.shape[1] not in sizes.values():
            has = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise LengthMismatch(
                f"Directions are {list(directions.shape)}, and site '{site}' has {has}. Give [directions, size], at a site of "
                "one axis."
            )
        n = len(directions)
        directions = directions.to(model.device)
    else:
        n = next(iter(sizes.values()))
    chosen = list(range(n)) if index is None else [index] if isinstance(index, int) else list(index)
    if not chosen or (wrong := [i for i in chosen if not 0 <= i < n]):
        raise UnknownOption(f"Site '{site}' has {n} units ({kind}s), 0 to {n - 1}; asked for {wrong[0] if chosen else 'none'}.")
    if directions is not None:
        directions = directions[torch.tensor(chosen, device=directions.device)]
    return Units(site, chosen, kind, directions)
