"""Second moments of a model over a corpus, in one pass: no activation is stored.

Source of the way it is done: Chan, Golub and LeVeque 1979 (sums about a shifted origin, pairwise union). Every linear map
between sites, at every ridge strength and rank, its score on other documents, and every eraser follow from these sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from workbench.activations import PAIRS
from workbench.corpus.corpus import Corpus
from workbench.errors import OutOfMemory, UnknownOption, UnknownSite
from workbench.model import LanguageModel
from workbench.moments.accumulator import Accumulator, waiting_tokens
from workbench.moments.layout import Detail, Layout, Pair, pairs_between
from workbench.moments.moments import Moments
from workbench.results import versions
from workbench.sites import Site, depth, named_once, parse_pair, parse_sites, state
from workbench.streaming.plan import shown_bytes
from workbench.streaming.stream import stream
from workbench.streaming.token_batch import TokenBatch
from workbench.tracer import is_edited

Pairs = Literal["adjacent", "last", "all"]


class MomentsPlan(NamedTuple):
    """What sums will take."""

    sites: int
    pairs: int
    sums_bytes: int
    """Of the sums, in float64."""
    waiting_bytes: int
    """Of the tokens that wait to be multiplied, at most."""
    free_bytes: int | None
    """On the device of the model; None where the system does not say."""
    operations: int
    """Floating-point operations a token."""

    def __str__(self) -> str:
        free = "unknown" if self.free_bytes is None else shown_bytes(self.free_bytes)
        return (
            f"{self.sites} sites, {self.pairs} pairs: sums {shown_bytes(self.sums_bytes)}, waiting tokens "
            f"{shown_bytes(self.waiting_bytes)}, free {free}; {self.operations / 1e6:,.0f} million operations a token"
        )


def collect_moments(
    model: LanguageModel,
    corpus: Corpus | Any,
    sites: str | Sequence[str] = "states",
    pairs: Pairs | Sequence[str] | None = "adjacent",
    *,
    null: bool | Sequence[str] = False,
    detail: Detail = "five",
    folds: int = 5,
    cross_folds: int = 2,
    part: tuple[int, int] = (0, 1),
    products: torch.dtype | None = None,
    batch_tokens: int | None = None,
    massive_at: str | None = "middle",
    device: str | torch.device = "cpu",
    watch: Callable[[TokenBatch], None] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Moments:
    """Sum products of activations over a corpus: each site with itself, and with others.

    Tokens are kept apart by stratum (`workbench.corpus.corpus.STRATA`) and by fold of their document (its ordinal modulo
    `folds`), so that what to leave out, and what to hold out, is decided afterwards.

    Args:
        sites: `states`, all states of the residual stream from before the first block to after the last; or sites, as
            `parse_sites` reads them, in the order in which `pairs` takes them.
        pairs: `adjacent` (each site with the next), `last` (each with the last), `all` (each with every later one); or a list
            of pairs, as `parse_pair` reads them (`"4>8"`), and of these words; None: none. Sites that a pair names are added.
        null: Also sum every pair, or those named, with the target taken from another document: the null of any score.
        detail: Strata in which a site with itself is summed: `five`, or `two` (ordinary tokens and the rest), or `one` (all
            tokens in one pile, pairs too).
        folds, cross_folds: Folds of documents for a site with itself, and for pairs. Without two there is nothing held out.
        part: This part of so many: only every so-manieth batch. Moments of all parts add up to those of the whole.
        products: The dtype in which ordinary tokens are multiplied; if None float64 for a float64 model, bfloat16 (or float16)
            for such a model on a GPU, float32 otherwise. Other tokens are multiplied in float64, unless all are in one pile
            (`detail="one"`).
        batch_tokens, massive_at: As in `stream`.
        device: Where the sums are kept, and maps will be fitted. On a GPU they are made there; those of all pairs of a large
            model take a while to move.
        watch: Called with every batch, for statistics of one's own in the same pass.
        seed: Of the shuffling of documents.
    Raises:
        OutOfMemory: if the sums do not fit, before anything is run.
        UnknownSite, LayerOutOfRange, UnknownOption, BadCorpus: as `stream` and `parse_pair`.
        NotFinite: naming the document and position where NaN or infinity was found.
    """
    layout = _layout(model, sites, pairs, null, detail, folds, cross_folds)
    index, of = part
    if not 0 <= index < of:
        raise UnknownOption(f"part={part} is out of range: write (0, 4) for the first of four, (3, 4) for the last.")
    chosen = products or _products(model)
    if chosen not in (torch.float64, torch.float32, _products(model)):
        raise UnknownOption(f"products={chosen} is for such models on a GPU. Use torch.float32 or torch.float64.")
    _require_room(_plan(layout, model, chosen), model)
    flow = stream(model, corpus, list(layout.widths), batch_tokens=batch_tokens, massive_at=massive_at, progress=progress)
    accumulator = Accumulator(layout, model.device, chosen, seed=seed)
    with torch.no_grad():
        for batch in flow.part(index, of):
            tensors = {site: tensor.flatten(1) for site, tensor in batch.items()}
            accumulator.add(tensors, batch.tokens.stratum, batch.tokens.document)
            if watch is not None:
                watch(batch)
    settings = model.provenance | flow.settings | {
        "n_layers": model.n_layers, "tokens_hash": flow.counted.count.tokens_hash, "products": _name(chosen), "seed": seed,
        "corpus_parts": [[index, of]], "edited": is_edited(model), "versions": versions(),
    }  # fmt: skip
    return Moments(layout, accumulator.sums().finished(torch.device(device)), settings)


def plan_moments(
    model: LanguageModel,
    sites: str | Sequence[str] = "states",
    pairs: Pairs | Sequence[str] | None = "adjacent",
    *,
    null: bool | Sequence[str] = False,
    detail: Detail = "five",
    folds: int = 5,
    cross_folds: int = 2,
) -> MomentsPlan:
    """What `collect_moments` would take with these options. Nothing is run."""
    return _plan(_layout(model, sites, pairs, null, detail, folds, cross_folds), model, _products(model))


def _layout(
    model: LanguageModel,
    sites: str | Sequence[str],
    pairs: Pairs | Sequence[str] | None,
    null: bool | Sequence[str],
    detail: Detail,
    folds: int,
    cross_folds: int,
) -> Layout:
    n = model.n_layers
    if sites == "states":
        named = [state(i, n) for i in range(n + 1)]
    else:
        parsed = parse_sites([sites] if isinstance(sites, str) else sites, n)
        named = list(dict.fromkeys(named_once(str(site), n) for site in parsed))
    asked = [pairs] if isinstance(pairs, str) else list(pairs or ())
    wanted: list[Pair] = []
    for one in asked:
        wanted += pairs_between(named, one) if one in ("adjacent", "last", "all") else [Pair(*parse_pair(one, n))]
    shuffled = [Pair(*parse_pair(one, n)) for one in null] if not isinstance(null, bool) else wanted if null else []
    wanted += [pair._replace(shuffled=True) for pair in shuffled]
    wanted = list(dict.fromkeys(wanted))
    used = dict.fromkeys([*named, *(site for pair in wanted for site in pair[:2])])
    ordered = sorted((Site.parse(site, n) for site in used), key=lambda site: depth(site, n))
    return Layout({str(site): site_width(model, site) for site in ordered}, tuple(wanted), detail, folds, cross_folds)


def site_width(model: LanguageModel, site: Site) -> int:
    """Numbers a token at a site, heads side by side.

    Raises:
        UnknownSite: if its tensors are no rows of tokens.
    """
    if site.name in PAIRS:
        raise UnknownSite(
            f"Site '{site}' holds pairs of tokens, not features of one. Take a site of the stream, heads or neurons."
        )
    return math.prod(size for axis, size in model.axes(site).items() if axis not in ("batch", "pos") and size is not None)


def _plan(layout: Layout, model: LanguageModel, products: torch.dtype) -> MomentsPlan:
    of_rest = 0 if layout.detail == "one" else 8
    tokens = layout.cross_folds * (products.itemsize + of_rest)
    tokens += max(products.itemsize, of_rest) if any(pair.shuffled for pair in layout.pairs) else 0
    waiting = layout.width * waiting_tokens(model.device) * tokens
    return MomentsPlan(
        len(layout.widths), len(layout.pairs), layout.sums_bytes(), waiting, free_bytes(model.device), layout.operations()
    )


def _require_room(plan: MomentsPlan, model: LanguageModel) -> None:
    """
    Raises:
        OutOfMemory: if sums and waiting tokens are more than what is free.
    """
    if plan.free_bytes is not None and plan.sums_bytes + plan.waiting_bytes > plan.free_bytes:
        raise OutOfMemory(
            f"The moments do not fit on {model.device}: {plan}. Take fewer sites or pairs (pairs='adjacent'), fewer strata "
            "(detail='two'), fewer folds (folds=2), or no null."
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had without pushing anything out, within a container's limit; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # there is none
        return free
    return min(free, max(0, limit - used))


def _products(model: LanguageModel) -> torch.dtype:
    half = model.dtype in (torch.bfloat16, torch.float16)
    if half and model.device.type == "cuda" and torch.__version__ >= "2.8":  # older ones round the product to half precision
        return model.dtype
    return torch.float64 if model.dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
