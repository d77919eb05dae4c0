"""What it costs to replace attention, the MLPs or the norms of the last blocks by their best linear maps.

Source: Yom Din et al. 2024, "Jump to Conclusions" (arXiv 2303.09435), who replace one kind of sub-module in all blocks from
l to the last at once, and find attention the most tolerant. A cost alone says little: a sub-module may be replaceable because
it is linear, or because nobody needs it. So beside each map stand two nulls: the mean of what the sub-module gives, whatever
it reads (what a map gains over it, it owes to its input), and nothing at all.

We differ in this: the cost is the change of the loss on documents that no map was fitted on, with KL and agreement of the
likeliest token (their precision at 1) beside it; maps have an intercept and are ridge, where theirs are least squares without
(`kind="ols", affine=False`); they are fitted on all ordinary tokens, where they draw one a sentence; and the first four
positions, on which attention rests, are left alone, where they replace at all (`positions="all"`). As theirs, maps are fitted
on the untouched model, so in later blocks they read what they were not fitted on. To norms that is fatal: maps explain 98 % of
what those of SmolLM2-135M give on other documents, but bound nothing, and with them from block 10 on the stream of a quarter of
all tokens grows until it overflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm.auto import tqdm

from workbench.analyses.held_out_change import HeldOut
from workbench.analyses.held_out_loss import held_out_rows
from workbench.analyses.submodules import MODES, WAYS, Mode, StandIns, pairs_of
from workbench.artifacts import read_tables, write_tables
from workbench.collecting import collect_moments
from workbench.corpus.corpus import EARLY_UNTIL, Corpus
from workbench.errors import TooFewTokens, UnknownOption, UnknownSite, require_one_of
from workbench.model import LanguageModel
from workbench.results import Result, wrapped
from workbench.sites import parse_layers
from workbench.substitution import substitute
from workbench.transports.fit import Recipe
from workbench.transports.transport import Transport

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from workbench.moments.layout import Pair

KIND = "shortcuts"


@dataclass(frozen=True, eq=False, repr=False)
class Shortcuts(Result):
    """`table` has a row a first layer, mode (attention, mlp, norms) and way (map, mean, zero): what becomes of the model when
    the sub-modules of all blocks from that layer on are replaced.

    change: of the loss, nats a token. kl_nats: KL(untouched || changed), a token. agreement: how often the likeliest token
    stays. Each with its standard error over documents: change_error, kl_error, agreement_error. overflowed: the share of tokens
    whose last state is no number any more; if there are any, change and kl_nats are infinite. restored: the share of what the
    mean costs that this does not.

    `fits` has a row a map: layer, mode, source, target, n (tokens of the fit), strength, in_sample, held_out (R², weighted by
    variance).
    """

    fits: pd.DataFrame

    def overview(self) -> pd.DataFrame:
        """Cost by first layer, nats a token, in a column for each mode and way: attention, attention_mean, attention_zero, …"""
        table = self.table.assign(
            name=[row.mode if row.way == "map" else f"{row.mode}_{row.way}" for row in self.table.itertuples()]
        )
        names = list(dict.fromkeys(table["name"]))
        return table.pivot(index="layer", columns="name", values="change")[names].rename_axis(columns=None).reset_index()

    def paragraph(self) -> str:
        """What the numbers mean, in words."""
        from workbench.analyses.shortcuts_text import paragraph

        return paragraph(self)

    def plot(self) -> go.Figure:
        """Cost and agreement by the first block that is replaced, a line a mode, nulls dashed."""
        from workbench.plots.shortcuts import plot_shortcuts

        return plot_shortcuts(self)

    def save(self, folder: str | Path) -> Path:
        """Write shortcuts.parquet, fits.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return write_tables(folder, KIND, self.settings, {KIND: self.table, "fits": self.fits})

    @classmethod
    def load(cls, folder: str | Path) -> Shortcuts:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        table, others, settings = read_tables(folder, KIND, "workbench shortcuts", ("fits",))
        fits = others["fits"]
        assert fits is not None
        return cls(table=table, settings=settings, fits=fits)

    def __str__(self) -> str:
        lines = self.overview().round(3).to_string(index=False, max_rows=12)
        return f"{wrapped(self.paragraph())}\n\n{lines}\n  .table .fits .overview() .plot() .save(folder)"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.paragraph())}</p>{self.overview().round(3).to_html(index=False)}"


def shortcuts(
    model: LanguageModel,
    corpus: Corpus | Any,
    *,
    modes: Sequence[str] | None = None,
    layers: str | None = None,
    stride: int | None = None,
    positions: Literal["later", "all"] = "later",
    kind: Literal["ridge", "ols"] = "ridge",
    affine: bool = True,
    nulls: bool = True,
    loss_tokens: int = 2048,
    batch_tokens: int | None = None,
    massive_at: str | None = "middle",
    progress: bool = True,
) -> Shortcuts:
    """Replace attention, MLPs or norms in all blocks from each layer to the last by their best linear maps, and measure what
    becomes of the output.

    Each sub-module is mapped from its own input to its own output: attention and MLP from their norm's output (or the stream,
    where they read it as it is) to what they add to the stream, a norm from the stream. Maps are fitted on documents with an
    even ordinal, from one pass, and the output is measured on those with an odd one. The sums of a block are 40 float64
    matrices of d_model x d_model (106 MB in the embedded model); where that is too much, ask for one mode after the other.

    Args:
        modes: Some of `attention`, `mlp`, `norms`; if None, those that every block has.
        layers: First blocks to replace, as `parse_layers` reads them.
        stride: In their stead every so-manieth block from 0, and the last; every one, if both are None.
        positions: `later`, from the fifth of a row on, with maps of ordinary tokens, or `all`, with maps of all.
        kind: `ridge`, its strength by generalised cross-validation, or `ols`.
        affine: With an intercept. (Published are maps without, of `ols`.)
        nulls: Also replace by the mean and by nothing: well over half of the cost.
        loss_tokens: Held-out tokens that the output is measured on; each first layer, mode and way runs the model over them,
            from that layer on.
        batch_tokens, massive_at: As in `stream`.
    Raises:
        TooFewTokens: if least squares has too few tokens, or no document is held out, or none reaches the fifth position.
        UnknownSite: for a mode that a block does not have.
        OutOfMemory, LayerOutOfRange, UnknownOption, BadCorpus, NotFinite: as `collect_moments`.
    """
    import pandas as pd

    first = _first_layers(layers, stride, model.n_layers)
    require_one_of("positions", positions, ("later", "all"))
    require_one_of("kind", kind, ("ridge", "ols"))
    if loss_tokens < 2:
        raise UnknownOption(f"loss_tokens={loss_tokens}: the loss is measured on 2 tokens or more.")
    replaced = range(min(first), model.n_layers)
    pairs = _pairs(model, modes, replaced)
    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    rows = held_out_rows(corpus, model, loss_tokens)
    if positions == "later" and max(map(len, rows)) <= EARLY_UNTIL:
        raise TooFewTokens(
            f"No held-out row has more than {EARLY_UNTIL} tokens, so nothing would be replaced. Take longer texts, or "
            "positions='all'."
        )
    moments = collect_moments(
        model, corpus, [], [str(pair) for by_layer in pairs.values() for own in by_layer.values() for pair in own],
        detail="two", folds=2, batch_tokens=batch_tokens, massive_at=massive_at, progress=progress,
    )  # fmt: skip
    standing = StandIns(model, moments, "all" if positions == "all" else "ordinary", Recipe(kind, affine=affine))
    for by_layer in pairs.values():
        standing.require_tokens(by_layer[replaced[0]][0])  # before the fits begin: every pair has the same tokens
    held_out = HeldOut(model, rows, batch_tokens)
    skip = EARLY_UNTIL if positions == "later" else 0
    fits: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for mode, by_layer in pairs.items():
        for way in WAYS[mode] if nulls else ("map",):
            own: dict[int, list[Transport]] = {layer: [] for layer in by_layer}
            for layer, several in tqdm(by_layer.items(), desc=f"{mode} {way}, fit", disable=not progress):
                for pair in several:
                    if way != "map":
                        own[layer].append(standing.constant(pair, way))
                        continue
                    fitted, row = standing.fitted(pair)
                    own[layer].append(fitted)
                    fits.append({"layer": layer, "mode": mode} | row)
            for layer in tqdm(first, desc=f"{mode} {way}", disable=not progress):
                maps = [one for later in range(layer, model.n_layers) for one in own[later]]
                change = held_out.under(substitute(model, *maps, skip=skip), since=layer)
                found.append({"layer": layer, "mode": mode, "way": way} | change._asdict())
    settings = {name: value for name, value in moments.settings.items() if name not in ("corpus_parts", "seed")} | {
        "d_model": model.d_model, "modes": list(pairs), "layers": first, "positions": positions, "fit": kind, "affine": affine,
        "nulls": nulls, "loss_tokens": loss_tokens, "clean_loss": float(held_out.nats.mean()),
        "held_out_tokens": len(held_out.nats), "held_out_documents": len(np.unique(held_out.document)),
    }  # fmt: skip
    return Shortcuts(table=_with_restored(pd.DataFrame(found)), settings=settings, fits=pd.DataFrame(fits))


def _first_layers(layers: str | None, stride: int | None, n_layers: int) -> list[int]:
    if layers is not None and stride is not None:
        raise UnknownOption(f"layers={layers!r} and stride={stride} both say which blocks to begin at. Give one of them.")
    if stride is not None and stride < 1:
        raise UnknownOption(f"stride={stride}: every so-manieth block is 1 or more.")
    return parse_layers(layers, n_layers) if stride is None else sorted({*range(0, n_layers, stride), n_layers - 1})


def _pairs(model: LanguageModel, modes: Sequence[str] | None, layers: Sequence[int]) -> dict[Mode, dict[int, list[Pair]]]:
    """By mode and layer.

    Raises:
        UnknownSite: if a mode was asked for by name that a block does not have.
        UnknownOption: for a mode that there is not.
    """
    for mode in modes or ():
        require_one_of("modes", mode, MODES)
    if modes is not None and not modes:
        raise UnknownOption(f"modes=[]: there is nothing to replace. Use some of {', '.join(MODES)}.")
    found: dict[Mode, dict[int, list[Pair]]] = {}
    for mode in MODES:
        if modes is not None and mode not in modes:
            continue
        try:
            found[mode] = {layer: pairs_of(model, layer, mode) for layer in layers}
        except UnknownSite:
            if modes is not None:
                raise
    return found


def _with_restored(table: pd.DataFrame) -> pd.DataFrame:
    """With the share of what the mean costs that another way does not; nan where the mean costs nothing, or was not tried."""
    mean = table[table["way"] == "mean"].set_index(["layer", "mode"])["change"]
    costs = mean.where(mean > 0).reindex(list(zip(table["layer"], table["mode"], strict=True)))
    return table.assign(restored=1 - table["change"].to_numpy() / costs.to_numpy())
