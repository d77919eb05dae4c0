"""Which tokens a forward pass is given: the positions that edits are chosen by."""

from typing import NamedTuple

import torch
from torch import Tensor


class Pass(NamedTuple):
    """One forward pass, of a whole text or of the next tokens after a key-value cache. Tensors lie on the CPU."""

    positions: Tensor
    """Of each token among its row's real ones, `[batch, pos]`; -1 for padding."""
    keys: Tensor
    """The same for the cached tokens and these, `[batch, total]`: what attention looks at."""
    lengths: Tensor
    """Real tokens of each row's prompt, `[batch]`: what was given before, or in, the first pass of this cache."""
    new: bool
    """Whether these tokens come after the prompt."""

    @classmethod
    def of(cls, mask: Tensor, n_tokens: int, before: "Pass | None") -> "Pass":
        """From the attention mask `[batch, total]`, of whose columns the last `n_tokens` are in this pass.

        Args:
            before: The pass before it, if both have one cache.
        """
        mask = mask.bool().cpu()
        keys = (mask.long().cumsum(1) - 1).masked_fill(~mask, -1)
        new = n_tokens < mask.shape[1]
        lengths = mask[:, : mask.shape[1] - n_tokens].sum(1) if new else mask.sum(1)
        if new and before is not None and len(before.lengths) == len(mask):
            lengths = before.lengths
        return cls(keys[:, mask.shape[1] - n_tokens :], keys, lengths, new)

    def absolute(self, position: int) -> Tensor:
        """A position of the prompt, negative from its end, counted from 0 in each row: `[batch]`."""
        return torch.full_like(self.lengths, position) if position >= 0 else self.lengths + position
