"""Ranks that rounding leaves open, settled in float64: the tokens are then those of exact arithmetic, on every machine."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

SPARE = 6
"""Candidates beyond the k that are wanted, so that one that rounding put below the k-th is still there."""
ERROR = 16 * 2.0**-24
"""By how much a float32 logit may err, relative to |row| · |column|. Measured: at most 7 x 2^-24 among 33 million products
of 4,096 bfloat16 numbers on an H200; less on CPUs."""
GROWTH = 2.0**-24 / 16
"""And by this much of the logit itself for every number that is added: an H200's tensor cores cut off the last bit, 16
numbers at a time, so a row that is parallel to its column errs by 200 x 2^-24 at 4,096 numbers (measured; here 256).
Neither is a proof: a sum whose every part rounds the same way could err by (number of additions) x 2^-24."""


def settle(
    values: Float[Tensor, "rows candidates"],
    ids: Int[Tensor, "rows candidates"],
    k: int,
    error: Float[Tensor, " rows"],
    exact: Callable[[Int[Tensor, " open"], Int[Tensor, "open candidates"]], Float[Tensor, "open candidates"]],
    *,
    largest: bool,
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"], Int[Tensor, " crowded"]]:
    """Put the k best candidates into their true order.

    Args:
        values, ids: Best first; more than k, unless there are no more.
        error: By how much a value of the row may err.
        exact: Float64 values of some candidates of some rows.
    Returns:
        The k best, and the rows where more candidates than there are here lie within rounding of the k-th: for them nothing
        was settled.
    """
    gaps = (values[:, :-1] - values[:, 1:]).abs()
    near = gaps[:, :k] <= 2 * error[:, None]
    rows = near.any(1).nonzero()[:, 0]
    if not len(rows):
        return values[:, :k], ids[:, :k], rows
    full = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    if values.shape[1] > k:
        full = (values[rows, k - 1] - values[rows, -1]).abs() <= 2 * error[rows]
    values, ids = values.clone(), ids.clone()
    crowded, rows = rows[full], rows[~full]
    order = ids[rows].sort(dim=1).values  # by id first: of equal values the lowest id then comes first
    exactly, places = exact(rows, order).sort(dim=1, descending=largest, stable=True)
    values[rows], ids[rows] = exactly.to(values.dtype), order.gather(1, places)
    return values[:, :k], ids[:, :k], crowded
