"""What a model holds at the words that a dataset asks about, at many sites, from one pass over its texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from probes.dataset import Dataset
from workbench.collecting import free_bytes
from workbench.corpus.corpus import Corpus
from workbench.errors import BadDataset, OutOfMemory, TextTooLong, require_one_of
from workbench.model import LanguageModel
from workbench.sites import parse_sites
from workbench.streaming.stream import stream
from workbench.streaming.token_batch import TokenBatch

Pool = Literal["last", "first", "mean"]
BAG = "bag of embeddings"
"""The mean embedding of all tokens up to the words asked about, these included: what is there without any order."""
EMBEDDING = "token embeddings"
"""The embedding of the tokens asked about."""
ROOM = 0.7
"""Of the memory that is free, that states may take."""


@dataclass(frozen=True, eq=False, repr=False)
class States(Mapping[str, Tensor]):
    """`states["resid_post.3"]` is `[example, width]`, on the CPU, in the order of the dataset."""

    dataset: Dataset
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    """Model, dataset and pooling; share of examples read at the first token of their text, whose state is like no other."""

    def __getitem__(self, site: str) -> Tensor:
        return self.tensors[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        size = sum(value.nbytes for value in self.tensors.values()) / 1e6
        return f"States of {self.settings['model']!r} at {len(self)} sites for {len(self.dataset):,} examples, {size:,.0f} MB"


def collect_states(
    model: LanguageModel,
    dataset: Dataset,
    sites: str | Sequence[str] = ("resid_pre.0", "resid_post"),
    *,
    pool: Pool = "last",
    embeddings: bool = False,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> States:
    """Run the model over the texts once, and keep what it holds at the words asked about.

    Args:
        sites: As `parse_sites` reads them; all states of the stream, if not given. Axes of heads are laid side by side.
        pool: Of the tokens asked about, the `last`, the `first`, or their `mean`.
        embeddings: Also keep what the tokens alone say: their embeddings, pooled alike, and the mean of all up to there.
    Returns:
        States in the model's dtype (means in float32), and embeddings under the names of `EMBEDDING` and `BAG`.
    Raises:
        BadDataset: if no token lies in a span, or the tokenizer does not say where tokens stand.
        TextTooLong: if a text has more tokens than the model's context.
        OutOfMemory: if the states do not fit the free memory.
        UnknownSite, LayerOutOfRange, NotFinite: as `wb.stream`.
    """
    require_one_of("pool", pool, ("last", "first", "mean"))
    if dataset.texts is None:
        raise BadDataset(f"{dataset.name!r} has no texts to run a model on. Give texts, or sweep the rows that you have.")
    places = token_spans(model, dataset)
    wanted: list[str] = [str(site) for site in parse_sites([sites] if isinstance(sites, str) else sites, model.n_layers)]
    read: list[str] = [*wanted, *(["embed"] if embeddings and "embed" not in wanted else [])]
    corpus = Corpus(list(dataset.texts), length=max(2, int(places[:, 2].max())))
    flow = stream(
        model, corpus, read, device="cpu", massive_at=None, batch_tokens=batch_tokens, progress=progress
    )  # fmt: skip
    n, size = len(dataset), 4 if pool == "mean" else model.dtype.itemsize
    _require_room(n * size * sum(prod(flow.shape(site)) for site in flow.sites), len(read))
    pooled = {
        site: torch.zeros(n, prod(flow.shape(one)), dtype=torch.float32 if pool == "mean" else model.dtype)
        for site, one in zip(read, flow.sites, strict=True)
    }
    bag = torch.zeros(n, model.d_model) if embeddings else None
    for batch in flow:
        _put(batch, pooled, places, pool)
        if bag is not None:
            own = batch.tokens
            before = np.flatnonzero(own.offset < places[own.document, 1])
            document = torch.from_numpy(own.document[before]).long()
            bag.index_add_(0, document, batch["embed"][before].flatten(1).float())
    found = {site: pooled[site] for site in wanted}
    if bag is not None:
        found |= {EMBEDDING: pooled["embed"], BAG: bag / torch.from_numpy(places[:, 1:2]).float()}
    first = {"last": places[:, 1] == 1, "first": places[:, 0] == 0, "mean": places[:, 0] == 0}[pool]
    settings = model.provenance | dataset.settings | {"pool": pool, "at_first_token": float(first.mean())}
    return States(dataset, found, settings)


def token_spans(model: LanguageModel, dataset: Dataset) -> np.ndarray:
    """Tokens that hold each example's words, from and up to, and the tokens of its text, `[n, 3]`.

    Raises:
        BadDataset, TextTooLong: as `collect_states`.
    """
    if not model.tokenizer.is_fast:
        raise BadDataset(f"The tokenizer of {model.name!r} does not say which characters a token stands for. Use a fast one.")
    texts = dataset.texts or ()
    encoded: Any = model.tokenizer(list(texts), return_offsets_mapping=True, verbose=False)
    found = np.empty((len(dataset), 3), np.int64)
    for i, offsets in enumerate(encoded["offset_mapping"]):
        start, end = (0, len(texts[i])) if dataset.spans is None else dataset.spans[i]
        within = [at for at, (a, b) in enumerate(offsets) if a < end and b > start]
        if model.n_context is not None and len(offsets) > model.n_context:
            raise TextTooLong(
                f"Text {i} of {dataset.name!r} has {len(offsets)} tokens, and the context of {model.name!r} is "
                f"{model.n_context}. Shorten it around the words that are asked about."
            )
        if not within:
            raise BadDataset(f"No token of text {i} of {dataset.name!r} lies in its span {start}:{end}. Move the span.")
        found[i] = within[0], within[-1] + 1, len(offsets)
    return found


def _put(batch: TokenBatch, pooled: dict[str, Tensor], places: np.ndarray, pool: Pool) -> None:
    own = batch.tokens
    first, end = places[own.document, 0], places[own.document, 1]
    chosen = {
        "last": own.offset == end - 1, "first": own.offset == first, "mean": (own.offset >= first) & (own.offset < end)
    }[pool]  # fmt: skip
    at = torch.from_numpy(np.flatnonzero(chosen))
    document = torch.from_numpy(own.document[chosen]).long()
    width = torch.from_numpy((end - first)[chosen]).float()[:, None]
    for site, into in pooled.items():
        rows = batch[site][at].flatten(1)
        if pool == "mean":
            into.index_add_(0, document, rows.float() / width)
        else:
            into[document] = rows.to(into.dtype)


def _require_room(wanted: int, sites: int) -> None:
    """
    Raises:
        OutOfMemory: if less memory is free.
    """
    free = free_bytes(torch.device("cpu"))
    if free is not None and wanted > ROOM * free:
        raise OutOfMemory(
            f"States of {sites} sites take {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Ask for fewer sites or "
            "examples, or load the model in a smaller dtype."
        )
