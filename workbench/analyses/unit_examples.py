"""What was counted of units over text, as tables: their statistics, and their examples with the text around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.analyses.units import Units
from workbench.streaming.stream import Stream
from workbench.unit_statistics import UnitStatistics, bin_edges

if TYPE_CHECKING:
    import pandas as pd

POS_BITS = 20
"""Of a token's key; the others are its row."""


def keys_of(row: np.ndarray, pos: np.ndarray) -> np.ndarray:
    """A number for each token that says where it is: its row and its position there (int64). Rows follow each other."""
    return (row.astype(np.int64) << POS_BITS) + pos


def examples_of(units: list[Units], running: list[UnitStatistics], quantiles: Sequence[float]) -> pd.DataFrame:
    """The examples by the keys of their tokens."""
    import pandas as pd

    frames = []
    for one, statistics in zip(units, running, strict=True):
        top, keys = statistics.top.cpu().numpy(), statistics.top_keys.cpu().numpy()
        values, order = statistics.sample.sort(dim=1)
        places = [round(q * (values.shape[1] - 1)) for q in quantiles]
        at_quantiles, their_keys = values[:, places].cpu().numpy(), statistics.sample_keys[order[:, places]].cpu().numpy()
        shape = (len(one), top.shape[1] + len(places))
        found = pd.DataFrame(
            {
                "site": str(one.site), "layer": one.site.layer, "index": np.repeat(one.index, shape[1]),
                "kind": np.tile(["top"] * top.shape[1] + ["quantile"] * len(places), len(one)),
                "rank": np.tile([*range(top.shape[1]), *[-1] * len(places)], len(one)),
                "quantile": np.tile([*[np.nan] * top.shape[1], *quantiles], len(one)),
                "activation": np.concatenate([top, at_quantiles], 1).ravel(),
                "key": np.concatenate([keys, their_keys], 1).ravel(),
            }
        )  # fmt: skip
        frames.append(found[found["key"] >= 0])
    return pd.concat(frames, ignore_index=True).astype({"layer": "Int64", "rank": "Int64"}).replace({"rank": {-1: pd.NA}})


def in_text(examples: pd.DataFrame, flow: Stream, context: int) -> pd.DataFrame:
    """The examples with their tokens and the text around, for which the corpus is read, not run, again."""
    import pandas as pd

    keys, which = np.unique(examples["key"].to_numpy(), return_inverse=True)  # many units share a token
    rows, pos = keys >> POS_BITS, keys & ((1 << POS_BITS) - 1)
    wanted, strings = set(rows.tolist()), flow.model.token_strings
    texts = {row.index: row for row in flow.corpus.rows(flow.model) if row.index in wanted}
    columns: dict[str, list[Any]] = {name: [] for name in ("document_id", "token_id", "token", "before", "after")}
    for row, at in zip(rows.tolist(), pos.tolist(), strict=True):
        text = texts[row]
        ids = text.tokens[max(0, at - context) : at + context + 1].tolist()
        here = min(at, context)
        columns["document_id"].append(text.ids[int(text.documents[at])])
        columns["token_id"].append(ids[here])
        columns["token"].append(strings[ids[here]])
        columns["before"].append("".join(strings[i] for i in ids[:here]))
        columns["after"].append("".join(strings[i] for i in ids[here + 1 :]))
    tokens = pd.DataFrame({"row": rows, "pos": pos} | columns)
    order = ["document_id", "row", "pos", "token_id", "token", "before", "after"]
    return pd.concat([examples.drop(columns="key"), tokens.iloc[which][order].reset_index(drop=True)], axis=1)


def statistics_of(units: list[Units], running: list[UnitStatistics], quantiles: Sequence[float]) -> pd.DataFrame:
    """A row a unit: site, layer, index, tokens, mean, std, lowest, highest, firing_rate, and values at quantiles."""
    import pandas as pd

    edges = bin_edges()
    inner = np.concatenate([[edges[1]], (edges[1:-2] + edges[2:-1]) / 2, [edges[-2]]])
    frames = []
    for one, statistics in zip(units, running, strict=True):
        counts = statistics.histogram.cpu().numpy()
        reached = counts.cumsum(1) / statistics.tokens
        frames.append(
            pd.DataFrame(
                {
                    "site": str(one.site), "layer": one.site.layer, "index": one.index, "tokens": statistics.tokens,
                    "mean": statistics.mean.cpu().numpy(), "std": statistics.std.cpu().numpy(),
                    "lowest": statistics.lowest.cpu().numpy(), "highest": statistics.top[:, 0].cpu().numpy(),
                    "firing_rate": statistics.positive.cpu().numpy() / statistics.tokens,
                }
                | {f"q{100 * q:g}": inner[(reached < q).sum(1)] for q in quantiles}
            )
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True).astype({"layer": "Int64"})


def in_context(example: dict[str, Any], width: int = 48) -> str:
    """An example on one line, its token in brackets."""
    before, after = example["before"][-width:], example["after"][:width]
    return f"{'…' if len(example['before']) > width else ''}{before}[{example['token']}]{after}"
