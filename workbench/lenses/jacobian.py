"""The Jacobian lens: how the last state moves, on average, with a state in the middle.

Source: Gurnee et al. 2026 (transformer-circuits.pub/2026/workspace). For a source position t, the derivative of the last state
at all positions t' from t on is summed; this is averaged over the source positions of a prompt, and then over prompts. The
first 16 positions and the last are neither source nor target. The lens is read without a bias.

The variant of the same position counts t' = t alone, the one that a lens reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from workbench.capturing import keeping
from workbench.corpus.corpus import Corpus, Row, Tally
from workbench.errors import OutOfMemory, TooFewTokens, UnknownOption
from workbench.lenses.lens import Lens
from workbench.lenses.shortcut import sources
from workbench.lenses.unfinished import Unfinished
from workbench.model import LanguageModel
from workbench.results import versions
from workbench.sites import Site, state
from workbench.streaming.batches import batch_of, batched
from workbench.transports.transport import Transport, of_model

LENGTH = 128
"""Tokens of a prompt at most, as published."""
SKIP = 16
"""First positions that are left out, as published."""
BATCH_TOKENS = {"cpu": 512, "cuda": 8192}
"""Whose graph is in memory at once: about 2 MB a token of a model of the size of SmolLM2-135M in float32."""


def fit_jacobian(
    model: LanguageModel,
    corpus: Corpus | Any,
    *,
    sites: str | Sequence[str] | None = None,
    same_position: bool = False,
    skip: int = SKIP,
    batch_tokens: int | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Lens:
    """Average the derivative of the last state by every state over a corpus.

    Rows of the corpus are its prompts, of 128 tokens if it has no length of its own; those without a source position are left
    out. Nine documents in ten are used: see `Corpus.held_out`. One forward pass and d_model backward passes a batch, which
    serve
    all sites: 0.1 TFLOP a token for SmolLM2-135M, so a GPU suits.

    Args:
        sites: Sites of the stream that maps begin at; all states before the last, if None.
        same_position: Count each source position's own target alone. All targets are followed in one pass with signs drawn at
            random, by whose products other positions fall out in the mean: an estimate without bias.
        skip: First positions left out.
        batch_tokens: Tokens of a batch, padding included; 512 on a CPU, 8,192 on a GPU, if None.
        folder: Where an unfinished fit is kept after every batch, and taken up again.
        seed: Of the signs.
    Raises:
        TooFewTokens: if no row has a source position.
        UnknownOption: for numbers out of range, or a corpus that may have no end.
        OutOfMemory: if the graph of a batch does not fit.
        OtherJob: if the folder holds an unfinished fit with other settings.
        UnknownSite, LayerOutOfRange, BadCorpus, CannotWrite: as `fit_shortcut`.
    """
    if skip < 0 or (batch_tokens is not None and batch_tokens < 1):
        raise UnknownOption(f"skip={skip}, batch_tokens={batch_tokens}: skip is 0 or more, batch_tokens 1 or more.")
    texts = (corpus if isinstance(corpus, Corpus) else Corpus(corpus)).training().cut(min(LENGTH, model.n_context or LENGTH))
    if not texts.is_finite:
        raise UnknownOption("The corpus may have no end, and a mean over its prompts needs one. Give it max_tokens.")
    named, last = sources(model, sites), state(model.n_layers, model.n_layers)
    for site in named:
        model.tap(Site.parse(site, model.n_layers))
    tally, at_once = Tally(), batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])
    rows = [row for row in tally.of(texts.rows(model)) if len(row) > skip + 1]
    if not rows:
        raise TooFewTokens(
            f"No row has more than {skip + 1} tokens, so that none is left without the first {skip} and the last. Take longer "
            "text, or a smaller skip."
        )
    kind = "jacobian_same_position" if same_position else "jacobian"
    settings = of_model(model) | texts.settings | {
        "kind": kind, "affine": False, "row_length": texts.row_length(model), "sites": named, "prompts": len(rows),
        "tokens": sum(len(row) - skip - 1 for row in rows), "skip": skip, "seed": seed, "batch_tokens": at_once,
        "tokens_hash": tally.count.tokens_hash, "versions": versions(),
    }  # fmt: skip
    unfinished = Unfinished(folder, settings)
    d = model.d_model
    tensors, done = unfinished.found() or ({"sums": torch.zeros(len(named), d, d, dtype=torch.float64)}, 0)
    sums = tensors["sums"].to(model.device)
    batches = list(batched(rows, at_once))
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=len(batches) * d, initial=done * d, desc=f"{kind} lens", unit="pass", disable=not progress) as bar:
        for i, some in enumerate(batches):
            signs = torch.randint(0, 2, (len(some), len(some[0])), generator=generator) * 2.0 - 1 if same_position else None
            if i >= done:
                try:
                    _add_derivatives(model, some, named, last, skip, signs, sums, bar)
                except torch.OutOfMemoryError:
                    raise OutOfMemory(
                        f"Memory ran out with the graph of {len(some)} rows of {len(some[0])} tokens. Give a smaller "
                        f"batch_tokens (it is {at_once:,})."
                    ) from None
                unfinished.keep({"sums": sums}, i + 1)
    maps = [
        Transport(site, last, own.T.contiguous(), None, torch.zeros(d, dtype=torch.float64), settings)
        for site, own in zip(named, (sums / len(rows)).cpu(), strict=True)
    ]
    return Lens.of(maps, kind, settings)


def _add_derivatives(
    model: LanguageModel,
    rows: list[Row],
    sites: Sequence[str],
    last: str,
    skip: int,
    signs: Float[Tensor, "row pos"] | None,
    sums: Float[Tensor, "site d_model d_model"],
    bar: tqdm,
) -> None:
    """Add, for each row, the mean over its source positions of d last / d site, an output coordinate a line."""
    n, device = model.n_layers, model.device
    parsed = [_differentiated(Site.parse(site, n)) for site in [*sites, last]]
    with keeping(model, parsed, gradients=True) as kept:
        model.forward(batch_of(rows, model))
    *states, final = (kept[site] for site in parsed)
    chosen = _positions(rows, skip).to(device)
    share = (chosen / chosen.sum(1, keepdim=True)).float()
    followed = chosen.to(final.dtype)
    if signs is not None:
        share, followed = share * signs.to(share), followed * signs.to(followed)
    for i in range(model.d_model):
        cotangent = torch.zeros_like(final)
        cotangent[..., i] = followed
        for own, gradient in zip(sums, torch.autograd.grad(final, states, cotangent, retain_graph=True), strict=True):
            own[i] += torch.tensordot(share.to(gradient.device), gradient.float(), 2).to(own.device)
        bar.update()


def _differentiated(site: Site) -> Site:
    """Where a site's derivative is taken: no module gives the stream after attention, but what attention adds to it has the
    same derivative."""
    return Site("attn_out", site.layer) if site.name == "resid_mid" else site


def _positions(rows: list[Row], skip: int) -> Bool[Tensor, "row pos"]:
    """Those that are source and target: after the first, before each row's last."""
    pos = torch.arange(len(rows[0]))
    return torch.stack([(pos >= skip) & (pos < len(row) - 1) for row in rows])
