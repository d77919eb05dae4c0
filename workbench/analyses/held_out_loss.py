"""The model's loss on documents that no map was fitted on, and what a change of the model does to it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from workbench.analyses.rerun import Rerun
from workbench.corpus.corpus import Corpus, Row
from workbench.errors import TooFewTokens
from workbench.model import LanguageModel

FITTED, HELD_OUT = 0, 1
"""Folds of documents, of two."""


class Losses(NamedTuple):
    """Of held-out tokens, with the document of each."""

    nats: np.ndarray
    document: np.ndarray

    def change(self, other: Losses) -> tuple[float, float]:
        """How much more this is than the other, and its standard error over documents."""
        return mean_and_error(self.nats - other.nats, self.document)


def mean_and_error(values: np.ndarray, document: np.ndarray) -> tuple[float, float]:
    """Mean over tokens, and its standard error over documents: tokens of one are not independent."""
    mean = float(values.mean())
    if not np.isfinite(mean):
        return mean, float("nan")
    by_document = np.bincount(np.unique(document, return_inverse=True)[1], values - mean)
    n = len(by_document)
    error = float(np.sqrt((by_document**2).sum() * n / (n - 1)) / len(values)) if n > 1 else float("nan")
    return mean, error


def held_out_rows(corpus: Corpus, model: LanguageModel, tokens: int) -> list[Row]:
    """The first rows that hold tokens of the second fold, as many as have so many of these.

    Raises:
        TooFewTokens: if no held-out document has two tokens.
    """
    chosen: list[Row] = []
    found = 0
    for row in corpus.rows(model):
        own = int(counted(row).sum())
        if own:
            chosen.append(row)
            found += own
        if found >= tokens:
            break
    if not found:
        raise TooFewTokens("No held-out document has two tokens, so no loss can be measured. Take more text.")
    return chosen


def counted(row: Row) -> np.ndarray:
    """Which tokens of a row, the first apart, are foretold from a token of their own, held-out document."""
    return (row.documents[1:] % 2 == HELD_OUT) & (row.documents[1:] == row.documents[:-1])


@torch.no_grad()
def losses(texts: Rerun, changed: AbstractContextManager[object], since: int = 0) -> Losses:
    """While the model is changed, from the state that enters the layer `since` on."""
    nats, documents = [], []
    runs = texts.since(since)
    with changed:
        for run in runs:
            with run.begun:
                logits = texts.model.forward(run.batch)
            for index, row in enumerate(run.rows):
                own = counted(row)
                at = torch.from_numpy(np.flatnonzero(own)).to(logits.device)
                found = F.cross_entropy(logits[index, at].float(), run.batch.tokens[index, at + 1], reduction="none")
                nats.append(found.double().cpu().numpy())
                documents.append(row.documents[1:][own])
    return Losses(np.concatenate(nats), np.concatenate(documents))
