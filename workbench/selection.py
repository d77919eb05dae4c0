"""The k largest (or smallest) numbers of each row, exactly: equal numbers are ranked by lowest column."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROUP = 32
"""Columns a group. One cheap pass reduces each group to its extreme; only the k best groups are searched in full."""


def group_extremes(x: Float[Tensor, "rows columns"], *, largest: bool) -> Float[Tensor, "rows groups"]:
    """The maximum (or minimum) of every group of `GROUP` columns; what is left over at the end belongs to no group.

    With G groups, group j holds the columns j, j + G, j + 2G, …: such strided groups reduce by whole vectors, twice as
    fast as neighbouring columns do on a CPU.
    """
    groups = x.shape[1] // GROUP
    stacked = x[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    return stacked.amax(1) if largest else stacked.amin(1)


def select(
    x: Float[Tensor, "rows columns"],
    k: int,
    *,
    largest: bool = True,
    tile: int | None = None,
    groups: Float[Tensor, "rows groups"] | None = None,
) -> tuple[Float[Tensor, "rows best"], Int[Tensor, "rows best"]]:
    """The k extreme values of each row and their columns, best first, ties by lowest column.

    The k best values lie in the k groups with the best extremes, and those groups are found in the same way, so a full
    top-k is needed over k groups only. `torch.topk` leaves the order of equal values open: rows where a tie touches the
    boundary are sorted in full.

    Args:
        tile: `x` is a sequence of tiles this wide (the last may be narrower), each grouped by itself. One, if not given.
        groups: `group_extremes` of the tiles, side by side, if they were computed while `x` was in cache.
    """
    tile = tile or max(x.shape[1], 1)
    if groups is None:
        groups = torch.cat([group_extremes(part, largest=largest) for part in x.split(tile, 1)], 1)
    if groups.shape[1] <= k or k * GROUP >= x.shape[1]:
        return _sorted(x, k, largest)
    best, chosen = select(groups, k + 1, largest=largest)
    open_rows = best[:, k - 1] == best[:, k]

    columns = torch.cat([_columns(chosen[:, :k], x.shape[1], tile), _ungrouped(x, tile).expand(len(x), -1)], 1)
    values, where = x.gather(1, columns).topk(k + 1, largest=largest)
    columns = columns.gather(1, where)
    equal = values[:, 1:] == values[:, :-1]
    values, columns = values[:, :k].contiguous(), columns[:, :k].contiguous()
    if equal.any():
        open_rows |= equal[:, -1]
        columns, order = columns.sort(dim=1)
        values, order = values.gather(1, order).sort(dim=1, descending=largest, stable=True)
        columns = columns.gather(1, order)
    if open_rows.any():
        values[open_rows], columns[open_rows] = _sorted(x[open_rows], k, largest)
    return values, columns


def merge(
    first: tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]],
    second: tuple[Float[Tensor, "rows l"], Int[Tensor, "rows l"]],
    k: int,
    *,
    largest: bool = True,
) -> tuple[Float[Tensor, "rows best"], Int[Tensor, "rows best"]]:
    """The k best of two selections. The first holds the lower columns, so a stable sort keeps the rule for ties."""
    values, order = torch.cat([first[0], second[0]], 1).sort(dim=1, descending=largest, stable=True)
    return values[:, :k], torch.cat([first[1], second[1]], 1).gather(1, order[:, :k])


def _columns(groups: Tensor, columns: int, tile: int) -> Tensor:
    """The columns of `x` that the given groups hold."""
    per_tile, last = tile // GROUP, columns // tile
    index, within = groups // per_tile, groups % per_tile
    stride = torch.where(index == last, (columns - last * tile) // GROUP, per_tile)
    steps = torch.arange(GROUP, device=groups.device)
    return ((index * tile + within)[..., None] + steps * stride[..., None]).flatten(1)


def _ungrouped(x: Tensor, tile: int) -> Tensor:
    """Columns that belong to no group: the rest of each tile."""
    spans = [(start, min(tile, x.shape[1] - start)) for start in range(0, x.shape[1], tile)]
    rest = [torch.arange(start + width // GROUP * GROUP, start + width) for start, width in spans]
    return torch.cat(rest).to(x.device)


def _sorted(x: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    values, columns = x.sort(dim=1, descending=largest, stable=True)
    return values[:, :k], columns[:, :k]
