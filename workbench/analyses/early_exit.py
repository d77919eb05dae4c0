"""How many blocks could be left out, if the model stopped where a lens is sure of the next token.

Source: "Jump to Conclusions" (Yom Din et al. 2024, arXiv 2303.09435), after Schuster et al. 2022 (CALM): the pass ends after
the first block whose reading has p(best) - p(second) > 0.9 λ + 0.1 exp(-4 t / N), with t the token's position and N the mean
position. Each reading takes a product with the whole unembedding, which the number of blocks saved does not count; nor does it
count that later tokens attend to what the blocks left out would have made of this one. So it is an upper bound.

We differ in this: λ is chosen on one half of the documents and what it saves is measured on the other; and beside the rule
stands the best fixed block to stop after, which needs no reading on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    import pandas as pd

THRESHOLDS = np.linspace(-0.112, 1.112, 154)
"""λ: at the first every token leaves after block 1, at the last none before the end."""
WANTED = (0.9, 0.95, 0.99)
FADE = 4.0


def early_exit(
    margin: Float[np.ndarray, "token state"],
    agrees: Bool[np.ndarray, "token state"],
    pos: Int[np.ndarray, " token"],
    document: Int[np.ndarray, " token"],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """
    Args:
        margin: p(best) - p(second) at states 1, 2, …; the last is the model's own.
        agrees: Whether the best token there is the model's.
        document: Those of even ordinal choose, the others measure.
    Returns:
        By λ over all documents: threshold, blocks (mean number run), agreement. And by wanted agreement: wanted, threshold,
        saved (blocks, of the measuring half), agreement (there), and fixed_saved, fixed_agreement of a fixed block chosen
        likewise; NaN where only one half has documents.
    """
    import pandas as pd

    run = np.stack([exits(margin, pos, one) for one in THRESHOLDS])
    agreed = np.take_along_axis(agrees.T, run - 1, 0)  # [threshold, token]
    curve = pd.DataFrame({"threshold": THRESHOLDS, "blocks": run.mean(1), "agreement": agreed.mean(1)})
    order = np.unique(document, return_inverse=True)[1]
    choosing, measuring = order % 2 == 0, order % 2 == 1
    n = margin.shape[1]
    fixed_run, fixed_agreed = np.arange(1, n + 1)[:, None].repeat(len(pos), 1), agrees.T
    found = []
    for wanted in WANTED:
        row: dict[str, float] = {"wanted": wanted, "threshold": float("nan")}
        for prefix, blocks, right in (("", run, agreed), ("fixed_", fixed_run, fixed_agreed)):
            row |= {f"{prefix}saved": float("nan"), f"{prefix}agreement": float("nan")}
            if measuring.any():
                reaching = np.flatnonzero(right[:, choosing].mean(1) >= wanted)
                best = reaching[blocks[reaching][:, choosing].mean(1).argmin()]
                row |= {
                    f"{prefix}saved": float(n - blocks[best][measuring].mean()),
                    f"{prefix}agreement": float(right[best][measuring].mean()),
                }
                row["threshold"] = float(THRESHOLDS[best]) if not prefix else row["threshold"]
        found.append(row)
    return curve, pd.DataFrame(found)


def exits(
    margin: Float[np.ndarray, "token state"], pos: Int[np.ndarray, " token"], threshold: float
) -> Int[np.ndarray, " token"]:
    """How many blocks each token runs."""
    bar = 0.9 * threshold + 0.1 * np.exp(-FADE * pos / max(pos.mean(), 1))
    sure = margin > bar[:, None]
    sure[:, -1] = True
    return sure.argmax(1) + 1
