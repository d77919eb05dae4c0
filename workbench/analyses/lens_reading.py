"""What a lens says at some sites of some tokens, beside what the model itself says: all measures of one reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.lenses.lens import Lens
from workbench.model import LanguageModel


class Reading(NamedTuple):
    """Of tokens at sites, of which the last is the model's own output. Divergences are KL(output || lens), in nats."""

    top_ids: Int[Tensor, "token site k"]
    top_logits: Float[Tensor, "token site k"]
    top_probabilities: Float[Tensor, "token site k"]
    entropy: Float[Tensor, "token site"]
    kl: Float[Tensor, "token site"]
    final_rank: Int[Tensor, "token site"]
    """Of the model's likeliest token, 0 the best."""
    surprisal: Float[Tensor, "token site"]
    """-log of the probability that the model gives to the lens's likeliest token."""
    target_ids: Int[Tensor, " token"]
    target_rank: Int[Tensor, "token site"]
    target_log_probability: Float[Tensor, "token site"]

    @property
    def agrees(self) -> Bool[Tensor, "token site"]:
        """Whether the lens's likeliest token is the model's."""
        return self.top_ids[..., 0] == self.top_ids[:, -1:, 0]


@torch.no_grad()
def read_states(
    model: LanguageModel,
    lens: Lens,
    states: Sequence[Float[Tensor, "token d_model"]],
    sites: Sequence[str],
    following: Int[Tensor, " token"],
    k: int,
) -> Reading:
    """
    Args:
        states: At each of the sites; the last is the one that the final norm reads.
        following: The target of each token; -1: the model's likeliest token.
    """
    vocabulary, n = model.vocabulary, len(sites)
    home = vocabulary.W_U.device
    rows = torch.stack([lens.read(own.to(home), site) for own, site in zip(states, sites, strict=True)], 1)
    final = vocabulary.project(rows[:, -1], decoder="norm", k=1)
    best = final.top_ids[:, 0]
    targets = torch.where(following.to(home) < 0, best, following.to(home))
    found = vocabulary.project(
        rows.flatten(0, 1), decoder="norm", k=min(k, model.d_vocab), entropy=True, last_of=n,
        targets=torch.stack([best, targets], 1).repeat_interleave(n, 0),
    )  # fmt: skip
    assert found.entropy_nats is not None
    assert found.kl_nats is not None
    assert found.target_ranks is not None

    def apart(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, n)).cpu()

    said = vocabulary.logits_at(vocabulary.decoded(rows[:, -1], "norm"), found.top_ids[:, 0].unflatten(0, (-1, n)), "norm")
    return Reading(
        top_ids=apart(found.top_ids),
        top_logits=apart(found.top_logits),
        top_probabilities=apart(found.top_probabilities),
        entropy=apart(found.entropy_nats),
        kl=apart(found.kl_nats),
        final_rank=apart(found.target_ranks[:, 0]),
        surprisal=(final.log_normaliser[:, None] - said).cpu(),
        target_ids=targets.cpu(),
        target_rank=apart(found.target_ranks[:, 1]),
        target_log_probability=apart(found.target_log_probabilities[:, 1]),
    )
