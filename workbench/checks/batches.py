"""Identities of batches: padding on either side changes nothing, and no token sees a later one."""

from collections.abc import Iterator

import torch

from workbench.checks.check import LENGTHS, Check, check, error
from workbench.model import Batch, LanguageModel


def batches(model: LanguageModel, batch: Batch) -> Iterator[Check]:
    """A padded batch gives each row the logits that it has alone, and a text's beginning those that it has in the text."""
    single = [model.forward(Batch(batch.tokens[i : i + 1, :n], batch.mask[i : i + 1, :n]))[0] for i, n in enumerate(LENGTHS)]
    for side in ("right", "left"):
        tokens, mask = batch
        if side == "left":
            tokens = torch.stack([row.roll(max(LENGTHS) - n) for row, n in zip(tokens, LENGTHS, strict=True)])
            mask = mask.flip(1)
        logits = model.forward(Batch(tokens, mask))
        errors = [error(logits[i][mask[i].to(logits.device)], alone) for i, alone in enumerate(single)]
        yield check(f"a {side}-padded batch = its single rows", None, lambda errors=errors: max(errors), through=True)
    n = LENGTHS[0] - 1
    beginning = model.forward(Batch(batch.tokens[:1, :n], batch.mask[:1, :n]))[0]
    yield check("a later token moves no earlier logit", None, lambda: error(beginning, single[0][:n]), through=True)
