"""The same texts, run again and again from a layer on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.capturing import keeping
from workbench.corpus.corpus import Row
from workbench.model import Batch, LanguageModel
from workbench.sites import Site
from workbench.streaming.batches import batch_of, batched
from workbench.tracer import is_hooked, starting_at

LOGITS_AT_ONCE = 2048
"""Tokens whose logits are in memory at once."""


class Run(NamedTuple):
    """A batch that is to be run."""

    rows: list[Row]
    batch: Batch
    begun: AbstractContextManager[None]
    """While open, a pass begins at the layer."""


class Rerun:
    """Rows of tokens in batches, with the stream at the layer from which they are run.

    Experiments that change a model from a layer on differ in nothing before it. One after the other in the order of their
    layers, they cost what lies behind these: the stream is moved on from one to the next, and begun again at a lower one. It
    holds d_model numbers a token, beside the model, and is that of the weights with which it was made.
    """

    def __init__(self, model: LanguageModel, rows: Sequence[Row], batch_tokens: int | None) -> None:
        self.model = model
        self.batches = list(batched(rows, min(batch_tokens or LOGITS_AT_ONCE, LOGITS_AT_ONCE)))
        self._to_first()

    def since(self, layer: int) -> list[Run]:
        """Every batch, to be run from a layer on: what is read or changed then must be the state that enters the layer, or lie
        behind it, and is lost where it does not. Where edits are open already (or hooks of the caller's own), batches are run
        from the beginning: those may be anywhere."""
        if layer < self._layer or is_hooked(self.model):
            self._to_first()
        elif layer > self._layer:
            self._streams = self._at(Site("resid_pre", layer))
            self._layer = layer
        runs = []
        for rows, stream in zip(self.batches, self._streams, strict=True):
            begun = nullcontext() if stream is None else starting_at(self.model, self._layer, stream)
            runs.append(Run(rows, batch_of(rows, self.model), begun))
        return runs

    def _to_first(self) -> None:
        self._layer = 0
        self._streams: list[Tensor | None] = [None] * len(self.batches)

    @torch.no_grad()
    def _at(self, site: Site) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for run in self.since(self._layer):
            with run.begun, keeping(self.model, [site]) as kept:
                self.model.forward(run.batch)
            found.append(kept[site])
        return found
