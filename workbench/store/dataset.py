"""A store as PyTorch's data loaders want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from workbench.store.store import ActivationStore


class StoredTokens(Dataset[Any]):
    """Item i is the i-th chosen token: a tensor for one site, a dict of them for several."""

    def __init__(
        self, store: ActivationStore, sites: str | Sequence[str], index: np.ndarray, dtype: torch.dtype | None = None
    ) -> None:
        self.store, self.index, self.dtype = store, index, dtype
        self.single = isinstance(sites, str)
        self.sites = [store.site(site) for site in ([sites] if isinstance(sites, str) else sites)]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Any:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.__getitems__([i])[0]

    def __getitems__(self, chosen: list[int]) -> list[Any]:
        """What a data loader asks for: a whole batch is read at once."""
        found = {site: self.store.read(site, self.index[chosen]).to(dtype=self.dtype) for site in self.sites}
        if self.single:
            return list(found[self.sites[0]])
        return [{site: values[i] for site, values in found.items()} for i in range(len(chosen))]
