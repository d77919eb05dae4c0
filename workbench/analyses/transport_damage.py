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
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analyses.held_out_loss import FITTED, held_out_rows, in_batches, losses
from workbench.analyses.transport_pairs import Split
from workbench.corpus.corpus import EARLY_UNTIL, Corpus
from workbench.intervention import intervene
from workbench.model import LanguageModel
from workbench.moments.layout import Pair
from workbench.substitution import Written, substitute
from workbench.transports.transport import Transport

WAYS = ("exact", "transported", "mean", "resampled", "empty", "zero")
"""The state itself; what the map makes of the source; the mean of the target; its state at another token, drawn at random; what
the map makes of zeros; zeros."""


def damage_rows(
    model: LanguageModel,
    corpus: Corpus,
    splits: Sequence[tuple[Pair, Split]],
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
        splits: Pairs, with the map that was fitted on the first fold.
        tokens: Held-out tokens that the loss is measured on.
        one_in: Of the positions from the fifth on, every so-manieth is replaced.
        seed: Of the resampled tokens.
    Raises:
        TooFewTokens: if no held-out document has two tokens.
        OtherJob, UnknownSite, ReadOnlySite: if the target cannot be written.
    """
    rows = held_out_rows(corpus, model, tokens)
    clean = losses(model, rows, batch_tokens, nullcontext())
    found = []
    for pair, split in tqdm(splits, desc="damage", disable=not progress):
        states: list[Tensor] = []
        losses(model, rows, batch_tokens, intervene(model, Written(site=pair.target, made=partial(_noted, states))))
        real = [
            own[i, EARLY_UNTIL : len(row)]
            for own, some in zip(states, in_batches(rows, batch_tokens), strict=True)
            for i, row in enumerate(some)
        ]
        mean = split.inside.mean_y
        changed: dict[str, AbstractContextManager[None]] = {
            "exact": _written(model, pair, one_in, _in_turn(states)),
            "transported": substitute(model, _transport(model, pair, split), skip=EARLY_UNTIL, one_in=one_in),
            "mean": _written(model, pair, one_in, partial(_filled, mean)),
            "resampled": _written(model, pair, one_in, _resampled(real, seed)),
            "empty": _written(model, pair, one_in, partial(_filled, split.fitted.bias)),
            "zero": _written(model, pair, one_in, partial(_filled, torch.zeros_like(mean))),
        }
        own = {way: losses(model, rows, batch_tokens, change).change(clean) for way, change in changed.items()}
        ablated = own["mean"][0]
        found += [
            {
                "source": pair.source, "target": pair.target, "way": way, "change": change, "change_error": error,
                "restored": 1 - change / ablated if ablated > 0 else float("nan"), "clean_loss": float(clean.nats.mean()),
                "n": len(clean.nats),
            }
            for way, (change, error) in own.items()
        ]  # fmt: skip
    return found


def first_split(splits: Sequence[Split]) -> Split:
    """The one whose map was fitted on the first fold: the second one's, which it predicts."""
    return next(one for one in splits if one.fold != FITTED)


def _transport(model: LanguageModel, pair: Pair, split: Split) -> Transport:
    settings = Transport.identity(model, *pair[:2]).settings | {"kind": "ridge", "affine": True}
    return Transport(*pair[:2], split.fitted.left, split.fitted.right, split.fitted.bias, settings)


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
