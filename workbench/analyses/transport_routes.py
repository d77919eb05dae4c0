"""Where a target's state was carried from: its own token before, or others, which same-token maps cannot see.

Szablewski and Masiak 2025 (arXiv 2508.17540) pair a token's state with its own, earlier one, so that what attention brings from
other tokens counts as computed. Here the states of other tokens are given to the map too, by several routes: those that the
blocks between attend to most, and those just before; and, as controls, earlier ones at random, and some of other documents.
What counts is what a route adds to the same token's own state. Tokens of a sink are no source: they are attended to by all, and
say nothing of where anything came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.activations import MASSIVE
from workbench.capturing import keeping
from workbench.corpus.corpus import ORDINARY, Corpus
from workbench.errors import TooFewTokens, UnknownOption
from workbench.model import LanguageModel
from workbench.moments.accumulator import Accumulator
from workbench.moments.joint import Joint
from workbench.moments.layout import Layout, Pair
from workbench.moments.moments import Moments
from workbench.sites import Site, state_number
from workbench.streaming.batches import Tokens, batch_of, batched, first_rows, tokens_of
from workbench.transports.fit import Recipe
from workbench.transports.prediction import Prediction

Route = Literal["same", "attention", "previous", "random", "shuffled"]
ROUTES: tuple[Route, ...] = get_args(Route)
AT_ONCE = 1024
"""Tokens whose patterns are in memory at once."""
FOLDS = 2


def route_rows(
    model: LanguageModel,
    corpus: Corpus,
    pair: Pair,
    recipe: Recipe,
    *,
    tokens: int,
    top: int,
    seed: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Held-out R² of the target from each route `alone`, `with_same` (beside the same token's own state), and what that is more
    than with a state of another document (`above_shuffled`, which has as many numbers): a row a route, all on the same tokens.

    Args:
        top: How many tokens each route gives, side by side.
        tokens: Of the corpus, half of each fold, to the end of their rows; somewhat fewer have a source by every route.
    Raises:
        UnknownOption, UnknownSite: as `require_states`.
        TooFewTokens: if a fold of documents has none.
    """
    first, last = require_states(model, pair)
    widths = {route: model.d_model * (1 if route == "same" else top) for route in ROUTES} | {"target": model.d_model}
    pairs = [Pair(route, "target") for route in ROUTES] + [Pair("same", route) for route in ROUTES[1:]]
    layout = Layout(widths, tuple(pairs), "two", FOLDS, FOLDS)
    accumulator = Accumulator(layout, model.device, torch.float64, tokens=AT_ONCE)
    with tqdm(total=tokens, desc=f"routes {first}>{last}", unit="token", disable=not progress) as bar:
        for values, document in _routed(model, corpus, pair, range(first, last), tokens, top, seed):
            accumulator.add(values, np.full(len(document), ORDINARY), document)
            bar.update(len(document))
    moments = Moments(layout, accumulator.sums().finished(torch.device("cpu")), {})
    if not bool((moments.sums.n.sum(0) > 0).all()):
        raise TooFewTokens("Routes need tokens with an ordinary one before them, in documents of both folds. Take more text.")
    own = _held_out(moments, ["same"], recipe)
    scores = {route: (_held_out(moments, [route], recipe), _held_out(moments, ["same", route], recipe)) for route in ROUTES[1:]}
    shuffled, n = scores["shuffled"][1], int(moments.sums.n.sum())
    return [
        {"route": route, "n": n, "alone": alone, "with_same": both, "above_shuffled": both - shuffled}
        for route, (alone, both) in {"same": (own, own), **scores}.items()
    ]


def require_states(model: LanguageModel, pair: Pair) -> tuple[int, int]:
    """The states that a pair begins and ends with.

    Raises:
        UnknownOption: for sites that are no states of the stream, or of which the first is not the earlier one.
        UnknownSite: if a block between has no pattern to be seen.
    """
    first, last = (state_number(site, model.n_layers) for site in pair[:2])
    if first is None or last is None or first >= last:
        raise UnknownOption(f"Routes are followed from a state of the stream to a later one, as 4>8; {pair} is another pair.")
    for layer in range(first, last):
        model.tap(Site("pattern", layer))
    return first, last


@torch.no_grad()
def _routed(
    model: LanguageModel, corpus: Corpus, pair: Pair, blocks: range, tokens: int, top: int, seed: int
) -> Iterator[tuple[dict[str, Tensor], np.ndarray]]:
    """Rows of sources and targets of each batch, with the document of each."""
    source, target = (Site.parse(site, model.n_layers) for site in pair[:2])
    patterns = [Site("pattern", layer) for layer in blocks]
    special = np.array(sorted(model.tokenizer.all_special_ids), np.int32)
    random, usual = np.random.default_rng(seed), None
    donors, owners = None, np.empty(0, np.int64)
    for rows in batched(first_rows(corpus.rows(model), tokens, FOLDS), AT_ONCE):
        known = tokens_of(rows, special)
        with keeping(model, [source, target, *patterns], select=_averaged) as kept:
            batch = batch_of(rows, model)
            model.forward(batch)
        x, y = (kept[site][batch.mask] for site in (source, target))
        size = torch.stack([one.float().norm(dim=1) for one in (x, y)], 1).cpu().numpy()
        ordinary = known.stratum == ORDINARY
        if usual is None and ordinary.any():
            usual = np.median(size[ordinary], axis=0)
        ordinary &= True if usual is None else (size <= MASSIVE * usual).all(1)
        pattern = torch.stack([kept[site].float() for site in patterns]).sum(0).cpu().numpy()
        at, sources = _sources(known, ordinary, [len(row) for row in rows], pattern, top, random)
        if not len(at):
            continue
        own, document = x[torch.from_numpy(at).to(x.device)], known.document[at]
        bank = own if donors is None else torch.cat([donors, own])
        drawn, there = _elsewhere(np.concatenate([owners, document]), np.repeat(document, top), random)
        drawn, there = drawn.reshape(-1, top), there[::top]
        donors, owners = own, document
        values = {"same": own, "target": y[torch.from_numpy(at).to(y.device)]}
        values |= {"shuffled": bank[torch.from_numpy(drawn).to(x.device)].flatten(1)}
        values |= {route: x[torch.from_numpy(index).to(x.device)].flatten(1) for route, index in sources.items()}
        kept_tokens = torch.from_numpy(np.flatnonzero(there)).to(x.device)
        yield {route: value[kept_tokens] for route, value in values.items()}, document[there]


def _elsewhere(owners: np.ndarray, document: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """For each token one of the bank that is of another document, all of these alike, and whether there is one.

    Args:
        owners: The documents of the bank.
    """
    order = np.argsort(owners, kind="stable")
    start, stop = (np.searchsorted(owners[order], document, side) for side in ("left", "right"))
    others = len(owners) - (stop - start)
    drawn = (random.random(len(document)) * others).astype(np.int64)
    drawn += np.where(drawn >= start, stop - start, 0)
    return order[np.minimum(drawn, len(owners) - 1)], others > 0


def _averaged(place: Any, value: Tensor) -> Tensor:
    return value.float().mean(1) if isinstance(place, Site) and place.name == "pattern" else value


def _sources(
    known: Tokens, ordinary: np.ndarray, lengths: list[int], pattern: np.ndarray, top: int, random: np.random.Generator
) -> tuple[np.ndarray, dict[Route, np.ndarray]]:
    """Which tokens have so many sources, `[token]`, and where those of each route stand, `[token, top]`; indices into the real
    tokens of the batch. A source is an ordinary token before it in its own document."""
    at: list[np.ndarray] = []
    found: dict[Route, list[np.ndarray]] = {"attention": [], "previous": [], "random": []}
    start = 0
    for row, length in enumerate(lengths):
        own = slice(start, start + length)
        fine, document = ordinary[own], known.document[own]
        allowed = np.tri(length, k=-1, dtype=bool) & fine & (document[:, None] == document)
        chosen = np.flatnonzero(fine & (allowed.sum(1) >= top))
        weights: dict[Route, np.ndarray] = {
            "attention": pattern[row, :length, :length],
            "previous": np.broadcast_to(np.arange(length), (length, length)),
            "random": random.random((length, length)),
        }
        for route, weight in weights.items():
            best = np.argsort(np.where(allowed, -weight, np.inf)[chosen], axis=1, kind="stable")
            found[route].append(start + best[:, :top])
        at.append(start + chosen)
        start += length
    return np.concatenate(at), {route: np.concatenate(index) for route, index in found.items()}


def _held_out(moments: Moments, sources: list[Route], recipe: Recipe) -> float:
    """R² of each fold by the map of the other."""
    joints = [_joined(moments, sources, fold) for fold in range(FOLDS)]
    total: Prediction | None = None
    for inside, outside in (joints, joints[::-1]):
        fitted = recipe.fit(inside)
        one = Prediction.of(outside, fitted.matrix, fitted.bias)
        total = one if total is None else total.plus(one)
    assert total is not None
    return total.r2()


def _joined(moments: Moments, sources: list[Route], fold: int) -> Joint:
    """Of the states of several sources side by side, the first `same`, and the target."""
    parts = [moments.joint(Pair(source, "target"), "ordinary", [fold]) for source in sources]
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    crossed = moments.joint(Pair(sources[0], sources[1]), "ordinary", [fold]).xy
    return Joint(
        first.n, torch.cat([first.mean_x, second.mean_x]), first.mean_y,
        torch.cat([torch.cat([first.xx, crossed], 1), torch.cat([crossed.T, second.xx], 1)]),
        torch.cat([first.xy, second.xy]), first.yy,
    )  # fmt: skip
