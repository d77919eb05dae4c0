"""What one neuron does on text: its values, where they are highest and lowest, and whether it fires on its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.analyses.direct_effect import DirectEffect
from workbench.analyses.neuron_map import Side, neuron_site
from workbench.analyses.unit_examples import examples_of, in_text, keys_of, statistics_of
from workbench.analyses.units import Units, units_of
from workbench.analyses.word_statistics import LEAST, TARGETS, WordStatistics, target_ids
from workbench.corpus.corpus import ORDINARY, Corpus
from workbench.errors import UnknownOption
from workbench.model import LanguageModel
from workbench.sites import Site
from workbench.streaming.stream import Stream, stream
from workbench.unit_statistics import UnitStatistics

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

CONTEXT = 16
"""Tokens before and after an example."""
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True, eq=False)
class NeuronText:
    """A neuron on the ordinary tokens of a corpus."""

    statistics: pd.DataFrame
    """A row a side, of its own number (the neuron itself for `down`): side, site, tokens, mean, std, lowest, highest,
    firing_rate (the share of tokens above zero), and values at quantiles (q1, q25, q50, q75, q99)."""
    histogram: np.ndarray
    """Tokens by the neuron's value, in the bins of `workbench.unit_statistics.bin_edges()`."""
    examples: pd.DataFrame
    """Where the neuron is highest and lowest, a row a token: end, rank, activation, document_id, row, pos, token_id, token,
    before, after; and tokens, values and at: the tokens around, the neuron's value on each, and which of them it is."""
    words: pd.DataFrame
    """Does it fire on its words? A row a side, end and target (`current`: at the token; `next`: before it): side, end,
    target, present (how often one of the side's top, or bottom, words stood there), auc (0.5 is chance), correlation; then
    the same neuron with the words of others of its layer: null_median, null_low, null_high (the middle 90 %), null_neurons,
    and p, the share of them (this one among them) as far from 0.5. Null words that stood there fewer than 10 times do not
    count."""
    settings: dict[str, Any]

    def plot(self) -> go.Figure:
        """The histogram of the neuron itself."""
        from workbench.plots.top_activations import plot_values

        return plot_values(self.histogram, self.statistics.set_index("side").loc["down"])


@torch.no_grad()
def neuron_text(
    model: LanguageModel,
    corpus: Corpus,
    layer: int,
    neuron: int,
    words: Mapping[tuple[Side, str], np.ndarray],
    effect: DirectEffect,
    *,
    k: int,
    progress: bool,
) -> NeuronText:
    """Run a corpus through the model once.

    Args:
        words: By side and end, token ids of words: the neuron's own in the first row, others' in those after it.
        effect: What the pass goes by too.
        k: Examples at each end.
    Raises:
        UnknownOption: if no token of the corpus is ordinary.
        BadCorpus, NotFinite, OutOfMemory: as `wb.stream`.
    """
    sites: dict[Side, Site] = {side: neuron_site(model, side, layer) for side, _ in words}
    flow = stream(model, corpus, list(dict.fromkeys([*map(str, sites.values()), *effect.sites])), progress=progress)
    sides = {side: UnitStatistics(1, k, model.device, sample=0) for side in sites}
    negated = UnitStatistics(1, k, model.device, sample=0)
    areas = {key: WordStatistics({"": ids}, model.d_vocab, model.device) for key, ids in words.items()}
    around = _Around()
    for batch in flow:
        chosen = (batch.tokens.stratum == ORDINARY).nonzero()[0]
        at = torch.from_numpy(chosen).to(model.device)
        keys, ids = keys_of(batch.tokens.row, batch.tokens.pos), target_ids(batch.tokens, chosen)
        of_tokens = torch.from_numpy(keys[chosen]).to(model.device)
        for side, site in sites.items():
            values = batch[str(site)][at, neuron].unsqueeze(1).float()
            sides[side].add(values, of_tokens)
            for end in ("top", "bottom"):
                areas[side, end].add(values.expand(-1, areas[side, end].n), ids)
            if side == "down":
                negated.add(-values, of_tokens)
        around.add(keys, batch.tokens.token_id, batch[str(sites["down"])][:, neuron].float().cpu().numpy())
        effect.add(batch, at)
    if not negated.tokens:
        raise UnknownOption(f"None of the {flow.counted.count.tokens:,} tokens of the corpus is ordinary. Take more text.")
    units = {side: units_of(model, site, neuron, None) for side, site in sites.items()}
    statistics = statistics_of(list(units.values()), list(sides.values()), QUANTILES)
    return NeuronText(
        statistics=statistics.drop(columns=["layer", "index"]).assign(side=list(units)),
        histogram=sides["down"].histogram[0].cpu().numpy(),
        examples=_examples(flow, units["down"], sides["down"], negated, around),
        words=_word_table(areas),
        settings=flow.settings
        | {"tokens": negated.tokens, "strata": ["ordinary"], "context": CONTEXT, "null_neurons": areas["down", "top"].n - 1},
    )


class _Around:
    """The neuron's value on every token, so that examples can show it on those around: 16 bytes a token are kept."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray, ids: np.ndarray, values: np.ndarray) -> None:
        self._parts.append((keys, ids.astype(np.int32), values))

    def of(self, row: np.ndarray, pos: np.ndarray, strings: list[str]) -> dict[str, list[Any]]:
        """Columns tokens, values and at, of some tokens."""
        keys, ids, values = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        order = np.argsort(keys)
        keys, ids, values = keys[order], ids[order], values[order]
        here, begins, ends = (np.searchsorted(keys, keys_of(row + i, pos * j)) for i, j in ((0, 1), (0, 0), (1, 0)))
        columns: dict[str, list[Any]] = {"tokens": [], "values": [], "at": []}
        for at, begin, end in zip(here.tolist(), begins.tolist(), ends.tolist(), strict=True):
            around = slice(max(begin, at - CONTEXT), min(end, at + CONTEXT + 1))
            columns["tokens"].append([strings[i] for i in ids[around].tolist()])
            columns["values"].append(values[around].tolist())
            columns["at"].append(at - around.start)
        return columns


def _examples(flow: Stream, unit: Units, highest: UnitStatistics, negated: UnitStatistics, around: _Around) -> pd.DataFrame:
    """The highest tokens of the neuron, and those of its negative: where it is lowest."""
    import pandas as pd

    ends = [examples_of([unit], [one], ()).assign(end=end) for end, one in (("highest", highest), ("lowest", negated))]
    found = in_text(pd.concat(ends, ignore_index=True), flow, CONTEXT)
    found.loc[found["end"] == "lowest", "activation"] *= -1
    found = found.assign(**around.of(found["row"].to_numpy(), found["pos"].to_numpy(), flow.model.token_strings))
    columns = ["end", "rank", "activation", "document_id", "row", "pos", "token_id", "token", "before", "after"]
    return found[[*columns, "tokens", "values", "at"]].astype({"rank": int})


def _word_table(areas: Mapping[tuple[Side, str], WordStatistics]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for (side, end), one in areas.items():
        found = one.found()
        for target in TARGETS:
            present, area, correlation = (found[f"{target}_{what}"] for what in ("present", "auc", "correlation"))
            null = area[1:][present[1:] >= LEAST]
            low, median, high = np.quantile(null, [0.05, 0.5, 0.95]) if len(null) else [np.nan] * 3
            as_far = (np.abs(null - 0.5) >= abs(area[0] - 0.5)).sum()
            rows.append(
                {
                    "side": side, "end": end, "target": target, "present": int(present[0]), "auc": area[0],
                    "correlation": correlation[0], "null_median": median, "null_low": low, "null_high": high,
                    "null_neurons": len(null), "p": (1 + as_far) / (1 + len(null)) if present[0] >= LEAST else np.nan,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)
