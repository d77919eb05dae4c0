"""Reading a store: nothing is loaded before it is asked for, and nothing is read from a shard that is not as it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from workbench.corpus.corpus import STRATA
from workbench.errors import BadArtifact, OtherJob, UnknownOption, require_one_of
from workbench.model import LanguageModel
from workbench.sites import Site
from workbench.store import files
from workbench.store.shard import sha256_of
from workbench.streaming.plan import shown_bytes

if TYPE_CHECKING:
    import pandas as pd

    from workbench.store.dataset import StoredTokens

Where = slice | Sequence[int] | np.ndarray | Tensor | None
"""Which tokens: a slice, their ordinals in the store (negative ones from its end), a mask over all of them, or all."""


class ActivationStore:
    """Activations on disk, as `capture_to_store` or `workbench capture` wrote them: a tensor `[token, …]` a site.

    `store.read("resid_post.3", slice(0, 100))`, `store.read(site, store.where(stratum="ordinary"))`,
    `store.batches(site, 4096)`, `store.dataset(site)`. Tensors come through a memory map.
    """

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        """
        Args:
            check: Compare each shard with its SHA-256 before it is first read from, which reads it whole. If False, only its
                size and header are looked at.
        Raises:
            BadArtifact: if the folder holds no store, an unfinished one, or a shard is missing or has another size.
        """
        self.folder, self.check = Path(folder), check
        self.index = files.read_index(self.folder)
        self.shards = [files.Record(**record) for record in self.index["shards"]]
        for shard in self.shards:
            file = self.folder / shard.file
            found = file.stat().st_size if file.is_file() else None
            if found != shard.bytes:
                size = "is missing" if found is None else f"has {found:,} bytes in place of {shard.bytes:,}"
                raise BadArtifact(f"Shard {str(file)!r} {size}. Nothing is read from it: capture the store again.")
        self._ends = np.cumsum([shard.tokens for shard in self.shards])
        self._open: dict[int, dict[str, Tensor]] = {}
        self._compared: set[int] = set()
        """Shards that were found to have their SHA-256. Copies of the store in other processes need not look again."""

    def __repr__(self) -> str:
        settings = self.settings
        return (
            f"ActivationStore({str(self.folder)!r}: {len(self):,} tokens of {settings['corpus']!r} through "
            f"{settings['model']!r}, {len(self.sites)} sites, {self.index['dtype']}, "
            f"{shown_bytes(sum(shard.bytes for shard in self.shards))})"
        )

    def __len__(self) -> int:
        return self.index["tokens"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"} | {"_open": {}}

    @property
    def settings(self) -> dict[str, Any]:
        """Model, corpus, sites and options that the store was made with."""
        return self.index["settings"]

    @property
    def sites(self) -> list[str]:
        return list(self.index["sites"])

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.index["dtype"])

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """A row a token: token_id, document, offset, row, pos, stratum, document_id.

        Raises:
            BadArtifact: if the table is not as it was written.
        """
        import pyarrow.parquet as pq

        path = self.folder / files.TOKENS
        if not path.is_file() or sha256_of(path) != self.index["tokens_sha256"]:
            raise BadArtifact(f"{str(path)!r} is missing or was altered. Capture the store again.")
        return pq.read_table(path, read_dictionary=["stratum", "document_id"]).to_pandas()

    def where(
        self,
        *,
        stratum: str | Sequence[str] | None = None,
        document: SupportsIndex | str | Sequence[SupportsIndex | str] | None = None,
        token_id: SupportsIndex | Sequence[SupportsIndex] | None = None,
        row: SupportsIndex | Sequence[SupportsIndex] | None = None,
    ) -> np.ndarray:
        """Ordinals of the tokens that are all of this.

        Args:
            stratum: Of `workbench.corpus.corpus.STRATA`.
            document: Ordinals or names of documents.
            token_id: Ids.
            row: Ordinals of rows of the corpus.
        Raises:
            UnknownOption: if there is no such stratum or document.
        """
        chosen = np.ones(len(self), bool)
        if stratum is not None:
            for kind in (kinds := _listed(stratum)):
                require_one_of("stratum", kind, STRATA)
            chosen &= self.tokens["stratum"].isin(kinds).to_numpy()
        if document is not None:
            asked = _listed(document)
            names, ordinals = self.tokens["document_id"], self.tokens["document"]
            for one in asked:
                if not ((names == one) if isinstance(one, str) else (ordinals == one)).any():
                    raise UnknownOption(f"Document {one!r} is not in the store. store.tokens lists its documents.")
            by_name = names.isin([one for one in asked if isinstance(one, str)])
            chosen &= (by_name | ordinals.isin([one for one in asked if not isinstance(one, str)])).to_numpy()
        for column, asked in (("token_id", token_id), ("row", row)):
            if asked is not None:
                chosen &= self.tokens[column].isin(_listed(asked)).to_numpy()
        return chosen.nonzero()[0]

    def read(self, site: str, at: Where = None) -> Tensor:
        """Activations of some tokens, `[token, …]`, in the store's dtype and in the order asked for.

        Raises:
            UnknownSite, UnknownOption: if the site was not stored, or there is no such token.
            BadArtifact: if a shard was altered.
        """
        site = self.site(site)
        index = self._ordinals(at)
        out = torch.empty(len(index), *self.index["sites"][site], dtype=self.dtype)
        if len(index) and bool((np.diff(index) == 1).all()):  # a slice: copied shard by shard
            filled = 0
            for number, first, stop in self._parts(int(index[0]), int(index[-1]) + 1):
                out[filled : filled + stop - first] = self._shard(number)[site][first:stop]
                filled += stop - first
            return out
        # Gathered shard by shard in the order of the disk, then put into the order asked for by one more gathering: scattering
        # takes several times as long.
        order = np.argsort(index)
        ordered = index[order]
        starts = np.concatenate([[0], self._ends])
        bounds = np.searchsorted(ordered, starts).tolist()
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            part = slice(bounds[number], bounds[number + 1])
            torch.index_select(self._shard(number)[site], 0, torch.from_numpy(ordered[part] - starts[number]), out=out[part])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return out.index_select(0, torch.from_numpy(back))

    def batches(
        self,
        sites: str | Sequence[str],
        size: int,
        *,
        at: Where = None,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = 1,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Iterator[Any]:
        """Batches of `size` tokens: a tensor for one site, a dict of them for several; the last of an epoch may be smaller.

        Shuffled over the whole store: any token may come next, whichever its shard, document or row. The next batch is read
        while this one is used. An endless one (`epochs=None`) is what sae-lens takes: `SAETrainer(cfg, sae,
        data_provider=store.batches(site, cfg.train_batch_size_samples, epochs=None, dtype=torch.float32))`.

        Args:
            seed: Of the order; each epoch has its own.
            epochs: How often to go through; without end, if None.
            dtype, device: What tensors are converted to; as stored and on the CPU, if None.
        Raises:
            UnknownSite, UnknownOption, BadArtifact: as `read`.
        """
        if size < 1:
            raise UnknownOption(f"size={size} is out of range: a batch has 1 token or more.")
        names = [self.site(site) for site in ([sites] if isinstance(sites, str) else sites)]
        index = self._ordinals(at)
        if not len(index):
            raise UnknownOption("No token was chosen, so there is no batch. Choose others with at=.")

        def read(chosen: np.ndarray) -> Any:
            # To the device first: the conversion then runs there, and fewer bytes go over.
            found = {name: self.read(name, chosen).to(device=device).to(dtype=dtype) for name in names}
            return found[names[0]] if isinstance(sites, str) else found

        return _ahead(read, _chosen(index, size, shuffle, seed, epochs))

    def dataset(self, sites: str | Sequence[str], at: Where = None, dtype: torch.dtype | None = None) -> StoredTokens:
        """A map-style dataset of PyTorch: an item a token. `DataLoader(store.dataset(site), 4096, shuffle=True)`.

        All shards are compared with their SHA-256 here, rather than in each of the loader's processes. (A loader puts batches
        together token by token: `batches` takes a fraction of the time.)

        Raises:
            UnknownSite, UnknownOption, BadArtifact: as `read`.
        """
        from workbench.store.dataset import StoredTokens

        if self.check:
            for number in range(len(self.shards)):
                self._check(number)
        return StoredTokens(self, sites, self._ordinals(at), dtype)

    def verify(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            BadArtifact: naming the first that differs.
        """
        self._compared.clear()
        self.__dict__.pop("tokens", None)
        for number in range(len(self.shards)):
            self._check(number)
        _ = self.tokens

    def require_model(self, model: LanguageModel) -> None:
        """
        Raises:
            OtherJob: if the store was made with other weights.
        """
        if self.settings["weights_hash"] != model.weights_hash:
            raise OtherJob(
                f"The store in {str(self.folder)!r} was made with {self.settings['model']!r} "
                f"({self.settings['weights_hash'][:12]}…), not with the weights of {model.name!r}. Capture one with this model."
            )

    def site(self, text: str) -> str:
        """The name under which a site is stored, given in any spelling.

        Raises:
            UnknownSite, LayerOutOfRange: if there is no such site.
            UnknownOption: if it was not stored.
        """
        name = text if text in self.index["sites"] else str(Site.parse(text, self.settings["n_layers"]))
        if name not in self.index["sites"]:
            raise UnknownOption(f"Site {text!r} is not in the store. It has {', '.join(self.sites)}.")
        return name

    def _ordinals(self, at: Where) -> np.ndarray:
        if at is None or isinstance(at, slice):
            return np.arange(*(slice(None) if at is None else at).indices(len(self)))
        given = np.asarray(at)
        if given.dtype == bool and given.shape == (len(self),):
            return np.flatnonzero(given)
        index = given.astype(np.int64) if given.dtype.kind in "iu" or not given.size else None
        if index is None or index.ndim != 1 or (len(index) and not -len(self) <= index.min() <= index.max() < len(self)):
            raise UnknownOption(
                f"Tokens of this store go from 0 to {len(self) - 1}: a flat list of these is wanted, or a mask over them all; "
                f"found {given.dtype} {list(given.shape)}{_span(given)}."
            )
        return np.where(index < 0, index + len(self), index)

    def _parts(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Shards that a range of tokens lies in, with the range in each."""
        for number, end in enumerate(self._ends.tolist()):
            start = end - self.shards[number].tokens
            if first < end and stop > start:
                yield number, max(first, start) - start, min(stop, end) - start

    def _shard(self, number: int) -> dict[str, Tensor]:
        """The shard's tensors, mapped."""
        if number not in self._open:
            from safetensors import SafetensorError, safe_open

            if self.check:
                self._check(number)
            try:
                with safe_open(self.folder / self.shards[number].file, "pt") as file:
                    self._open[number] = {site: file.get_tensor(site) for site in self.sites}
            except SafetensorError as error:
                raise self._altered(number, str(error)) from None
        return self._open[number]

    def _check(self, number: int) -> None:
        if number in self._compared:
            return
        found = sha256_of(self.folder / self.shards[number].file)
        if found != self.shards[number].sha256:
            raise self._altered(number, f"SHA-256 {found[:12]}… in place of {self.shards[number].sha256[:12]}…")
        self._compared.add(number)

    def _altered(self, number: int, reason: str) -> BadArtifact:
        file = str(self.folder / self.shards[number].file)
        return BadArtifact(
            f"Shard {file!r} is not as it was written ({reason}). Nothing is read from it: capture the store again."
        )


def _listed(value: Any) -> list[Any]:
    return [value] if np.ndim(value) == 0 else list(value)


def _span(given: np.ndarray) -> str:
    return f" from {given.min()} to {given.max()}" if given.size and given.dtype.kind in "iu" else ""


def _ahead(read: Callable[[np.ndarray], Any], chosen: Iterator[np.ndarray]) -> Iterator[Any]:
    """What is read of each, one of them ahead of what is asked for."""
    with ThreadPoolExecutor(1) as threads:
        coming = None
        for some in chosen:
            following = threads.submit(read, some)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def _chosen(index: np.ndarray, size: int, shuffle: bool, seed: int, epochs: int | None) -> Iterator[np.ndarray]:
    epoch = 0
    while epochs is None or epoch < epochs:
        order = np.random.default_rng([seed, epoch]).permutation(index) if shuffle else index
        for start in range(0, len(order), size):
            yield order[start : start + size]
        epoch += 1
