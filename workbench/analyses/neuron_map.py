"""Which neuron speaks for which word: every MLP neuron's weights, read in the vocabulary.

Source: Davies 2025, "Decoding Specialised Feature Neurons in Large Language Models with the LM-Head" (arXiv 2501.02688).
We differ from it where it is silent or misleads: the decoder is named; top and bottom tokens are both given, as a neuron's
sign is free; a token that wins for hundreds of neurons (an attractor) is told from one that a single neuron stands for by
a score with its null, not by the softmax probability, which is nearly flat for most neurons and grows with a row's length.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analyses import neuron_folder
from workbench.analyses.neuron_score import Population, null_scores
from workbench.analyses.neuron_search import Query, search
from workbench.analyses.neuron_table import Decoded, neuron_table
from workbench.errors import MissingWeight, UnknownOption, require_one_of
from workbench.model import LanguageModel
from workbench.projection import Decoder, accumulation_dtype
from workbench.projector import Projector
from workbench.results import Result, versions
from workbench.sites import Site, parse_layers
from workbench.tokens import Match, fold, joined, shown

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from workbench.analyses.map_comparison import MapComparison
    from workbench.analyses.word_activations import WordActivations
    from workbench.corpus.corpus import Corpus

Side = Literal["up", "gate", "down"]
Reading = Literal["raw", "gain"]
Expert = int | Literal["shared"] | None

SIDES: tuple[Side, ...] = ("up", "gate", "down")
_WEIGHTS = {"up": "W_in", "gate": "W_gate", "down": "W_out"}

NULL_QUANTILE = 0.99


@dataclass(frozen=True, eq=False, repr=False)
class NeuronMap(Result):
    """Top and bottom tokens of neurons. `table` has one row a neuron and rank.

    Columns: layer, neuron, side, rank (0 the best), token_id, token, logit, probability (softmax over the vocabulary) and
    score. The score says how many standard deviations more this neuron, scaled to unit norm, speaks for the token than
    the neurons of its side do: an attractor token, which all of them favour, scores low.
    """

    bottom: pd.DataFrame
    """As `table`, for the tokens of the lowest logits (rank 0 the lowest)."""
    null: pd.DataFrame
    """Best score of random directions, one row a side and direction (columns side, score): Gaussian, of the same mean and
    covariance as the side's neurons, decoded in the same way."""
    tokens: list[str]
    """The printable string of every token id."""

    def find(
        self,
        text: str,
        *,
        match: Match = "folded",
        side: Side | None = None,
        layers: str | None = None,
        max_rank: int | None = None,
        bottom: bool = False,
    ) -> pd.DataFrame:
        """Neurons whose top (or bottom) tokens hold this word, best rank and score first.

        Args:
            match: `folded` (space and case do not matter), `exact`, or `regex`; see `workbench.tokens.matching_ids`.
            layers: `7`, `4:8`, `-1`; all, if None.
            max_rank: Only ranks up to this one; 0 is the top token alone.
        Raises:
            UnknownToken: if the text is no token.
            LayerOutOfRange, MissingWeight: if the map does not cover the layer or side.
        """
        import duckdb

        query = Query(text, match, side, layers, max_rank)
        connection = duckdb.connect()
        rows = connection.from_df(self.bottom if bottom else self.table)
        tokens = connection.from_df(neuron_folder.token_table(self.tokens))
        return search(query, rows, tokens, self.settings).df()

    def best(self, *, side: Side | None = None, layers: str | None = None) -> pd.DataFrame:
        """The row of `table` with the highest score, for each neuron; the index is that of `table`."""
        table = self.table
        if side is not None:
            table = table[table["side"] == side]
        if layers is not None:
            table = table[table["layer"].isin(parse_layers(layers, self.settings["n_layers"]))]
        k = self.settings["k"]
        ranks = table["score"].to_numpy().reshape(-1, k).argmax(1)
        return table.iloc[np.arange(len(ranks)) * k + ranks]

    def top_tokens_of(self, rows: pd.DataFrame) -> list[str]:
        """All top tokens in order, on one line, of the neurons that some rows (of `table`, `bottom`, `find`) belong to."""
        import pandas as pd

        k, tokens, keys = self.settings["k"], self.table["token"], ["side", "layer", "neuron"]
        neurons = pd.MultiIndex.from_frame(self.table[keys].iloc[::k].astype({"side": "str"}))
        starts = neurons.get_indexer(pd.MultiIndex.from_frame(rows[keys].astype({"side": "str"}))) * k
        return [joined(tokens.iloc[start : start + k]) for start in starts]

    def specialised(
        self, n: int = 20, *, side: Side | None = None, layers: str | None = None, per_layer: int | None = None
    ) -> pd.DataFrame:
        """The n neurons that stand out most for one word, each word (folded) once a side.

        Args:
            per_layer: At most this many neurons of each layer (and each word once a side and layer); without it the last
                layers fill the list.

        Columns: layer, neuron, side, token (of the highest score among the top ones), score, probability, rank,
        shared_by (how many neurons of the side have it as top token) and tokens, all top tokens in order.
        """
        best = self.best(side=side, layers=layers).sort_values("score", ascending=False, kind="stable")
        same = ["side", "word"] if per_layer is None else ["side", "layer", "word"]
        best = best[~best.assign(word=best["token"].map(fold)).duplicated(same)]
        if per_layer is not None:
            best = best[best.groupby("layer").cumcount() < per_layer]
        best = best.head(n)
        shared = self.shared_tokens().set_index(["side", "token_id"])["neurons"]
        counts = [shared.get((side, token), 0) for side, token in zip(best["side"], best["token_id"], strict=True)]
        found = best.assign(shared_by=counts, tokens=self.top_tokens_of(best)).reset_index(drop=True)
        return found[["layer", "neuron", "side", "token", "score", "probability", "rank", "shared_by", "tokens"]]

    def shared_tokens(self) -> pd.DataFrame:
        """How many neurons of each side share a top token, most shared (the attractors) first.

        Columns: side, token_id, token, neurons.
        """
        top = self.table[self.table["rank"] == 0]
        counts = top.groupby(["side", "token_id", "token"], observed=True).size().rename("neurons").reset_index()
        return counts.sort_values("neurons", ascending=False, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """A row a side: how many neurons score above the null's 99 % quantile, where chance alone gives 1 %.

        Columns: side, neurons, threshold, above_fraction, null_fraction, median_score, null_median_score,
        distinct_top_tokens, commonest (the most shared top token) and its share, commonest_fraction.
        """
        import pandas as pd

        shared, rows = self.shared_tokens(), []
        for side in self.settings["sides"]:
            own, null = self.best(side=side)["score"], self.null.loc[self.null["side"] == side, "score"]
            threshold = null.quantile(NULL_QUANTILE)
            top = shared[shared["side"] == side]
            rows.append(
                {
                    "side": side,
                    "neurons": len(own),
                    "threshold": threshold,
                    "above_fraction": (own > threshold).mean(),
                    "null_fraction": 1 - NULL_QUANTILE,
                    "median_score": own.median(),
                    "null_median_score": null.median(),
                    "distinct_top_tokens": len(top),
                    "commonest": top["token"].iloc[0],
                    "commonest_fraction": top["neurons"].iloc[0] / len(own),
                }
            )
        return pd.DataFrame(rows)

    def shares(self) -> pd.DataFrame:
        """The share of each layer's neurons above the null's 99 % quantile: columns side, layer, above_fraction."""
        best = self.best().merge(self.summary()[["side", "threshold"]], on="side")
        best["above_fraction"] = best["score"] > best["threshold"]
        return best.groupby(["side", "layer"], observed=True)["above_fraction"].mean().reset_index()

    def with_activations(self, model: LanguageModel, corpus: Corpus | Any, **options: Any) -> WordActivations:
        """Does each neuron fire on the words that it decodes to? See `workbench.analyses.word_activations`."""
        from workbench.analyses.word_activations import word_activations

        return word_activations(self, model, corpus, **options)

    def compare(self, other: NeuronMap, **options: Any) -> MapComparison:
        """How many neurons keep their words in another model? See `workbench.analyses.map_comparison`."""
        from workbench.analyses.map_comparison import compare_maps

        return compare_maps(self, other, **options)

    def plot(self) -> go.Figure:
        """The best score of every neuron by layer, and the share above the null."""
        from workbench.plots.neuron_map import plot_neuron_map

        return plot_neuron_map(self)

    def save(self, folder: str | Path) -> Path:
        """Write neurons.parquet, neurons_bottom.parquet, null.parquet, tokens.parquet and, last, run.json.

        Parts of the job that made the map, if they were kept in this folder, are removed then.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        written = neuron_folder.write(Path(folder), self.table, self.bottom, self.null, self.tokens, self.settings)
        neuron_folder.remove_parts(written)
        return written

    @classmethod
    def load(cls, folder: str | Path) -> NeuronMap:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no complete neuron map.
        """
        table, bottom, null, tokens, settings = neuron_folder.read(Path(folder))
        return cls(table=table, settings=settings, bottom=bottom, null=null, tokens=tokens)

    def __str__(self) -> str:
        sides = ", ".join(self.settings["sides"])
        lines = [f"NeuronMap of {self.settings['model']}: {self.settings['neurons']:,} neurons, sides {sides}"]
        for row in self.summary().itertuples():
            lines.append(
                f"  {row.side:<5}{row.above_fraction:6.1%} score above {row.threshold:.1f} (random directions: "
                f"{row.null_fraction:.0%}); commonest top token {shown(str(row.commonest))!r}, of {row.commonest_fraction:.1%}"
            )
        lines += [
            f"  {row.side:>5} {row.layer}.{row.neuron:<6}{row.score:6.1f}  {row.tokens}"
            for row in self.specialised(10).itertuples()
        ]
        return "\n".join([*lines, "  .table .bottom .find('dog') .specialised(20) .summary() .plot() .save(folder)"])

    def _repr_html_(self) -> str:
        head = f"<b>NeuronMap</b> of {self.settings['model']}: {self.settings['neurons']:,} neurons"
        return f"{head}{self.summary().to_html(index=False)}{self.specialised(10).to_html(index=False)}"


def map_neurons(
    model: LanguageModel,
    *,
    side: Side | Sequence[Side] | Literal["all"] = "up",
    layers: str | None = None,
    part: str = "mlp",
    k: int = 10,
    reading: Reading = "raw",
    decoder: Decoder = "none",
    seed: int = 0,
    parts: str | Path | None = None,
    progress: bool = True,
) -> NeuronMap:
    """Decode MLP neurons through the LM head.

    Args:
        side: `up` and `gate` are what a neuron reads (rows of W_in, W_gate), `down` what it writes (rows of W_out);
            `all` is every side that the model has.
        layers: `7`, `4:8`, `0,5,10:12`; all, if None.
        part: `mlp`; or, in layers that are mixtures of experts, `experts.3` or `experts.shared`.
        k: Top and bottom tokens a neuron.
        reading: `gain` scales up and gate rows by the gain of the norm that feeds the MLP: the direction of the residual
            stream that the neuron responds to.
        decoder: How rows meet the vocabulary; see `workbench.vocabulary.Vocabulary`.
        seed: Of the random directions of the null.
        parts: Folder where finished layers are kept, so that a job that was stopped goes on. Saving the map to the same
            folder removes them.
    Raises:
        MissingWeight: if a layer lacks the part or side, or `reading="gain"` is asked for `down`.
        LayerOutOfRange: if the model has no such layer.
    """
    require_one_of("reading", reading, get_args(Reading))
    require_one_of("decoder", decoder, get_args(Decoder))
    if k < 1:
        raise UnknownOption(f"k={k} tokens a neuron were asked for. Ask for one or more.")
    chosen, k = parse_layers(layers, model.n_layers), min(k, model.d_vocab)
    expert = _expert(model, part, chosen)
    sides = _sides(model, side, chosen, expert)
    if reading == "gain" and "down" in sides:
        raise MissingWeight(
            "reading='gain' scales what a neuron reads, but side 'down' is what it writes. Use reading='raw' for it."
        )
    started = time.perf_counter()
    n_neurons = sum(_n_neurons(model, layer, expert) for layer in chosen)
    settings: dict[str, Any] = model.provenance | {
        "sides": list(sides), "layers": chosen, "part": part, "k": k, "reading": reading, "decoder": decoder, "seed": seed,
        "n_layers": model.n_layers, "neurons": n_neurons, "versions": versions(),
    }  # fmt: skip
    projector, home = Projector(model.vocabulary, decoder, k, k), model.weight("W_U").device  # layers may lie on others
    kept = None if parts is None else neuron_folder.Parts(Path(parts), settings)
    tops, bottoms, nulls, engine = [], [], [], None
    with tqdm(total=len(sides) * len(chosen), desc="map neurons", unit="layer", disable=not progress) as bar:
        for one in sides:

            def rows(layer: int, one: Side = one) -> Tensor:
                return neuron_rows(model, one, layer, reading, expert).to(home)

            population = Population(model.vocabulary, decoder, rows, chosen)
            for layer in chosen:
                own = rows(layer)
                found = None if kept is None else kept.get(one, layer)
                if found is None:
                    found = projector(own)
                    engine = projector.engine
                    if kept is not None:
                        kept.put(one, layer, found)
                tops.append(Decoded.top(one, layer, found, population, own))
                bottoms.append(Decoded.bottom(one, layer, found, population, own))
                bar.update()
            nulls.append(null_scores(population, projector, one, seed))
    import pandas as pd

    settings |= {"engine": engine, "seconds": round(time.perf_counter() - started, 2)}
    return NeuronMap(
        table=neuron_table(tops, SIDES, model.token_strings),
        settings=settings,
        bottom=neuron_table(bottoms, SIDES, model.token_strings),
        null=pd.concat(nulls, ignore_index=True),
        tokens=model.token_strings,
    )


def neuron_site(model: LanguageModel, side: Side, layer: int) -> Site:
    """Where a side of a layer's neurons is a number a token: its projection's output, or for `down` the neurons themselves."""
    if side == "down":
        return Site("mlp_post", layer)
    return Site("mlp_up" if side == "up" and model.block_row(layer).is_gated else "mlp_pre", layer)


@torch.no_grad()
def neuron_rows(
    model: LanguageModel, side: Side, layer: int, reading: Reading = "raw", expert: Expert = None
) -> Float[Tensor, "d_mlp d_model"]:
    """The weights of a layer's neurons, or of one expert's, on one side, a row a neuron."""
    weight = model.weight(_WEIGHTS[side], layer, expert=expert).detach()
    rows = weight if side == "down" else weight.T
    if reading == "raw":
        return rows
    dtype = accumulation_dtype(rows)  # a product rounded to bfloat16 would reorder near-ties
    return rows.to(dtype) * model.weight("ln2.w", layer).detach().to(dtype)


def expert_of(part: str) -> Expert:
    """What a part's name says: `mlp` is of no expert.

    Raises:
        UnknownOption: if it is spelled otherwise.
    """
    match = re.fullmatch(r"mlp|experts\.(\d+|shared)", str(part))
    if match is None:
        raise UnknownOption(f"part={part!r} is not known. Use 'mlp', 'experts.0' (any number) or 'experts.shared'.")
    if match[1] is None:
        return None
    return "shared" if match[1] == "shared" else int(match[1])


def _n_neurons(model: LanguageModel, layer: int, expert: Expert) -> int:
    """Without reading a weight, where the layer has neurons at a site."""
    if expert is not None:
        return len(neuron_rows(model, "down", layer, expert=expert))
    width = model.axes(Site("mlp_post", layer))["d_mlp"]
    assert width is not None
    return width


def _expert(model: LanguageModel, part: str, layers: list[int]) -> Expert:
    """The expert that a part names; None for `mlp`.

    Raises:
        UnknownOption: if the part is spelled otherwise.
        MissingWeight: if a layer does not have it; the text says which layers do.
    """
    expert = expert_of(part)
    blocks = {layer: model.block_row(layer) for layer in range(model.n_layers)}
    having = [layer for layer, block in blocks.items() if (block.experts is not None) == (expert is not None)]
    if lacking := [layer for layer in layers if layer not in having]:
        mixture = f"a mixture of {model.n_experts} experts, whose parts are 'experts.0' and so on"
        kind = mixture if expert is None else "no mixture of experts"
        have = f"has it: layers={','.join(map(str, having))!r}" if having else "none has it"
        raise MissingWeight(
            f"part={part!r} cannot be mapped in layer {', '.join(map(str, lacking[:8]))} of {model.name!r}: it is {kind}. "
            f"Of its layers {have}."
        )
    return expert


def _sides(
    model: LanguageModel, side: Side | Sequence[Side] | Literal["all"], layers: list[int], expert: Expert
) -> tuple[Side, ...]:
    gated = expert is not None or all(model.block_row(layer).is_gated for layer in layers)
    has: tuple[Side, ...] = tuple(one for one in SIDES if one != "gate" or gated)
    if side == "all":
        return has
    asked: tuple[str, ...] = (side,) if isinstance(side, str) else tuple(side)
    if not asked:
        raise UnknownOption(f"No side was asked for. Sides here: {', '.join(has)}, all.")
    for one in asked:
        if one not in has:
            reason = "its MLP is not gated" if one == "gate" else "there is no such side"
            raise MissingWeight(
                f"Side {one!r} cannot be mapped in {model.name!r}: {reason}. Sides here: {', '.join(has)}, all."
            )
    return tuple(one for one in SIDES if one in asked)
