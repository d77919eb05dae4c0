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
    """Real tokens of each row's prompt, `[batch]`: tokens from there on are new."""

    @classmethod
    def of(cls, mask: Tensor, n_tokens: int, lengths: Tensor | None = None) -> "Pass":
        """From the attention mask `[batch, total]`, of whose columns the last `n_tokens` are in this pass.

        Args:
            lengths: Of the prompts, where they are known; else all of a first pass is prompt, and all that follows a cache new.
        """
        total = mask.shape[1]
        mask = mask.bool().cpu()
        keys = (mask.long().cumsum(1) - 1).masked_fill(~mask, -1)
        if lengths is None:
            lengths = mask[:, : total if n_tokens == total else total - n_tokens].sum(1)
        return cls(keys[:, total - n_tokens :], keys, lengths)

    def over_keys(self, width: int) -> "Pass":
        """The same pass, with its last `width` keys for tokens; a window's cache holds the last ones alone."""
        return self._replace(positions=self.keys[:, -width:])

    def absolute(self, position: int) -> Tensor:
        """A position of the prompt, negative from its end, counted from 0 in each row: `[batch]`."""
        return torch.full_like(self.lengths, position) if position >= 0 else self.lengths + position

    def matching(self, asked: tuple[int, ...], of: Tensor) -> Tensor:
        """Which of `[batch, columns]` positions are among those asked for."""
        wanted = torch.stack([self.absolute(position) for position in asked], 1)
        return (of[..., None] == wanted[:, None]).any(-1) & (of >= 0)
