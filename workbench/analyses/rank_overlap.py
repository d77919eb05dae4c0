"""How alike two ranked lists are, the first ranks counting most.

Source: Webber, Moffat & Zobel 2010, "A similarity measure for indefinite rankings" (ACM TOIS 28:4).
"""

import numpy as np
from jaxtyping import Float, Int

PERSISTENCE = 0.9
"""The chance that a reader who has looked at a rank goes on to the next. At 0.9 the first 10 ranks have 86 % of the weight."""


def rank_biased_overlap(
    a: Int[np.ndarray, "rows k"], b: Int[np.ndarray, "rows k"], p: float = PERSISTENCE
) -> Float[np.ndarray, " rows"]:
    """The overlap of each row of a with that of b: 1 for the same list, 0 for lists that share nothing.

    With X_d, how many items the first d of both lists share, the extrapolated overlap of lists of equal length k is
    `X_k/k · p^k + (1-p)/p · Σ_{d=1..k} X_d/d · p^d`: the agreement at depth k is taken to go on below it.

    Args:
        a, b: Items, best first; none twice in a row.
        p: Between 0 and 1; the lower, the more the first ranks count.
    """
    k = a.shape[1]
    shared, total = np.zeros(len(a), np.int64), np.zeros(len(a))
    for d in range(1, k + 1):
        shared += (a[:, :d] == b[:, d - 1 : d]).sum(1) + (a[:, d - 1 : d] == b[:, : d - 1]).sum(1)
        total += shared / d * p**d
    return shared / k * p**k + (1 - p) / p * total
