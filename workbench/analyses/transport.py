"""Was a feature carried here, or computed on the way? Linear maps between states, scored direction by direction.

Source: Szablewski and Masiak 2025 (arXiv 2508.17540), "Activation Transport Operators". They fit a ridge map for each pair from
stored activations, 41 fits a pair; here one pass of moments gives every pair. What their recipe leaves open is shown beside it:
each metric with its own best truncation (`transport_pairs`), ceilings and sizes held out and above their nulls
(`workbench.transports.canonical`), scores on all tokens beside those on active ones (`transport_tokens`), scores weighed by
what the output or the next block reads (`transport_metrics`), other tokens as sources (`transport_routes`), and what the model
loses beside ablations that are not zeros (`transport_damage`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from tqdm.auto import tqdm

from workbench.analyses.transport_damage import Standing, damage_rows, require_writable
from workbench.analyses.transport_directions import Asked, choose, direction_rows
from workbench.analyses.transport_metrics import FISHER_TOKENS, fisher, readers
from workbench.analyses.transport_pairs import curve_rows, held_out, pair_row
from workbench.analyses.transport_routes import require_states, route_rows
from workbench.analyses.transport_scores import TransportScores
from workbench.analyses.transport_tokens import TokenScores
from workbench.collecting import collect_moments, site_width
from workbench.corpus.corpus import Corpus
from workbench.errors import TooFewTokens, UnknownOption, require_one_of
from workbench.model import LanguageModel
from workbench.moments.layout import Pair, pairs_between
from workbench.moments.moments import Spread, Strata
from workbench.sites import Site, depth, parse_pair, state, state_number
from workbench.streaming.stream import stream
from workbench.transports.fit import Fitting, Recipe
from workbench.transports.solving import Metric

if TYPE_CHECKING:
    import pandas as pd

CLOSELY = 16
"""Pairs that are looked at closely (curves, directions, intervals), if it was not said whether to."""
WEIGHTS = ("fisher", "readers")


def transport(
    model: LanguageModel,
    corpus: Corpus | Any,
    pairs: str | Sequence[str] = "all",
    *,
    kind: Literal["ols", "ridge"] = "ridge",
    strata: Sequence[Strata] = ("ordinary",),
    null: bool = True,
    weigh: Sequence[str] = WEIGHTS,
    closely: bool | None = None,
    directions: Asked | Sequence[Asked] | None = None,
    routes: int = 0,
    sources: int = 1,
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
        pairs: `all` states with every later one, `adjacent`, `last`, or one or several pairs as `parse_pair` reads them.
        kind: `ridge`, its strength by generalised cross-validation inside the fold, or `ols`.
        strata: Which tokens to fit and score on, one after the other: `ordinary`, `all`, `rest`. Directions, intervals, and the
            maps whose damage is measured, are of the first; routes and the Fisher matrix always of ordinary tokens.
        null: Also score targets of other documents: half of the sums' cost, and what sizes and verdicts need.
        weigh: Also weigh R² by the `fisher` matrix of the output, by what the next block's `readers` read, or those of another
            block, `readers@20` (targets that are states).
        closely: Also curves over ranks, single directions, and intervals (a second pass over the corpus); if None, of 16 pairs
            or fewer.
        directions: Which: `principal:32`, `unembedding:32` (tokens drawn at random) or `unembedding: Paris`, `neurons:32`
            (write rows of the last MLP before the target) or `neurons@12:32`, `random:32`; a .safetensors or .npy file;
            vectors. If None, 32 of each kind that the target has.
        routes: Also follow other tokens as sources, on so many tokens (pairs of states).
        sources: For `routes`: how many tokens each route gives, the most attended ones, the nearest ones, and so on.
        damage: Also replace the target, from the fifth position on, by what is carried there, and by ablations, and measure the
            loss on so many held-out tokens.
        one_in: For `damage`: of these positions, every so-manieth is replaced.
        any_order: Allow pairs whose source comes after its target: how much of a state can be read off a later one.
        fisher_tokens: Tokens whose gradients make the Fisher matrix.
        batch_tokens, massive_at: As in `stream`.
        seed: Of all that is drawn: shuffles, directions, intervals, resampled tokens.
    Raises:
        UnknownOption: for a pair that ends before it begins, unless `any_order`; directions of another width than the target.
        TooFewTokens: if a fold has no token, or too few for `ols`.
        OutOfMemory, UnknownSite, ReadOnlySite, LayerOutOfRange, BadCorpus, NotFinite: as `collect_moments`, and for what cannot
            be replaced, or followed. All that can be is refused before anything is run.
    """
    import pandas as pd

    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    asked = [pairs] if isinstance(pairs, str) else list(pairs)
    wanted: list[Any] | None = None
    if directions is not None:
        wanted = list(directions) if isinstance(directions, (list, tuple)) else [directions]
    strata = list(dict.fromkeys(strata))
    _require_options(kind, strata, weigh, routes, sources, damage, one_in)
    pair_list = _pairs(model, asked, any_order=any_order)
    closely = len(pair_list) <= CLOSELY if closely is None else closely
    _require_possible(model, pair_list, wanted if closely else [], routes, damage)
    weights = _weights(model, corpus, pair_list, weigh, fisher_tokens, seed)
    common: dict[str, Any] = {"batch_tokens": batch_tokens, "massive_at": massive_at, "progress": progress}
    moments = collect_moments(
        model, corpus, [], [str(pair) for pair in pair_list], null=null, detail="two", folds=2, device=model.device, seed=seed,
        **common,
    )  # fmt: skip
    order = list(moments.layout.widths)
    chosen = sorted(moments.pairs, key=lambda pair: (order.index(pair.source), order.index(pair.target)))
    recipe, rows, curves = Recipe(kind), [], []
    looked: list[tuple[list[dict[str, Any]], TokenScores]] = []
    standing: list[Standing] = []
    for one in strata:
        fitting = Fitting(moments, one)
        _require_two_folds(fitting)
        for pair in tqdm(chosen, desc=f"fit {one}", disable=not progress):
            real = held_out(fitting, recipe, pair)
            shuffled = held_out(fitting, recipe, pair, shuffled=True) if moments.has_null(pair) else None
            about = _about(pair, model) | {"strata": one}
            rows.append(about | pair_row(fitting, recipe, pair, real, shuffled, weights.get(pair.target, {})))
            if damage and one == strata[0]:
                standing.append(Standing.of(pair, real.splits))
            if not closely:
                continue
            curves += [about | row for row in curve_rows(fitting, pair, real, shuffled, weights.get(pair.target, {}))]
            if one == strata[0]:
                own = choose(model, pair.target, moments.spread(pair.target, one), wanted, seed)
                found = direction_rows(own, real.prediction, None if shuffled is None else shuffled.prediction, seed)
                tokens = TokenScores.of(fitting, pair, own, real.splits, weights.get(pair.target, {}))
                looked.append(([about | row for row in found], tokens))
    settings = moments.settings | {
        "d_model": model.d_model, "fit": kind, "strata": strata, "null": null, "weigh": list(weigh), "closely": closely,
        "directions": None if wanted is None else [_told(one) for one in wanted], "routes": routes, "damage": damage,
        "sources": sources if routes else None, "one_in": one_in, "fisher_tokens": fisher_tokens if "fisher" in weigh else None,
        "unshuffled": moments.unshuffled if null else None, "pairs": len(chosen),
    }  # fmt: skip
    table = pd.DataFrame(rows)
    scored = _second_pass(model, corpus, looked, table, common, seed) if looked else None
    routed = [
        _about(pair, model) | row
        for pair in (chosen if routes else ())
        for row in route_rows(model, corpus, pair, recipe, tokens=routes, top=sources, seed=seed, progress=progress)
    ]
    damaged: list[dict[str, Any]] = []
    if damage:
        damaged = damage_rows(
            model, corpus, standing, tokens=damage, one_in=one_in, batch_tokens=batch_tokens, seed=seed, progress=progress
        )
    return TransportScores(
        table=table, settings=settings, curves=pd.DataFrame(curves) if closely else None, directions=scored,
        routes=pd.DataFrame(routed) if routes else None, damage=pd.DataFrame(damaged) if damage else None,
    )  # fmt: skip


def _second_pass(
    model: LanguageModel,
    corpus: Corpus,
    looked: Sequence[tuple[list[dict[str, Any]], TokenScores]],
    table: pd.DataFrame,
    common: Mapping[str, Any],
    seed: int,
) -> pd.DataFrame | None:
    """Run the corpus again, past the maps. Intervals go into the table of pairs; a row a direction is given back."""
    import pandas as pd

    sites = list(dict.fromkeys(site for _, tokens in looked for site in tokens.pair[:2]))
    for batch in stream(model, corpus, sites, **common):
        for _, tokens in looked:
            tokens(batch)
    rows: list[dict[str, Any]] = []
    for found, tokens in looked:
        source, target = tokens.pair[:2]
        at = (table["source"] == source) & (table["target"] == target) & (table["strata"] == tokens.strata)
        for name, ends in tokens.intervals(seed).items():
            prefix = "" if name == "held_out" else f"{name}_"
            table.loc[at, [f"{prefix}low", f"{prefix}high"]] = ends
        columns = tokens.columns(seed)
        rows += [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(found)]
    return pd.DataFrame(rows) if rows else None


def _weights(
    model: LanguageModel, corpus: Corpus, pairs: Sequence[Pair], weigh: Sequence[str], tokens: int, seed: int
) -> dict[str, dict[str, Metric]]:
    """By target, the metrics it is weighed by."""
    targets = [site for site in dict.fromkeys(pair.target for pair in pairs) if state_number(site, model.n_layers) is not None]
    found: dict[str, dict[str, Metric]] = {site: {} for site in targets}
    for name in weigh if targets else ():
        if name == "fisher":
            squares = fisher(model, corpus, targets, tokens=tokens, seed=seed)
        else:
            where = name.partition("@")[2]
            squares = {site: readers(model, site, int(where) if where else None) for site in targets}
        for site, square in squares.items():
            if square is not None:
                found[site][name] = Metric.of(square.to(model.device))
    return found


def _pairs(model: LanguageModel, asked: Sequence[str], *, any_order: bool) -> list[Pair]:
    """
    Raises:
        UnknownOption: if a source does not come before its target, unless that is allowed; if there is none.
        UnknownSite, LayerOutOfRange: as `parse_pair`.
    """
    n = model.n_layers
    states = [state(number, n) for number in range(n + 1)]
    found: list[Pair] = []
    for one in asked:
        found += pairs_between(states, one) if one in ("adjacent", "last", "all") else [Pair(*parse_pair(one, n))]
    for pair in found:
        source, target = (depth(Site.parse(site, n), n) for site in pair[:2])
        if source >= target and not any_order:
            raise UnknownOption(
                f"The pair {pair} ends before it begins: nothing is carried from a later site to an earlier one. Turn it "
                "round; or, to ask how much can be read off a later one, pass any_order=True (--any-order)."
            )
    if not found:
        raise UnknownOption("pairs=[]: there is nothing to score. Use 'all', 'adjacent', 'last', or pairs such as '4>8'.")
    return list(dict.fromkeys(found))


def _require_possible(
    model: LanguageModel, pairs: Sequence[Pair], directions: Sequence[Asked] | None, routes: int, damage: int
) -> None:
    """
    Raises:
        WorkbenchError: for what would be refused after the pass.
    """
    for pair in pairs:
        if routes:
            require_states(model, pair)
        if damage:
            require_writable(model, pair)
    for target in dict.fromkeys(pair.target for pair in pairs) if directions else ():
        width = site_width(model, Site.parse(target, model.n_layers))
        one = torch.eye(width, dtype=torch.float64)
        choose(model, target, Spread(1, one[0], one), directions, 0)


def _told(one: Asked) -> str:
    return str(one) if isinstance(one, (str, Path)) else type(one).__name__


def _about(pair: Pair, model: LanguageModel) -> dict[str, Any]:
    first, last = (state_number(site, model.n_layers) for site in pair[:2])
    distance = None if first is None or last is None else last - first
    return {"source": pair.source, "target": pair.target, "from": first, "to": last, "distance": distance}


def _require_options(
    kind: str, strata: Sequence[Strata], weigh: Sequence[str], routes: int, sources: int, damage: int, one_in: int
) -> None:
    """
    Raises:
        UnknownOption: if one is not known, or a number is out of range.
    """
    require_one_of("kind", kind, ("ols", "ridge"))
    for one in strata:
        require_one_of("strata", one, get_args(Strata))
    for one in weigh:
        if one not in WEIGHTS and not re.fullmatch(r"readers@\d+", one):
            raise UnknownOption(f"weigh={one!r} is not known. Use 'fisher', 'readers' (of the next block), or 'readers@20'.")
    if not strata or routes < 0 or damage < 0 or damage == 1 or min(one_in, sources) < 1:
        raise UnknownOption(
            f"strata={list(strata)}, routes={routes}, sources={sources}, damage={damage}, one_in={one_in}: name a stratum; "
            "routes and damage are numbers of tokens, 0 for none (damage needs 2); sources and one_in are 1 or more."
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
