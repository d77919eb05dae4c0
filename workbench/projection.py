"""The pass of rows over tiles of the vocabulary, and what it leaves: tokens, normalisers, entropies, ranks, divergences.

A rows x vocabulary matrix is never stored: a tile of logits is reduced while it is in cache, and a window of tiles is kept
only until the best tokens of it are chosen. On GPUs that it was measured on, one kernel does both (`fused_projection`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import NotFinite, UnknownToken, require_one_of
from workbench.near_ties import ERROR, GROWTH, SPARE, settle
from workbench.selection import GROUP, group_extremes, merge, select
from workbench.softmax import RunningSoftmax

if TYPE_CHECKING:
    from workbench.fused_projection import FusedProduct

Decoder = Literal["none", "gain", "norm"]
Engine = Literal["tiles", "fused"]

TILE = 8192
"""Tokens a matrix product. Narrower tiles cost more in calls than their logits' place in cache gains."""
HEIGHT = {"cpu": 768, "cuda": 16384}
"""Rows a block. Measured on two CPU cores: 512 rows cost 10 % more, as the matrix product re-reads `W_U` more often."""
MEMORY = {"cpu": 192 << 20, "cuda": 2 << 30}
"""Default bytes of logits in flight; on a CPU that is more than all 49,152 logits of a block of SmolLM2."""


@dataclass(frozen=True)
class Projection:
    """What the vocabulary says of each row. Logits and everything in nats, for the decoder that was asked for."""

    top_ids: Int[Tensor, "rows k"]
    """Tokens with the highest logits, best first, ties by lowest id: those of exact arithmetic (see `near_ties`)."""
    top_logits: Float[Tensor, "rows k"]
    bottom_ids: Int[Tensor, "rows k_bottom"]
    """Tokens with the lowest logits, lowest first, ties by lowest id."""
    bottom_logits: Float[Tensor, "rows k_bottom"]
    log_normaliser: Float[Tensor, " rows"]
    """log of the sum over the vocabulary of exp(logit)."""
    entropy_nats: Float[Tensor, " rows"] | None = None
    target_logits: Float[Tensor, "rows targets"] | None = None
    target_ranks: Int[Tensor, "rows targets"] | None = None
    """0 for the best token of the row; equal logits are ranked by lowest id."""
    kl_nats: Float[Tensor, " rows"] | None = None
    """KL(reference || row)."""

    @property
    def top_probabilities(self) -> Float[Tensor, "rows k"]:
        """Softmax over the whole vocabulary, of the best tokens."""
        return (self.top_logits - self.log_normaliser[:, None]).exp()

    @property
    def bottom_probabilities(self) -> Float[Tensor, "rows k_bottom"]:
        """Softmax over the whole vocabulary, of the worst tokens."""
        return (self.bottom_logits - self.log_normaliser[:, None]).exp()

    @property
    def target_log_probabilities(self) -> Float[Tensor, "rows targets"]:
        """Log-softmax of the tokens asked for, in nats."""
        if self.target_logits is None:
            raise ValueError("target_log_probabilities needs project(..., targets=...).")
        return self.target_logits - self.log_normaliser[:, None]


@runtime_checkable
class Head(Protocol):
    """What the pass asks of a vocabulary."""

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        ...

    def decoded(self, x: Tensor, decoder: Decoder) -> Tensor:
        """Rows as the matrix product takes them."""
        ...

    def tile(self, rows: Tensor, a: int, b: int, decoder: Decoder, out: Tensor | None = None) -> Tensor:
        """Logits of the tokens a to b, in the accumulation dtype; into `out`, if given."""
        ...

    def logits_at(self, rows: Tensor, ids: Tensor, decoder: Decoder) -> Tensor:
        """Logits of some tokens of each row's own, in the rows' dtype."""
        ...

    def scale(self, decoder: Decoder, ids: Tensor | None = None) -> float:
        """A bound of the logits of a row of norm 1, among these tokens or all: rounding errors are relative to it."""
        ...

    def matrix(self, decoder: Decoder) -> Tensor | None:
        """What rows are multiplied by, if logits are the product and nothing more."""
        ...


class Projector:
    """`Vocabulary.project` with its options fixed, for many calls: the buffers are kept from one call to the next.

    On a CPU fresh buffers cost 5 % of a layer of SmolLM2, all of it page faults.
    """

    engine: Engine = "tiles"
    """What the last call used."""

    def __init__(
        self,
        head: Head,
        decoder: Decoder = "none",
        k: int = 10,
        k_bottom: int = 0,
        entropy: bool = False,
        memory: int | None = None,
    ):
        self.head = head
        self.decoder: Decoder = decoder
        self.k, self.k_bottom = min(k, head.d_vocab), min(k_bottom, head.d_vocab)
        self.entropy = entropy
        self.memory = memory
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._fused: FusedProduct | None = None

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "rows d_model"],
        targets: Int[Tensor, " targets"] | Int[Tensor, "rows targets"] | None = None,
        reference: Float[Tensor, "#rows d_model"] | None = None,
    ) -> Projection:
        require_one_of("decoder", self.decoder, get_args(Decoder))
        if reference is not None:
            _refuse_not_finite(reference, "of the reference")
            if len(reference) not in (1, len(x)):
                raise ValueError(f"reference has {len(reference)} rows for {len(x)} to project; give one, or one for each.")
        if targets is not None:
            for token in targets[(targets < 0) | (targets >= self.head.d_vocab)].tolist():
                raise no_such_id(token, self.head.d_vocab)
            targets = targets.to(x.device).expand(len(x), -1)
        if targets is None and reference is None and self._takes_fused(x):
            self.engine = "fused"
            found, crowded = self._in_one_kernel(x)
        else:
            self.engine = "tiles"
            found, crowded = self._settled(x, self._in_tiles(x, targets, reference))
        if not torch.isfinite(found.log_normaliser).all():
            _refuse_not_finite(x, "to project")
            raise NotFinite("Logits overflow: rows of this size have no softmax. Scale them down, or use decoder='norm'.")
        if len(rows := crowded.nonzero()[:, 0]):
            exactly = Projector(self.head, self.decoder, self.k, self.k_bottom, memory=self.memory)(x[rows].double())
            for name in ("top_ids", "top_logits", "bottom_ids", "bottom_logits"):
                part = getattr(found, name)
                part[rows] = getattr(exactly, name).to(part.dtype)
        return found

    def _in_tiles(self, x: Tensor, targets: Tensor | None, reference: Tensor | None) -> Projection:
        """With candidates beyond those that are wanted, in the order that rounding left them in."""
        tile = TILE * accumulation_dtype(x).itemsize
        height = max(1, min(HEIGHT.get(x.device.type, HEIGHT["cpu"]), self._memory(x.device) // tile))
        blocks = []
        for start in range(0, max(len(x), 1), height):
            rows = slice(start, start + height)
            target = None if targets is None else targets[rows]
            other = reference if reference is None or len(reference) == 1 else reference[rows]
            blocks.append(self._block(x[rows], target, other))
        return _stack(blocks)

    def _settled(self, x: Tensor, found: Projection) -> tuple[Projection, Bool[Tensor, " rows"]]:
        """The tokens that are wanted, those that rounding left open put in order, and the rows with too many such."""
        best = {
            "top": (found.top_logits, found.top_ids, self.k),
            "bottom": (found.bottom_logits, found.bottom_ids, self.k_bottom),
        }
        settled, crowded = {}, torch.zeros(len(x), dtype=torch.bool, device=x.device)

        def exact(rows: Tensor, ids: Tensor) -> Tensor:
            return self.head.logits_at(self.head.decoded(x[rows].double(), self.decoder), ids, self.decoder)

        for name, (logits, ids, k) in best.items():
            if len(x) and k and accumulation_dtype(x) == torch.float32:
                error = self._error(x, ids) + GROWTH * x.shape[1] * logits.abs().amax(1)
                logits, ids, full = settle(logits, ids, k, error, exact, largest=name == "top")
                crowded[full] = True
            settled |= {f"{name}_logits": logits[:, :k].contiguous(), f"{name}_ids": ids[:, :k].contiguous()}
        return replace(found, **settled), crowded

    def _error(self, x: Tensor, ids: Tensor | None = None) -> Float[Tensor, " rows"]:
        """By how much logits of each row may err, beside what grows with the logit. Of the tokens found, if they are few:
        reading all of `W_U` for its norms takes as long as multiplying a row by it."""
        few = ids is not None and ids.numel() < self.head.d_vocab
        scale = self.head.scale(self.decoder, ids) if few else self._scale
        return ERROR * scale * self.head.decoded(x, self.decoder).norm(dim=1, dtype=torch.float32)

    @cached_property
    def _scale(self) -> float:
        return self.head.scale(self.decoder)

    def _takes_fused(self, x: Tensor) -> bool:
        if not x.is_cuda or self.entropy or not len(x) or not _has_triton():
            return False
        from workbench.fused_projection import fits

        W_U, rows = self.head.matrix(self.decoder), self.head.decoded(x[:1], self.decoder)
        return W_U is not None and fits(rows, W_U, max(self.k, self.k_bottom))

    def _in_one_kernel(self, x: Tensor) -> tuple[Projection, Bool[Tensor, " rows"]]:
        from workbench.fused_projection import FusedProduct, bytes_a_row

        most = max(1, self._memory(x.device) // bytes_a_row(self.head.d_vocab))
        height = -(-len(x) // -(-len(x) // most))  # blocks of one size
        if self._fused is None or self._fused.height < height:
            W_U = self.head.matrix(self.decoder)
            assert W_U is not None
            self._fused = FusedProduct(W_U, height, self.k, self.k_bottom)
        blocks, crowded = [], []
        for part in x.split(height):
            top, bottom, normaliser = self._fused(self.head.decoded(part, self.decoder), self._error(part))
            blocks.append(Projection(top.columns, top.values, bottom.columns, bottom.values, normaliser))
            crowded.append(top.crowded | bottom.crowded)
        return _stack(blocks), torch.cat(crowded)

    def _memory(self, device: torch.device) -> int:
        return self.memory or MEMORY.get(device.type, MEMORY["cpu"])

    def _block(self, x: Tensor, targets: Tensor | None, reference: Tensor | None) -> Projection:
        """One block of rows through all tiles. A tile is reduced while it is in cache: into the running normaliser, and to
        the extremes of its groups, from which the tokens are chosen when a window of tiles is full."""
        head, decoder = self.head, self.decoder
        rows = head.decoded(x, decoder)
        dtype = accumulation_dtype(x)
        window, scratch = self._space(len(x), x.device, dtype)
        softmax = RunningSoftmax(len(x), entropy=self.entropy, device=x.device, dtype=dtype)
        divergence = None if reference is None else _Divergence(head, reference, decoder, len(x))
        ranking = None if targets is None else _Ranking(head, rows, targets, decoder)
        top = bottom = _no_tokens(len(x), x.device, dtype)
        for start, stop in spans(head.d_vocab, window.shape[1]):
            highs, lows = [], []
            for a in range(start, stop, TILE):
                b = min(a + TILE, stop)
                z = head.tile(rows, a, b, decoder, out=window[:, a - start : b - start])
                highs.append(group_extremes(z, largest=True))
                if self.k_bottom:
                    lows.append(group_extremes(z, largest=False))
                if ranking is not None:
                    ranking.add(z, a)
                if divergence is not None:
                    divergence.add(z, a, b)
                softmax.add(z, _row_maxima(z, highs[-1]), scratch[:, : b - a])
            held = window[:, : stop - start]
            top = _better(top, held, start, self.k + SPARE, torch.cat(highs, 1), largest=True)
            if self.k_bottom:
                bottom = _better(bottom, held, start, self.k_bottom + SPARE, torch.cat(lows, 1), largest=False)
        return Projection(
            top_ids=top[1],
            top_logits=top[0],
            bottom_ids=bottom[1],
            bottom_logits=bottom[0],
            log_normaliser=softmax.log_normaliser.to(dtype),
            entropy_nats=softmax.entropy_nats.to(dtype) if self.entropy else None,
            target_logits=None if ranking is None else ranking.logits,
            target_ranks=None if ranking is None else ranking.ranks,
            kl_nats=None if divergence is None else divergence.from_reference(softmax).to(dtype),
        )

    def _space(self, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A window of logits, as many tiles wide as the memory allows, and one tile of scratch."""
        if self._buffers is not None:
            window, scratch = self._buffers
            if window.device == device and window.dtype == dtype and len(window) >= rows:
                return window[:rows], scratch[:rows]
        tiles = max(1, self._memory(device) // (dtype.itemsize * TILE * max(rows, 1)))
        width = min(tiles * TILE, self.head.d_vocab)
        window = torch.empty(rows, width, device=device, dtype=dtype)
        self._buffers = window, torch.empty(rows, min(TILE, width), device=device, dtype=dtype)
        return self._buffers


class _Ranking:
    """How many tokens stand before each target: those of a higher logit, or of an equal one and a lower id."""

    def __init__(self, head: Head, rows: Tensor, targets: Tensor, decoder: Decoder):
        self.targets = targets
        self.ranks = torch.zeros_like(targets)
        self.logits = torch.zeros(targets.shape, device=rows.device, dtype=accumulation_dtype(rows))
        # From the tiles' own products: a logit computed otherwise would differ in its last bit and beat itself.
        for a, b in spans(head.d_vocab, TILE):
            inside = (targets >= a) & (targets < b)
            if inside.any():
                own = head.tile(rows, a, b, decoder).gather(1, (targets - a).clamp(0, b - a - 1))
                self.logits = torch.where(inside, own, self.logits)

    def add(self, z: Tensor, start: int) -> None:
        ids = torch.arange(start, start + z.shape[1], device=z.device)
        for i in range(self.targets.shape[1]):
            own, target = self.logits[:, i, None], self.targets[:, i, None]
            self.ranks[:, i] += ((z > own) | ((z == own) & (ids < target))).sum(1)


class _Divergence:
    """KL(reference || rows) = Σ p (log p - log q), from the sums of p·(logit_p - logit_q) and the two normalisers."""

    def __init__(self, head: Head, reference: Tensor, decoder: Decoder, rows: int):
        self.head = head
        self.decoder: Decoder = decoder
        self.rows = head.decoded(reference, decoder)
        dtype = accumulation_dtype(reference)
        self.softmax = RunningSoftmax(len(reference), device=reference.device, dtype=dtype)
        self.difference = torch.zeros(rows, device=reference.device, dtype=torch.float64)

    def add(self, z: Tensor, a: int, b: int) -> None:
        p = self.head.tile(self.rows, a, b, self.decoder)
        weights, shrink = self.softmax.add(p, p.amax(1, keepdim=True), torch.empty_like(p))
        self.difference = self.difference * shrink + (weights * (p - z)).sum(1)

    def from_reference(self, softmax: RunningSoftmax) -> Tensor:
        """Rounding can leave a KL of 0 a hair below it; it is cut there."""
        mean = self.difference / self.softmax.total
        return (mean - self.softmax.log_normaliser + softmax.log_normaliser).clamp_min(0)


def spans(d_vocab: int, width: int) -> Iterator[tuple[int, int]]:
    """Token ranges of this width that cover the vocabulary."""
    return ((a, min(a + width, d_vocab)) for a in range(0, d_vocab, width))


def no_such_id(token: int, d_vocab: int) -> UnknownToken:
    """The error of a token id that the vocabulary does not have."""
    return UnknownToken(f"Token id {token} is outside the vocabulary; ids go from 0 to {d_vocab - 1}.")


def _better(
    best: tuple[Tensor, Tensor], held: Tensor, start: int, k: int, groups: Tensor, *, largest: bool
) -> tuple[Tensor, Tensor]:
    """The best tokens so far, joined by the best of a window that begins at token `start`."""
    values, columns = select(held, min(k, held.shape[1]), largest=largest, tile=TILE, groups=groups)
    return merge(best, (values, columns + start), k, largest=largest)


def _no_tokens(rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, 0, device=device, dtype=dtype), torch.empty(rows, 0, device=device, dtype=torch.long)


def _row_maxima(z: Tensor, groups: Tensor) -> Tensor:
    """The maximum of each row, from the maxima of its groups and the columns beyond the last whole group."""
    rest = z[:, groups.shape[1] * GROUP :]
    parts = [part.amax(1, keepdim=True) for part in (groups, rest) if part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.maximum(*parts)


def _refuse_not_finite(x: Tensor, which: str) -> None:
    finite = torch.isfinite(x).all(1)
    if not finite.all():
        raise NotFinite(
            f"Row {int((~finite).nonzero()[0])} of the {len(x)} {which} holds NaN or infinity. "
            "Find where it arises (capture the layers below), or drop the row."
        )


def _stack(blocks: list[Projection]) -> Projection:
    if len(blocks) == 1:
        return blocks[0]
    parts = {f.name: [getattr(block, f.name) for block in blocks] for f in fields(Projection)}
    joined: dict[str, Any] = {name: None if part[0] is None else torch.cat(part) for name, part in parts.items()}
    return Projection(**joined)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 rows."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
