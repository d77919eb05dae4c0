"""On which tokens is a unit most active, and how often? Examples and statistics of thousands of units in one pass.

A list of top examples alone misleads (Bolukbasi et al. 2021, arXiv 2104.07143): the highest hundredth may show one thing and
the rest another. So each unit has examples at quantiles of its distribution too, and its histogram. Tokens at the beginning of
a row and of massive norm, where most units are far off, are left out unless asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analyses import unit_folder
from workbench.analyses.unit_examples import examples_of, in_context, in_text, keys_of, statistics_of
from workbench.analyses.units import units_of
from workbench.corpus.corpus import STRATA, Corpus, stratum_indices
from workbench.errors import UnknownOption
from workbench.model import LanguageModel
from workbench.results import Result, versions
from workbench.sites import parse_sites
from workbench.streaming.stream import stream
from workbench.unit_statistics import UnitStatistics

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

QUANTILES = (0.5, 0.75, 0.9, 0.99)
_UNITS_SHOWN, _EXAMPLES_SHOWN = 3, 5


@dataclass(frozen=True, eq=False, repr=False)
class TopActivations(Result):
    """Examples of each unit: `table` has one row an example.

    Columns: site, layer, index (of the neuron, head or direction), kind (`top` or `quantile`), rank (0 the highest), quantile,
    activation, document_id, row, pos, token_id, token, before and after (the text around it in its row). Examples at quantiles
    come from a random sample of 1,024 tokens, the same for all units.
    """

    statistics: pd.DataFrame
    """A row a unit: site, layer, index, tokens, mean, std, lowest, highest, firing_rate (the share of tokens above zero), and
    values at quantiles (q50, …: the middle of a histogram bin)."""
    histogram: np.ndarray
    """Tokens by unit (in the order of `statistics`) and bin of `workbench.unit_statistics.bin_edges()`."""

    def examples(self, index: int, *, site: str | None = None) -> pd.DataFrame:
        """The examples of one unit: those at the top, best first, then those at quantiles.

        Raises:
            UnknownOption: if the unit is not among those looked at, or there are several sites and none was named.
        """
        return self.table[self._of(self.table, index, site)].reset_index(drop=True)

    def plot(self, index: int, *, site: str | None = None) -> go.Figure:
        """The histogram of one unit, with its examples where they lie."""
        from workbench.plots.top_activations import plot_unit

        own = self._of(self.statistics, index, site)
        return plot_unit(self, self.statistics[own].iloc[0], self.examples(index, site=site), self.histogram[own.to_numpy()][0])

    def save(self, folder: str | Path) -> Path:
        """Write examples.parquet, statistics.parquet, histograms.safetensors and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return unit_folder.write(Path(folder), self.table, self.statistics, self.histogram, self.settings)

    @classmethod
    def load(cls, folder: str | Path) -> TopActivations:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        table, statistics, histogram, settings = unit_folder.read(Path(folder))
        return cls(table=table, settings=settings, statistics=statistics, histogram=histogram)

    def __str__(self) -> str:
        own = self.settings
        lines = [
            f"TopActivations of {own['model']} over {own['tokens']:,} tokens of {own['corpus']} ({', '.join(own['strata'])}): "
            f"{len(self.statistics):,} units of {', '.join(own['sites'])}"
        ]
        for unit in self.statistics.head(_UNITS_SHOWN).to_dict("records"):
            lines.append(
                f"\n{unit['site']} {unit['index']}: mean {unit['mean']:.3g}, std {unit['std']:.3g}, "
                f"above zero on {unit['firing_rate']:.1%} of tokens"
            )
            best = self.examples(unit["index"], site=unit["site"]).head(_EXAMPLES_SHOWN)
            lines += [f"{row['activation']:>10.3g}  {in_context(row)}" for row in best.to_dict("records")]
        return "\n".join(lines)

    def _of(self, table: pd.DataFrame, index: int, site: str | None) -> pd.Series:
        sites = self.settings["sites"]
        if site is None and len(sites) > 1:
            raise UnknownOption(f"Several sites were looked at. Name one with site=: {', '.join(sites)}.")
        chosen = sites[0] if site is None else str(parse_sites([site], self.settings["n_layers"])[0])
        own = (table["site"] == chosen) & (table["index"] == index)
        if not own.any():
            raise UnknownOption(f"Unit {index} of '{chosen}' was not looked at. Sites are {', '.join(sites)}.")
        return own


def top_activations(
    model: LanguageModel,
    corpus: Corpus | Any,
    site: str | Sequence[str],
    index: int | Sequence[int] | None = None,
    *,
    directions: Float[Tensor, "unit d"] | None = None,
    k: int = 20,
    quantiles: Sequence[float] = QUANTILES,
    strata: str | Sequence[str] = ("ordinary",),
    context: int = 16,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> TopActivations:
    """Run a corpus through the model once, and find where each unit is most active.

    Args:
        corpus: A `Corpus`, or what one is made of.
        site: One or several. The units of `mlp_post` are neurons; of sites with heads, heads, whose number is the length of the
            head's vector; of others, coordinates.
        index: Which of them; all, if None.
        directions: In their place the products of the site's tensor with these, one unit a row.
        k: Top examples of a unit.
        quantiles: Where in a unit's distribution further examples are taken, 0 to 1.
        strata: Kinds of tokens that count; see `workbench.corpus.corpus.STRATA`.
        context: Tokens before and after an example.
        seed: Of the sample of tokens.
    Raises:
        UnknownSite, LengthMismatch, UnknownOption: if there is no such unit.
        UnknownOption: for other options out of range, or if no token is of the strata.
        BadCorpus, NotFinite, OutOfMemory: as `wb.stream`.
    """
    wanted = stratum_indices(strata)
    kinds = [STRATA[i] for i in wanted]
    if k < 1 or context < 0 or not all(0 <= q <= 1 for q in quantiles):
        raise UnknownOption(
            f"k={k}, context={context}, quantiles={quantiles}: k is 1 or more, context 0 or more, quantiles 0 to 1."
        )
    started = time.perf_counter()
    flow = stream(model, corpus, site, batch_tokens=batch_tokens, progress=progress)
    units = [units_of(model, one, index, directions) for one in flow.sites]
    running = [UnitStatistics(len(one), k, model.device, seed=seed) for one in units]
    seen = 0
    for batch in flow:
        chosen = np.isin(batch.tokens.stratum, wanted)
        keys = torch.from_numpy(keys_of(batch.tokens.row, batch.tokens.pos)[chosen]).to(model.device)
        at = None if chosen.all() else torch.from_numpy(chosen.nonzero()[0]).to(model.device)
        for one, statistics in zip(units, running, strict=True):
            kept = batch[str(one.site)]
            statistics.add(one.values(kept if at is None else kept.index_select(0, at)), keys)
        seen += batch.tokens.n
    if running[0].tokens == 0:
        raise UnknownOption(f"None of the {seen:,} tokens is of the strata {', '.join(kinds)}. Take others, or more text.")
    examples = examples_of(units, running, quantiles)
    settings = model.provenance | flow.settings | {
        "n_layers": model.n_layers, "strata": kinds, "tokens": running[0].tokens, "k": k, "quantiles": list(quantiles),
        "context": context, "seed": seed, "units": units[0].kind, "versions": versions(),
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip
    return TopActivations(
        table=in_text(examples, flow, context),
        settings=settings,
        statistics=statistics_of(units, running, quantiles),
        histogram=torch.cat([one.histogram for one in running]).cpu().numpy(),
    )
