"""The tokens of both ends of the vocabulary, for rows that were projected, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.projection import Projection

if TYPE_CHECKING:
    import pandas as pd


def ends_table(where: pd.DataFrame, said: Projection, strings: list[str], score: str) -> pd.DataFrame:
    """Each row of `where` for each end (`up`, then `down`) and rank, with end, rank, token_id, token, and its logit, called as
    `score` says."""
    import pandas as pd

    frames = []
    for end, ids, logits in (("up", said.top_ids, said.top_logits), ("down", said.bottom_ids, said.bottom_logits)):
        width, flat = ids.shape[1], ids.flatten().tolist()
        own = where.loc[where.index.repeat(width)].assign(
            end=end, rank=list(range(width)) * len(where), token_id=flat, token=[strings[i] for i in flat],
            **{score: logits.flatten().cpu().numpy()},
        )  # fmt: skip
        frames.append(own)
    return pd.concat(frames, ignore_index=True)
