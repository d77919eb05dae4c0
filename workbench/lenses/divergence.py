"""KL from a model's own output to what a lens says, and its gradient: what a tuned lens is trained on.

The chunk of logits that is in memory has one lens's logits of some tokens; those of all layers are never there together. The
gradient of KL(p || q) to the logits of q is q - p, so it costs one product with the unembedding more, and no graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.projection import accumulation_dtype
from workbench.tiles import TILE, spans
from workbench.vocabulary import Vocabulary


class Teacher:
    """The output's own distribution for some tokens."""

    @torch.no_grad()
    def __init__(self, vocabulary: Vocabulary, last: Float[Tensor, "token d_model"]) -> None:
        """
        Args:
            last: The states that the final norm reads.
        """
        rows = vocabulary.decoded(last, "norm")
        self.probabilities = torch.empty(len(last), vocabulary.d_vocab, device=rows.device, dtype=accumulation_dtype(rows))
        """`[token, d_vocab]`"""
        _logits(vocabulary, rows, self.probabilities)
        normaliser = self.probabilities.logsumexp(1, keepdim=True)
        entropy = torch.zeros(len(last), device=rows.device, dtype=torch.float64)
        for a, b in spans(vocabulary.d_vocab, TILE):
            log_p = self.probabilities[:, a:b].sub_(normaliser)
            p = log_p.exp()
            entropy -= torch.linalg.vecdot(p, log_p)
            log_p.copy_(p)
        self.entropy = entropy
        """Nats, float64, `[token]`."""


class Divergence(NamedTuple):
    """Of some tokens."""

    kl: Float[Tensor, " token"]
    """KL(output || lens), nats, float64."""
    gradient: Float[Tensor, "token d_model"]
    """Of the sum of `kl`, to the rows."""


@torch.no_grad()
def divergence(
    vocabulary: Vocabulary, rows: Float[Tensor, "token d_model"], teacher: Teacher, space: Float[Tensor, "token d_vocab"]
) -> Divergence:
    """
    Args:
        rows: As the final norm gives them (`Vocabulary.decoded`), in the dtype that they are multiplied in.
        space: Is written over.
    """
    z = _logits(vocabulary, rows, space)
    normaliser = z.logsumexp(1, keepdim=True)
    mean = torch.zeros(len(rows), device=rows.device, dtype=torch.float64)
    gradient = torch.zeros(rows.shape, device=rows.device, dtype=z.dtype)
    for a, b in spans(vocabulary.d_vocab, TILE):
        own, p = z[:, a:b], teacher.probabilities[:, a:b]
        mean += torch.linalg.vecdot(p, own)
        slope = None if vocabulary.softcap is None else 1 - (own / vocabulary.softcap) ** 2
        own.sub_(normaliser).exp_().sub_(p)
        if slope is not None:
            own.mul_(slope)
        U = vocabulary.W_U[:, a:b]
        gradient += own.to(U.dtype) @ U.T if U.dtype == rows.dtype else own @ U.T.to(own.dtype)
    kl = normaliser[:, 0].double() - mean - teacher.entropy
    return Divergence(kl.clamp_min(0), gradient.mul_(vocabulary.logit_scale))


def _logits(vocabulary: Vocabulary, rows: Tensor, out: Tensor) -> Tensor:
    for a, b in spans(vocabulary.d_vocab, TILE):
        vocabulary.tile(rows, a, b, "norm", out=out[:, a:b])
    return out
