"""Was a feature carried here, or computed on the way? Linear maps between states, scored direction by direction.

Source: Szablewski and Masiak 2025 (arXiv 2508.17540), "Activation Transport Operators". They fit a ridge map for each pair from
stored activations, 41 fits a pair; here one pass of moments gives every pair. What their recipe leaves open is shown beside it:
each metric with its own best truncation (`transport_pairs`), ceilings and sizes held out and above their nulls
(`workbench.transports.canonical`), scores on all tokens beside those on active ones (`transport_tokens`), scores weighed by
what the output or the next block reads (`transport_metrics`), other tokens as sources (`transport_routes`), and what the model
loses beside ablations that are not zeros (`transport_damage`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, get_args

from tqdm.auto import tqdm

from workbench.analyses.transport_damage import damage_rows, first_split
from workbench.analyses.transport_directions import Asked, choose, direction_rows
from workbench.analyses.transport_metrics import FISHER_TOKENS, fisher, readers
from workbench.analyses.transport_pairs import curve_rows, held_out, pair_row
from workbench.analyses.transport_routes import route_rows
from workbench.analyses.transport_tokens import TokenScores
from workbench.artifacts import read_tables, write_tables
from workbench.collecting import Pairs, collect_moments
from workbench.corpus.corpus import Corpus
from workbench.errors import TooFewTokens, UnknownOption, require_one_of
from workbench.model import LanguageModel
from workbench.moments.layout import Pair
from workbench.moments.moments import Moments, Strata
from workbench.results import Result
from workbench.sites import Site, depth, parse_pair, state_number
from workbench.streaming.stream import stream
from workbench.transports.fit import Fitting, Recipe
from workbench.transports.solving import Metric

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "transport"
TABLES = ("transport", "curves", "directions", "routes", "damage")
CLOSELY = 16
"""Pairs that are looked at closely (curves, directions, intervals), if it was not said whether to."""
DIRECTIONS: tuple[str, ...] = ("principal:32", "unembedding:32", "neurons:32", "random:32")
Weight = Literal["fisher", "readers"]


@dataclass(frozen=True, eq=False, repr=False)
class TransportScores(Result):
    """`table` has a row a pair and strata: source, target, from, to (states, if they are any), distance, strata, n, and

    - in_sample, adjusted, held_out, null (shuffled documents): R², variance-weighted; low, high: 95 % of held_out over
      documents;
    - whitened_in_sample, whitened_held_out, whitened_null: R² with the target whitened; ceiling_in_sample, as published: what
      no map can exceed on the rows of the fit; ceiling: what the map's canonical directions explain of other documents, with
      the best slopes there; efficiency: whitened_held_out / ceiling;
    - fisher, readers (and _null): R² weighed by what the output, or the next block, depends on;
    - size_published, size_null: the participation ratio of canonical correlations, and of those of shuffled documents; size: of
      those alone that exceed, on rows they were not fitted on, every shuffled one (null_edge); correlations_above_null: how
      many;
    - kept_source, kept_target: directions above the precision of the sums; freedom, strength: of the map.

    `curves`: R² by rank (`transport_pairs.curve_rows`). `directions`: a row a direction (`transport_directions`, and from the
    second pass `transport_tokens`). `routes`, `damage`: as their modules say. None where they were not asked for.
    """

    curves: pd.DataFrame | None
    directions: pd.DataFrame | None
    routes: pd.DataFrame | None
    damage: pd.DataFrame | None

    def matrix(self, column: str = "held_out", strata: Strata | None = None) -> pd.DataFrame:
        """A score as a square, sources down and targets across, by state.

        Raises:
            UnknownOption: if there is no such column, or pairs are not of states.
        """
        table = self._of(strata)
        if column not in table or table["from"].isna().any():
            raise UnknownOption(f"column={column!r}: pairs of states have {', '.join(table.select_dtypes('number'))}.")
        return table.pivot(index="from", columns="to", values=column)

    def decay(self, strata: Strata | None = None) -> pd.DataFrame:
        """Scores by distance, mean over pairs: columns distance, pairs, held_out, null, efficiency, size."""
        table = self._of(strata)
        wanted = [name for name in ("held_out", "null", "efficiency", "fisher", "readers", "size") if name in table]
        groups = table.groupby("distance")
        return groups[wanted].mean().assign(pairs=groups.size()).reset_index()

    def plot(self, column: str = "held_out") -> go.Figure:
        """Pairs of states as a heatmap: under the cursor, and in `customdata`, the pair as `4>8` and its other scores.

        Raises:
            UnknownOption: if there is no such column, or pairs are not of states.
        """
        from workbench.plots.transport import plot_matrix

        return plot_matrix(self, column)

    def plot_curves(self) -> go.Figure:
        """R² over ranks, a column a pair and a row a metric: each metric's best truncation, the published one, and ceilings.

        Raises:
            UnknownOption: if there are none.
        """
        from workbench.plots.transport import plot_curves

        return plot_curves(self, self._closely("curves"))

    def plot_decay(self) -> go.Figure:
        """Scores by distance, a line a source."""
        from workbench.plots.transport import plot_decay

        return plot_decay(self)

    def plot_directions(self) -> go.Figure:
        """Each direction: how well it is carried where it is active, against all tokens.

        Raises:
            UnknownOption: if no directions were scored.
        """
        from workbench.plots.transport import plot_directions

        return plot_directions(self, self._closely("directions"))

    def figures(self) -> dict[str, go.Figure]:
        """All pictures that this result has, by name."""
        of_states = not self.table["from"].isna().any()
        found = {"transport": self.plot(), "decay": self.plot_decay()} if of_states else {}
        if self.settings["closely"]:
            found |= {"curves": self.plot_curves(), "directions": self.plot_directions()}
        return found

    def paragraph(self) -> str:
        """What the numbers mean, in words."""
        from workbench.analyses.transport_text import paragraph

        return paragraph(self)

    def save(self, folder: str | Path) -> Path:
        """Write transport.parquet, the other tables there are, and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return write_tables(folder, KIND, self.settings, self.tables())

    @classmethod
    def load(cls, folder: str | Path) -> TransportScores:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        table, others, settings = read_tables(folder, KIND, "workbench transport", TABLES[1:])
        return cls(table=table, settings=settings, **others)

    def tables(self) -> dict[str, pd.DataFrame | None]:
        """All of them, by the names of their files."""
        own = (self.table, self.curves, self.directions, self.routes, self.damage)
        return dict(zip(TABLES, own, strict=True))

    def overview(self) -> pd.DataFrame:
        """The columns that one looks at first."""
        wanted = ["source", "target", "strata", "held_out", "low", "high", "null", "efficiency", "size", "fisher", "readers"]
        return self.table[[name for name in wanted if name in self.table]]

    def __str__(self) -> str:
        lines = self.overview().round(3).to_string(index=False, max_rows=12)
        rest = " ".join(f".{name}" for name, table in list(self.tables().items())[1:] if table is not None)
        return f"{fill(self.paragraph(), 120)}\n\n{lines}\n  .table {rest} .matrix() .decay() .plot() .save(folder)"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.paragraph())}</p>{self.overview().round(3).to_html(index=False, max_rows=12)}"

    def _closely(self, name: str) -> pd.DataFrame:
        found = self.tables()[name]
        if found is None:
            raise UnknownOption(f"No {name} were made. Name few pairs, or pass closely=True (--closely).")
        return found

    def _of(self, strata: Strata | None) -> pd.DataFrame:
        first = self.settings["strata"][0] if strata is None else strata
        return self.table[self.table["strata"] == first]


def transport(
    model: LanguageModel,
    corpus: Corpus | Any,
    pairs: Pairs | Sequence[str] = "all",
    *,
    kind: Literal["ols", "ridge"] = "ridge",
    strata: Sequence[Strata] = ("ordinary",),
    null: bool = True,
    weigh: Sequence[Weight] = ("fisher", "readers"),
    closely: bool | None = None,
    directions: Sequence[Asked] = DIRECTIONS,
    routes: int = 0,
    damage: int = 0,
    one_in: int = 1,
    any_order: bool = False,
    fisher_tokens: int = FISHER_TOKENS,
    batch_tokens: int | None = None,
    massive_at: str | None = "middle",
    seed: int = 0,
    progress: bool = True,
) -> TransportScores:
    """Score how much of each target's state a linear map of its source carries, from one pass of moments.

    Documents with an even ordinal are one fold and those with an odd one the other; each is predicted by the map of the other.

    Args:
        pairs: `all` states with every later one, `adjacent`, `last`, or a list of pairs as `parse_pair` reads them.
        kind: `ridge`, its strength by generalised cross-validation inside the fold, or `ols`.
        strata: Which tokens to fit and score on, one after the other: `ordinary`, `all`, `rest`. Directions, routes and damage
            are of the first.
        null: Also score targets of other documents: half of the sums' cost, and what sizes and verdicts need.
        weigh: Also weigh R² by the `fisher` matrix of the output, and by what the next block's `readers` read (sites of the
            stream).
        closely: Also curves over ranks, single directions, and intervals (a second pass over the corpus); if None, of 16 pairs
            or fewer.
        directions: Which: `principal:32`, `unembedding:32` (tokens drawn at random) or `unembedding: Paris`, `neurons:32`
            (write rows of the block that ends in the target) or `neurons@12:32`, `random:32`; a .safetensors or .npy file;
            vectors.
        routes: Also follow other tokens as sources, on so many tokens (pairs of states).
        damage: Also replace the target by what is carried there, and by ablations, and measure the loss on so many held-out
            tokens.
        one_in: For `damage`: of the positions from the fifth on, every so-manieth is replaced.
        any_order: Allow pairs whose source comes after its target: how much of a state can be read off a later one.
        fisher_tokens: Tokens whose gradients make the Fisher matrix.
        batch_tokens, massive_at: As in `stream`.
        seed: Of all that is drawn: shuffles, directions, intervals, resampled tokens.
    Raises:
        UnknownOption: for a pair that ends before it begins, unless `any_order`; directions of another width than the target.
        TooFewTokens: if a fold has no token, or too few for `ols`.
        OutOfMemory, UnknownSite, LayerOutOfRange, BadCorpus, NotFinite: as `collect_moments`.
    """
    import pandas as pd

    _require_options(kind, strata, weigh, routes, damage, one_in)
    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    if not isinstance(pairs, str) and not any_order:
        _require_forward([parse_pair(one, model.n_layers) for one in pairs if ">" in one], model)
    named: Any = "states" if isinstance(pairs, str) or any(">" not in one for one in pairs) else []
    common: dict[str, Any] = {"batch_tokens": batch_tokens, "massive_at": massive_at, "progress": progress}
    moments = collect_moments(
        model, corpus, named, pairs, null=null, detail="two", folds=2, device=model.device, seed=seed, **common
    )
    order = list(moments.layout.widths)
    chosen = sorted(moments.pairs, key=lambda pair: (order.index(pair.source), order.index(pair.target)))
    closely = len(chosen) <= CLOSELY if closely is None else closely
    weights = _weights(model, corpus, moments, chosen, weigh, strata[0], fisher_tokens, seed)
    recipe, rows, curves = Recipe(kind), [], []
    looked: list[tuple[Pair, list[dict[str, Any]], TokenScores]] = []
    for one in strata:
        fitting = Fitting(moments, one)
        _require_two_folds(fitting)
        for pair in tqdm(chosen, desc=f"fit {one}", disable=not progress):
            real = held_out(fitting, recipe, pair)
            shuffled = held_out(fitting, recipe, pair, shuffled=True) if moments.has_null(pair) else None
            about = _about(pair, model) | {"strata": one}
            rows.append(about | pair_row(fitting, recipe, pair, real, shuffled, weights.get(pair.target, {})))
            if not closely:
                continue
            curves += [about | row for row in curve_rows(fitting, pair, real, shuffled, weights.get(pair.target, {}))]
            if one == strata[0]:
                wanted = choose(model, pair.target, moments.spread(pair.target, one), directions, seed)
                found = direction_rows(wanted, real.prediction, None if shuffled is None else shuffled.prediction, seed)
                tokens = TokenScores.of(moments, one, pair, wanted, real.splits)
                looked.append((pair, [about | row for row in found], tokens))
    settings = moments.settings | {
        "d_model": model.d_model, "fit": kind, "strata": list(strata), "null": null, "weigh": list(weigh), "closely": closely,
        "directions": [one if isinstance(one, str) else type(one).__name__ for one in directions] if closely else None,
        "routes": routes, "damage": damage, "one_in": one_in, "fisher_tokens": fisher_tokens if "fisher" in weigh else None,
        "unshuffled": moments.unshuffled if null else None, "pairs": len(chosen),
    }  # fmt: skip
    table = pd.DataFrame(rows)
    scored = _second_pass(model, corpus, looked, table, common, seed) if looked else None
    routed = [
        _about(pair, model) | row
        for pair in (chosen if routes else ())
        for row in route_rows(model, corpus, pair, recipe, tokens=routes, seed=seed, progress=progress)
    ]
    damaged = damage_rows(
        model, corpus, _first_maps(moments, recipe, strata[0], chosen), tokens=damage, one_in=one_in, batch_tokens=batch_tokens,
        seed=seed, progress=progress,
    ) if damage else []  # fmt: skip
    return TransportScores(
        table=table, settings=settings, curves=pd.DataFrame(curves) if closely else None, directions=scored,
        routes=pd.DataFrame(routed) if routes else None, damage=pd.DataFrame(damaged) if damage else None,
    )  # fmt: skip


def _second_pass(
    model: LanguageModel, corpus: Corpus, looked: Sequence[Any], table: pd.DataFrame, common: Mapping[str, Any], seed: int
) -> pd.DataFrame:
    """Run the corpus again, past the maps. Intervals go into the table of pairs; a row a direction is given back."""
    import pandas as pd

    sites = list(dict.fromkeys(site for pair, *_ in looked for site in pair[:2]))
    for batch in stream(model, corpus, sites, **common):
        for *_, tokens in looked:
            tokens(batch)
    rows: list[dict[str, Any]] = []
    for pair, found, tokens in looked:
        at = (table["source"] == pair.source) & (table["target"] == pair.target) & (table["strata"] == tokens.strata)
        table.loc[at, ["low", "high"]] = tokens.interval(seed)
        columns = tokens.columns(seed)
        rows += [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(found)]
    return pd.DataFrame(rows)


def _weights(
    model: LanguageModel,
    corpus: Corpus,
    moments: Moments,
    pairs: Sequence[Pair],
    weigh: Sequence[Weight],
    strata: Strata,
    tokens: int,
    seed: int,
) -> dict[str, dict[str, Metric]]:
    """By target, the metrics it is weighed by."""
    targets = [site for site in dict.fromkeys(pair.target for pair in pairs) if state_number(site, model.n_layers) is not None]
    found: dict[str, dict[str, Metric]] = {site: {} for site in targets}
    if "fisher" in weigh and targets:
        for site, square in fisher(model, corpus, targets, tokens=tokens, seed=seed).items():
            found[site]["fisher"] = Metric.of(square.to(model.device))
    for site in targets if "readers" in weigh else ():
        square = readers(model, site, moments.spread(site, strata).mean)
        if square is not None:
            found[site]["readers"] = Metric.of(square.to(model.device))
    return found


def _first_maps(moments: Moments, recipe: Recipe, strata: Strata, pairs: Sequence[Pair]):
    """Of each pair, the map that was fitted on the first fold."""
    fitting = Fitting(moments, strata)
    return [(pair, first_split(held_out(fitting, recipe, pair).splits)) for pair in pairs]


def _about(pair: Pair, model: LanguageModel) -> dict[str, Any]:
    first, last = (state_number(site, model.n_layers) for site in pair[:2])
    distance = None if first is None or last is None else last - first
    return {"source": pair.source, "target": pair.target, "from": first, "to": last, "distance": distance}


def _require_options(
    kind: str, strata: Sequence[Strata], weigh: Sequence[Weight], routes: int, damage: int, one_in: int
) -> None:
    """
    Raises:
        UnknownOption: if one is not known, or a number is out of range.
    """
    require_one_of("kind", kind, ("ols", "ridge"))
    for one in strata:
        require_one_of("strata", one, get_args(Strata))
    for one in weigh:
        require_one_of("weigh", one, get_args(Weight))
    if not strata or routes < 0 or damage < 0 or damage == 1 or one_in < 1:
        raise UnknownOption(
            f"strata={list(strata)}, routes={routes}, damage={damage}, one_in={one_in}: name a stratum; routes and damage are "
            "numbers of tokens, 0 for none (damage needs 2); one_in is 1 or more."
        )


def _require_forward(pairs: Sequence[tuple[str, str]], model: LanguageModel) -> None:
    """
    Raises:
        UnknownOption: if a source does not come before its target.
    """
    for pair in pairs:
        source, target = (depth(Site.parse(site, model.n_layers), model.n_layers) for site in pair)
        if source >= target:
            raise UnknownOption(
                f"The pair {'>'.join(pair)} ends before it begins: nothing is carried from a later site to an earlier one. "
                "Turn it round; or, to ask how much can be read off a later one, pass any_order=True (--any-order)."
            )


def _require_two_folds(fitting: Fitting) -> None:
    """
    Raises:
        TooFewTokens: if there is nothing to hold out.
    """
    layout = fitting.moments.layout
    n = [fitting.moments.spread(next(iter(layout.widths)), fitting.strata, layout.folds_of([fold])).n for fold in (0, 1)]
    if min(n) < 2:
        raise TooFewTokens(
            f"There is nothing to hold out: of {fitting.strata!r} tokens the two folds of documents (every other one) have "
            f"{n[0]:,} and {n[1]:,}. Give the corpus more documents: in a .txt file blank lines part them."
        )
