"""How far a changed model's output is from its own, on documents that no map was fitted on: loss, KL, likeliest token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench.analyses.held_out_loss import counted, mean_and_error
from workbench.analyses.rerun import Rerun
from workbench.capturing import keeping
from workbench.corpus.corpus import Row
from workbench.model import LanguageModel
from workbench.projector import Projector
from workbench.sites import Site


class Change(NamedTuple):
    """Means over tokens, with their standard errors over documents; infinite, without one, if a last state is no number."""

    change: float
    """Of the loss, nats a token: what the changed model's is more."""
    change_error: float
    kl_nats: float
    """KL(untouched || changed)."""
    kl_error: float
    agreement: float
    """How often the likeliest token is the untouched model's."""
    agreement_error: float
    overflowed: float
    """The share of tokens whose last state is no number."""


class HeldOut:
    """Some rows, and what the untouched model makes of them.

    The model's last states are kept, and both outputs are made of them tile by tile of the vocabulary: all logits of some
    thousand tokens, twice, would be gigabytes. It costs a second product with the unembedding in every pass.
    """

    def __init__(self, model: LanguageModel, rows: Sequence[Row], batch_tokens: int | None) -> None:
        self.model = model
        self._texts = Rerun(model, rows, batch_tokens)
        self._project = Projector(model.vocabulary, "norm", k=1)
        self.document = np.concatenate([row.documents[1:][counted(row)] for some in self._texts.batches for row in some])
        self._next = [_following(some) for some in self._texts.batches]
        self._clean = list(self._states(nullcontext()))
        own = [self._project(states, targets) for states, targets in zip(self._clean, self._next, strict=True)]
        self._best = [found.top_ids[:, 0] for found in own]
        self.nats = torch.cat([-found.target_log_probabilities[:, 0] for found in own]).double().cpu().numpy()

    def under(self, changed: AbstractContextManager[object], since: int = 0) -> Change:
        """What becomes of the outputs while the model is changed, from the state that enters the layer `since` on. A token
        whose last state is no number has lost all."""
        nats, kl, agrees, overflows = [], [], [], []
        states = zip(self._states(changed, since), self._clean, self._next, self._best, strict=True)
        for rows, clean, targets, best in states:
            finite = rows.isfinite().all(1, keepdim=True)
            found = self._project(torch.where(finite, rows, clean), targets, clean)
            assert found.kl_nats is not None
            there = finite[:, 0].to(best.device)
            nats.append((-found.target_log_probabilities[:, 0]).where(there, torch.inf))
            kl.append(found.kl_nats.where(there, torch.inf))
            agrees.append((found.top_ids[:, 0] == best) & there)
            overflows.append(~there)
        more, divergence, agreement = (torch.cat(part).double().cpu().numpy() for part in (nats, kl, agrees))
        return Change(
            *mean_and_error(more - self.nats, self.document), *mean_and_error(divergence, self.document),
            *mean_and_error(agreement, self.document), float(torch.cat(overflows).double().mean()),
        )  # fmt: skip

    @torch.no_grad()
    def _states(self, changed: AbstractContextManager[object], since: int = 0) -> list[Tensor]:
        """By batch, what the final norm reads at the tokens that are counted, `[token, d_model]`."""
        last, found = Site("resid_post", self.model.n_layers - 1), []
        runs = self._texts.since(since)
        with changed:
            for run in runs:
                with run.begun, keeping(self.model, [last]) as kept:
                    self.model.forward(run.batch)
                at = [torch.from_numpy(np.flatnonzero(counted(row))).to(kept[last].device) for row in run.rows]
                found.append(torch.cat([kept[last][index, own] for index, own in enumerate(at)]))
        return found


def _following(rows: Sequence[Row]) -> Tensor:
    """The token that each counted one foretells, `[token, 1]`."""
    return torch.cat([torch.from_numpy(row.tokens[1:][counted(row)]).long() for row in rows])[:, None]
