"""What the model loses when a state is replaced by what was carried there, and what it would lose by other replacements.

Szablewski and Masiak 2025 (arXiv 2508.17540) put the transported state in the real one's place and compare with zeros and with
the operator fed with zeros, at all positions. Zeros are far from anything the model has seen, and the operator fed with zeros
writes its intercept, not the mean; so mean and resample ablation stand beside them, the first positions, on which attention
rests, are left alone, and the exact state put back shows that nothing else changes. Losses are of documents that the map was
not fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analyses.held_out_loss import FITTED, held_out_rows, losses
from workbench.analyses.rerun import Rerun
from workbench.analyses.transport_pairs import Split
from workbench.corpus.corpus import EARLY_UNTIL, Corpus
from workbench.errors import ReadOnlySite, UnknownOption
from workbench.intervention import intervene
from workbench.model import LanguageModel
from workbench.moments.layout import Pair
from workbench.sites import Site, depth
from workbench.substitution import Written, substitute
from workbench.transports.fit import Fitted
from workbench.transports.transport import Transport

WAYS = ("exact", "transported", "mean", "resampled", "empty", "zero")
"""The state itself; what the map makes of the source; the mean of the target; its state at another token, drawn at random; what
the map makes of zeros; zeros."""


class Standing(NamedTuple):
    """What may stand in a target's place."""

    pair: Pair
    fitted: Fitted
    """The map, fitted on the first fold of documents."""
    mean: Tensor
    """Of the target there."""

    @classmethod
    def of(cls, pair: Pair, splits: Sequence[Split]) -> Standing:
        split = next(one for one in splits if one.fold != FITTED)
        return cls(pair, split.fitted, split.inside.mean_y)


def require_writable(model: LanguageModel, pair: Pair) -> None:
    """
    Raises:
        UnknownOption: if the source does not come before the target.
        ReadOnlySite: if the target cannot be written.
    """
    source, target = (Site.parse(site, model.n_layers) for site in pair[:2])
    if depth(source, model.n_layers) >= depth(target, model.n_layers):
        raise UnknownOption(
            f"Damage of {pair}: a pass computes the target first, so nothing of the source can stand in its place."
        )
    if (why := model.tap(target).passed_by) is not None:
        raise ReadOnlySite(f"Damage of {pair}: site '{target}' can be read, but not written: {why}.")


def damage_rows(
    model: LanguageModel,
    corpus: Corpus,
    maps: Sequence[Standing],
    *,
    tokens: int,
    one_in: int,
    batch_tokens: int | None,
    seed: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """A row a pair and way: change of the loss (nats a token) with its standard error over documents, and `restored`: the share
    of what mean ablation costs that this way does not.

    Args:
        maps: Those that were fitted on the first fold of documents.
        tokens: Held-out tokens that the loss is measured on.
        one_in: Of the positions from the fifth on, every so-manieth is replaced.
        seed: Of the resampled tokens.
    Raises:
        TooFewTokens: if no held-out document has two tokens.
        OtherJob, UnknownSite, ReadOnlySite: if the target cannot be written.
    """
    texts = Rerun(model, held_out_rows(corpus, model, tokens), batch_tokens)
    clean = losses(texts, nullcontext())
    found = []
    for pair, fitted, mean in tqdm(maps, desc="damage", disable=not progress):
        states: list[Tensor] = []
        first = Site.parse(pair.source, model.n_layers).layer or 0
        losses(texts, _written(model, pair, one_in, partial(_noted, states)), since=first)
        # Of batches with a fifth position alone: others are not written to, neither here nor below.
        written = [some for some in texts.batches if len(some[0]) > EARLY_UNTIL]
        real = [own[i, EARLY_UNTIL : len(row)] for own, some in zip(states, written, strict=True) for i, row in enumerate(some)]
        changed: dict[str, AbstractContextManager[None]] = {
            "exact": _written(model, pair, one_in, _in_turn(states)),
            "transported": substitute(model, _transport(model, pair, fitted), skip=EARLY_UNTIL, one_in=one_in),
            "mean": _written(model, pair, one_in, partial(_filled, mean)),
            "resampled": _written(model, pair, one_in, _resampled(real, seed)),
            "empty": _written(model, pair, one_in, partial(_filled, fitted.bias)),
            "zero": _written(model, pair, one_in, partial(_filled, torch.zeros_like(mean))),
        }
        own = {way: losses(texts, change, since=first).change(clean) for way, change in changed.items()}
        ablated = own["mean"][0]
        found += [
            {
                "source": pair.source, "target": pair.target, "way": way, "change": change, "change_error": error,
                "restored": 1 - change / ablated if ablated > 0 else float("nan"), "clean_loss": float(clean.nats.mean()),
                "n": len(clean.nats), "documents": len(np.unique(clean.document)),
            }
            for way, (change, error) in own.items()
        ]  # fmt: skip
    return found


def _transport(model: LanguageModel, pair: Pair, fitted: Fitted) -> Transport:
    settings = Transport.identity(model, *pair[:2]).settings | {"kind": "ridge", "affine": True}
    return Transport(*pair[:2], fitted.left, fitted.right, fitted.bias, settings)


def _written(model: LanguageModel, pair: Pair, one_in: int, made: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    return intervene(model, Written(site=pair.target, made=made, skip=EARLY_UNTIL, one_in=one_in))


def _noted(states: list[Tensor], seen: Tensor) -> Tensor:
    states.append(seen.clone())
    return seen


def _in_turn(states: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The states of each batch, in the order in which these come."""
    left = iter(states)
    return lambda seen: next(left)


def _filled(values: Tensor, seen: Tensor) -> Tensor:
    return values.to(seen).view(seen.shape[2:]).expand_as(seen)


def _resampled(states: list[Tensor], seed: int) -> Callable[[Tensor], Tensor]:
    """The state of another token of these texts."""
    bank = torch.cat(states)
    generator = torch.Generator().manual_seed(seed)
    return lambda seen: bank[torch.randint(len(bank), seen.shape[:2], generator=generator).to(bank.device)]
