"""A corpus through a model: activations of its real tokens, batch after batch, whatever the corpus's length."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.activations import MASSIVE as MASSIVE_TIMES
from workbench.activations import PAIRS
from workbench.capturing import keeping
from workbench.corpus.corpus import EARLY_UNTIL, MASSIVE, ORDINARY, Corpus, Count, Row, Tally
from workbench.errors import NotFinite, OutOfMemory, UnknownSite
from workbench.heap import keep_pages
from workbench.model import LanguageModel
from workbench.sites import Site, parse_sites
from workbench.streaming.batches import WINDOW, batch_of, batched, fitting, padded_tokens, real_tokens, tokens_of
from workbench.streaming.flat import Flat
from workbench.streaming.plan import Plan, peak_memory
from workbench.streaming.state import Limit, StreamState
from workbench.streaming.token_batch import TokenBatch

log = logging.getLogger(__name__)

BATCH_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Tokens of a batch, by the kind of device."""


class Counted(NamedTuple):
    """A corpus in batches."""

    count: Count
    batches: int
    padded_tokens: int
    first: list[Row]
    """The rows of the first batch."""


class Stream:
    """An iterable of `TokenBatch`es; each iteration runs the model over the corpus anew, and gives the same."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        sites: Sequence[Site],
        *,
        batch_tokens: int,
        dtype: torch.dtype | None,
        device: torch.device,
        massive_at: Site | None,
        progress: bool,
        state: StreamState,
    ) -> None:
        self.model, self.corpus, self.sites = model, corpus, tuple(sites)
        self.batch_tokens, self.dtype, self.device, self.massive_at = batch_tokens, dtype, device, massive_at
        self.progress, self.state = progress, state
        self._counted: Counted | None = None
        self._special = np.array(sorted(model.tokenizer.all_special_ids), np.int32)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what the stream gives."""
        return self.corpus.settings | {
            "row_length": self.corpus.row_length(self.model), "sites": [str(site) for site in self.sites],
            "batch_tokens": self.batch_tokens, "window": WINDOW,
            "kept_dtype": str(self.dtype or self.model.dtype).removeprefix("torch."),
            "massive_at": None if self.massive_at is None else str(self.massive_at),
        }  # fmt: skip

    @property
    def bytes_per_token(self) -> int:
        """Bytes that all sites together keep of a token."""
        size = (self.dtype or self.model.dtype).itemsize
        return sum(size * math.prod(self.shape(site)) for site in self.sites)

    @property
    def counted(self) -> Counted:
        """The corpus in batches; it is read for this, unless it was gone through before.

        Raises:
            BadCorpus: if there is no text in the corpus.
        """
        if self._counted is None:
            for _ in self._numbered():
                pass
        assert self._counted is not None
        return self._counted

    def _numbered(self) -> Iterator[tuple[int, list[Row]]]:
        """The rows of every batch, with its index. When all were gone through, they have been counted."""
        tally, padded, index = Tally(), 0, -1
        first: list[Row] = []
        for index, rows in enumerate(batched(tally.of(self.corpus.rows(self.model)), self.batch_tokens)):
            first = first or rows
            padded += padded_tokens(rows)
            yield index, rows
        self._counted = Counted(tally.count, index + 1, padded, first)

    def plan(self) -> Plan:
        """Count the corpus, run the model on the first batch, the longest of its window, and say what the whole will take.

        Raises:
            BadCorpus: if there is no text in the corpus.
        """
        counted, started = self.counted, time.perf_counter()
        for _ in self._run([(0, counted.first)], StreamState()):
            pass
        seconds = (time.perf_counter() - started) * counted.padded_tokens / padded_tokens(counted.first)
        count = counted.count
        return Plan(
            documents=count.documents, rows=count.rows, tokens=count.tokens, tokens_hash=count.tokens_hash,
            padding=round(1 - count.tokens / counted.padded_tokens, 4), batches=counted.batches,
            bytes=count.tokens * self.bytes_per_token, seconds=round(seconds, 1),
            peak_bytes=peak_memory(self.model.device),
        )  # fmt: skip

    def __iter__(self) -> Iterator[TokenBatch]:
        """With progress, the corpus is counted first, unless it may be endless: then nothing says how long it will take."""
        return self.batches(0, self.counted.count.tokens if self.progress and self.corpus.is_finite else None)

    def batches(self, start: int = 0, total: int | None = None) -> Iterator[TokenBatch]:
        """Batches from one on; the ones before are read, but not run.

        Args:
            total: Tokens of the corpus, for the progress bar, if they were counted.
        Raises:
            BadCorpus: if there is no text in the corpus.
            NotFinite: if a site holds NaN or infinity.
            OutOfMemory: if not even a single row fits.
        """
        numbered: Iterator[tuple[int, list[Row]]] = self._numbered()
        skipped = 0
        for index, rows in numbered:
            if index == start:
                numbered = chain([(index, rows)], numbered)
                break
            skipped += sum(map(len, rows))
        with self._bar(total, skipped) as bar:
            for batch in self._run(numbered, self.state):
                yield batch
                bar.update(batch.tokens.n)

    def part(self, index: int, of: int) -> Iterator[TokenBatch]:
        """Every `of`-th batch, from the one of this index on: all parts together are the whole. The first batch, by which
        massive tokens are told, is run in each."""
        if index and self.massive_at is not None and self.state.median_norm is None:
            for _ in self._run(islice(self._numbered(), 1), self.state):
                pass
        mine = (one for one in self._numbered() if one[0] % of == index)
        total = self.counted.count.tokens // of if self.progress and self.corpus.is_finite else None
        with self._bar(total) as bar:
            for batch in self._run(mine, self.state):
                yield batch
                bar.update(batch.tokens.n)

    def after(self, token: int, total: int) -> Iterator[tuple[TokenBatch, int]]:
        """Batches from the one on that holds the token of this ordinal, with where in a batch the first wanted one stands."""
        start, before = 0, 0
        for rows in batched(self.corpus.rows(self.model), self.batch_tokens) if token else ():
            if before + (n := sum(map(len, rows))) > token:
                break
            start, before = start + 1, before + n
        for batch in self.batches(start, total):
            yield batch, max(0, min(token - before, batch.tokens.n))
            before += batch.tokens.n

    def _bar(self, total: int | None, done: int = 0) -> tqdm:
        hidden = not self.progress
        return tqdm(total=total, initial=done, desc="stream", unit="token", unit_scale=True, disable=hidden)

    def shape(self, site: Site) -> tuple[int, ...]:
        """Of a token's tensor there."""
        axes = self.model.axes(site)
        return tuple(size for axis, size in axes.items() if axis not in ("batch", "pos") and size is not None)

    def _run(self, numbered: Iterable[tuple[int, list[Row]]], state: StreamState) -> Iterator[TokenBatch]:
        """A GPU is given the next pass before the one before it is waited for."""
        keep_pages()
        ahead = 1 if self.model.device.type == "cuda" else 0
        running: deque[_Pass] = deque()
        for index, rows in numbered:
            for one in self._passes(index, rows, state):
                running.append(one)
                if len(running) > ahead:
                    yield self._finished(running.popleft(), state)
        while running:
            yield self._finished(running.popleft(), state)

    def _passes(self, index: int, rows: list[Row], state: StreamState) -> Iterator[_Pass]:
        """One pass through the model with all rows; or several with fewer, where memory ran out."""
        done = 0
        while done < len(rows):
            budget = min([limit.tokens for limit in state.limits if (limit.batch, limit.row) <= (index, done)], default=None)
            part = rows[done:] if budget is None else rows[done : done + fitting(rows[done:], budget)]
            if (one := self._tried(index, part)) is not None:
                yield one
                done += len(part)
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(part) == 1:
                raise OutOfMemory(
                    f"Memory ran out with a single row of {len(part[0])} tokens and {len(self.sites)} sites. Give the corpus a "
                    "shorter length, ask for fewer sites, or load the model in a smaller dtype."
                )
            state.limits.append(Limit(index, done, padded_tokens(part) // 2))
            log.warning("Memory ran out in batch %d: from here on %d tokens at once.", index, state.limits[-1].tokens)

    def _tried(self, index: int, rows: list[Row]) -> _Pass | None:
        """A pass that was started; None if memory ran out."""
        batch = batch_of(rows, self.model)
        flat = Flat(real_tokens(rows, self.model.device), self.dtype, self.device, self.massive_at, frozenset(self.sites))
        places = dict.fromkeys(self.sites if self.massive_at is None else [*self.sites, self.massive_at])
        try:
            with keeping(self.model, list(places), select=flat) as kept:
                self.model.forward(batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            error.__traceback__ = None  # it holds the frames of the pass, and they its tensors
            return None
        return _Pass(index, rows, flat, {site: kept[site] for site in self.sites})

    def _finished(self, one: _Pass, state: StreamState) -> TokenBatch:
        tokens = tokens_of(one.rows, self._special)
        one.flat.finish(one.kept, tokens)
        if (norms := one.flat.norms) is not None:
            found = norms.cpu().numpy()
            if state.median_norm is None:
                later = tokens.pos >= EARLY_UNTIL
                state.median_norm = float(np.median(found[later] if later.any() else found))
                if not math.isfinite(state.median_norm):
                    raise NotFinite(
                        f"{self.massive_at} holds NaN or infinity, so that massive tokens cannot be told by it. Name another "
                        "site with massive_at, or None, or find where they arise with wb.capture."
                    )
            massive = (tokens.stratum == ORDINARY) & (found > MASSIVE_TIMES * state.median_norm)
            tokens = tokens._replace(stratum=np.where(massive, np.int8(MASSIVE), tokens.stratum))
        names = {ordinal: name for row in one.rows for ordinal, name in row.ids.items()}
        return TokenBatch(self.model, one.index, {str(site): one.kept[site] for site in self.sites}, tokens, names)


class _Pass(NamedTuple):
    """A pass whose tensors may still be on their way."""

    index: int
    rows: list[Row]
    flat: Flat
    kept: dict[Site, Tensor]


def stream(
    model: LanguageModel,
    corpus: Corpus | Any,
    sites: str | Sequence[str],
    *,
    batch_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    massive_at: str | None = "middle",
    progress: bool = True,
    state: StreamState | None = None,
) -> Stream:
    """Run a model over a corpus and give the activations of its real tokens, batch after batch.

    Batches hold rows of like length, longest first in each window of 1,024 rows. When memory runs out, what is left of a batch
    is halved, and so are all batches after it. Memory does not depend on the corpus's length.

    Args:
        corpus: A `Corpus`, or what one is made of.
        sites: As `parse_sites` reads them.
        batch_tokens: Tokens of a batch at most, padding included: 2,048 on a CPU, 8,192 on a GPU, if None.
        dtype, device: Of what is kept; as the model has it, if None. From a GPU to the CPU copies run beside the model, into
            pinned memory.
        massive_at: The site where a state of over 10 times the median norm makes a token massive (Sun et al. 2024, arXiv
            2402.17762); `middle` is `resid_post` of the middle layer, to which a pass goes on for it. None: no token is.
            The median is that of the first batch, from its fifth positions on.
        state: What an earlier stream over the same corpus found (halved batches, median norm), to repeat it exactly.
    Returns:
        An iterable of `TokenBatch`, with `.plan()`.
    Raises:
        UnknownSite: for a site that the model does not have, or whose tensors are no rows of tokens (attention pairs).
    """
    parsed = parse_sites([sites] if isinstance(sites, str) else sites, model.n_layers)
    if not parsed:
        raise UnknownSite("No site was asked for. Name some, such as 'resid_post.3'.")
    if massive_at == "middle":
        massive_at = f"resid_post.{model.n_layers // 2}"
    normed = None if massive_at is None else Site.parse(massive_at, model.n_layers)
    for site in parsed if normed is None else [*parsed, normed]:
        model.tap(site)
        if site.name in PAIRS:
            raise UnknownSite(f"Site '{site}' holds pairs of tokens, of another width in every batch. Use wb.capture.")
    return Stream(
        model,
        corpus if isinstance(corpus, Corpus) else Corpus(corpus),
        parsed,
        batch_tokens=BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]) if batch_tokens is None else batch_tokens,
        dtype=dtype,
        device=model.device if device is None else torch.device(device),
        massive_at=normed,
        progress=progress,
        state=StreamState() if state is None else state,
    )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: can't allocate" in str(error)
