"""From rows of tokens to batches: of like length, so that little is padding, and of no more tokens than a budget."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench.corpus.corpus import Row, strata
from workbench.errors import UnknownOption
from workbench.model import Batch, LanguageModel

WINDOW = 1024
"""Rows among which those of like length are put together. They stay in memory; a longer window saves little padding more."""


class Tokens(NamedTuple):
    """What is known of the real tokens of some rows, row after row; arrays are `[token]`."""

    token_id: np.ndarray
    document: np.ndarray
    """Ordinal of the token's document in the corpus."""
    offset: np.ndarray
    """Where it stands in its document; -1 for a token of beginnings that was put before a row."""
    row: np.ndarray
    """Ordinal of its row in the corpus."""
    pos: np.ndarray
    """Where it stands in its row."""
    stratum: np.ndarray
    """Index into `workbench.corpus.corpus.STRATA`."""

    @property
    def n(self) -> int:
        return len(self.token_id)


def batched(rows: Iterable[Row], budget: int, window: int = WINDOW) -> Iterator[list[Row]]:
    """Rows in batches, longest first within a window of the corpus: always the same ones for the same rows and budget.

    Args:
        budget: Tokens of a batch at most, padding included; a longer row is a batch by itself.
    Raises:
        UnknownOption: for numbers out of range.
    """
    if budget < 1 or window < 1:
        raise UnknownOption(f"batch_tokens={budget}, window={window}: both must be 1 or more.")
    rows = iter(rows)
    while some := list(islice(rows, window)):
        some.sort(key=len, reverse=True)
        start = 0
        while start < len(some):
            n = fitting(some[start:], budget)
            yield some[start : start + n]
            start += n


def first_rows(rows: Iterable[Row], tokens: int, folds: int = 1) -> Iterator[Row]:
    """The first rows, until each fold of documents (their ordinal modulo `folds`) has its share of so many tokens; rows that
    bring a fold nothing that it lacks are left out."""
    left = np.full(folds, -(-tokens // folds))
    for row in rows:
        own = np.bincount(row.documents % folds, minlength=folds)
        if ((own > 0) & (left > 0)).any():
            left -= own
            yield row
        if (left <= 0).all():
            return


def fitting(rows: list[Row], budget: int) -> int:
    """How many of the rows, longest first, fit the budget; at least one."""
    return max(1, budget // len(rows[0]))


def padded_tokens(rows: list[Row]) -> int:
    """Tokens of a batch of these rows, longest first, padding included."""
    return len(rows) * len(rows[0])


def batch_of(rows: list[Row], model: LanguageModel) -> Batch:
    """The rows, padded on the right to the length of the first, the longest."""
    tokens = torch.zeros(len(rows), len(rows[0]), dtype=torch.long)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row.tokens), True
    return Batch(tokens.to(model.device, non_blocking=True), mask.to(model.device, non_blocking=True))


def real_tokens(rows: list[Row], device: torch.device) -> Tensor | None:
    """Where the real tokens stand in the flattened padded batch; None if none is padding. Counted on the CPU: asking a mask on
    a GPU would wait for all that the GPU has yet to do."""
    length = len(rows[0])
    if all(len(row) == length for row in rows):
        return None
    index = np.concatenate([np.arange(i * length, i * length + len(row)) for i, row in enumerate(rows)])
    return torch.from_numpy(index).to(device, non_blocking=True)


def tokens_of(rows: list[Row], special: np.ndarray) -> Tokens:
    """The real tokens of the rows, with strata as far as text alone says them."""
    joined: Any = np.concatenate
    ids, pos = joined([row.tokens for row in rows]), joined([np.arange(len(row), dtype=np.int32) for row in rows])
    return Tokens(
        token_id=ids,
        document=joined([row.documents for row in rows]),
        offset=joined([row.offsets for row in rows]),
        row=joined([np.full(len(row), row.index, np.int32) for row in rows]),
        pos=pos,
        stratum=strata(ids, pos, special),
    )
