"""Directions of a state weighed by what comes of them: by the model's output, or by the next block's reading.

A score that counts all variance alike (or all canonical directions alike) counts what nothing ever reads. The Fisher matrix
of the final distribution says what a small change of a state does to it: KL(p ‖ p changed) = ½ δᵀ F δ. It is estimated without
bias as E[g gᵀ], g the gradient of the log-probability of tokens drawn from the model itself, at all positions at once: scores
of different positions are uncorrelated, so that what a state does to later tokens is in it too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workbench.capturing import keeping
from workbench.corpus.corpus import ORDINARY, Corpus
from workbench.errors import TooFewTokens
from workbench.frozen_norm import frozen_norm
from workbench.model import LanguageModel
from workbench.moments.accumulator import Accumulator, waiting_tokens
from workbench.moments.layout import Layout
from workbench.sites import Site, state_number
from workbench.streaming.batches import batch_of, batched, first_rows, tokens_of

FISHER_TOKENS = 2048
"""Whose gradients are summed, if no number is given."""
AT_ONCE = 512
"""Tokens whose graph is in memory at once."""
READS = (("W_Q", "ln1"), ("W_K", "ln1"), ("W_V", "ln1"), ("W_in", "ln2"), ("W_gate", "ln2"))


def fisher(
    model: LanguageModel, corpus: Corpus, sites: Sequence[str], *, tokens: int = FISHER_TOKENS, seed: int = 0
) -> dict[str, Tensor]:
    """The Fisher matrix of the final distribution at sites of the stream, `[d_model, d_model]` float64, summed over ordinary
    tokens (massive ones, which only a stream tells apart, among them).

    Args:
        tokens: So many, the first of the corpus, to the end of their row.
        seed: Of the tokens that are drawn.
    Raises:
        TooFewTokens: if the corpus has no ordinary token.
        UnknownSite, ReadOnlySite: if a site cannot be followed.
    """
    layout = Layout(dict.fromkeys(sites, model.d_model), (), "one", 1, 1)
    dtype = torch.promote_types(model.dtype, torch.float32)
    accumulator = Accumulator(layout, model.device, dtype, tokens=min(waiting_tokens(model.device), tokens + AT_ONCE))
    places = [Site.parse(site, model.n_layers) for site in sites]
    special, generator = np.array(sorted(model.tokenizer.all_special_ids), np.int32), torch.Generator().manual_seed(seed)
    for rows in batched(first_rows(corpus.rows(model), tokens), AT_ONCE):
        batch, known = batch_of(rows, model), tokens_of(rows, special)
        with keeping(model, places, to_the_end=True, gradients=True) as kept:
            logits = model.forward(batch)
            chances = torch.softmax(logits.detach().float(), -1)
            drawn = torch.multinomial(chances.flatten(0, 1).cpu(), 1, generator=generator).view(batch.tokens.shape)
            surprise = torch.log_softmax(logits.float(), -1).gather(-1, drawn.to(logits.device)[..., None])[..., 0]
            found = torch.autograd.grad(surprise[batch.mask].sum(), [kept[place] for place in places], allow_unused=True)
        ordinary = known.stratum == ORDINARY
        at = torch.from_numpy(ordinary).to(batch.mask.device)
        gradients = {
            site: (torch.zeros_like(kept[place]) if own is None else own).detach()[batch.mask][at].to(dtype)
            for site, place, own in zip(sites, places, found, strict=True)
        }
        accumulator.add(gradients, known.stratum[ordinary], known.document[ordinary])
    sums = accumulator.sums().finished(torch.device("cpu"))
    n = int(sums.n.sum())
    if not n:
        raise TooFewTokens("The corpus has no ordinary token, so nothing says what the output depends on. Take more text.")
    found = {}
    for site, columns in layout.columns.items():
        pilot, total = sums.pilot[0, columns], sums.total[site].sum((0, 1))
        moved = torch.outer(pilot, total)
        found[site] = sums.own[site].sum((0, 1)) + moved + moved.T + n * torch.outer(pilot, pilot)
    return found


def readers(model: LanguageModel, site: str, layer: int | None = None) -> Tensor | None:
    """What a block reads of a state, `[d_model, d_model]` float64: the sum over its read matrices M (queries, keys, values, the
    MLP's input and gate) of M Mᵀ / tr(M Mᵀ), behind the linear part of the norm that feeds each. None if there is nothing to
    read: for sites that are no states, and for a block without attention, or whose MLP is experts.

    Args:
        layer: Of the block; the one that the state enters, if None.
    Raises:
        UnreadableWeight, UnknownNorm: as `model.weight` and `frozen_norm`.
    """
    number = state_number(site, model.n_layers)
    layer = number if layer is None else layer
    if number is None or layer is None or not number <= layer < model.n_layers:
        return None
    block, total = model.block_row(layer), torch.zeros(model.d_model, model.d_model, dtype=torch.float64)
    # Where the norm is held changes its scale alone, and each matrix is taken relative to its size.
    held = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    for name, norm in READS:
        weight = model.optional_weight(name, layer)
        if weight is None and name != "W_gate":
            return None
        if weight is None:
            continue
        rows = weight.detach().transpose(0, 1).flatten(1).T if weight.dim() == 3 else weight.detach().T
        path = getattr(block, norm)
        if path is not None:
            rows = frozen_norm(model, model.row.path(path, layer), held).pulled_back(rows)
        rows = rows.double().cpu()
        total += rows.T @ rows / rows.square().sum()
    return total
