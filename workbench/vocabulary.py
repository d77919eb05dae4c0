"""Vocabulary projection: the one place where anything meets the whole unembedding matrix.

Rows of `d_model` numbers go in. Out come, for each row, the best and worst tokens, the log-normaliser, the entropy, the
logits and ranks of given tokens and the KL divergence from reference rows, in one pass over tiles of the vocabulary.
A rows x vocabulary matrix is never stored.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import NotFinite, UnknownToken
from workbench.selection import GROUP, group_extremes, merge, select
from workbench.softmax import RunningSoftmax

Decoder = Literal["none", "gain", "norm"]

_MM_TAKES_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)

TILE = 4096
"""Tokens a matrix product. Its logits are still in cache when the passes over them read them."""
HEIGHT = {"cpu": 1024, "cuda": 16384}
"""Rows a block. Measured on two CPU cores: 512 rows cost 10 % more, as the matrix product re-reads `W_U` more often."""
MEMORY = {"cpu": 192 << 20, "cuda": 2 << 30}
"""Default bytes of logits in flight; on a CPU, all 49,152 of a block of SmolLM2."""


@dataclass(frozen=True)
class Projection:
    """What the vocabulary says of each row. Logits and everything in nats, for the decoder that was asked for."""

    top_ids: Int[Tensor, "rows k"]
    """Tokens with the highest logits, best first, ties by lowest id."""
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


@dataclass(frozen=True)
class Vocabulary:
    """The way from a vector of the residual stream to logits, as one model has it.

    `logits = softcap(logit_scale · ln_final(x) @ W_U + b_U)`. Three decoders take less or more of it (Davies 2025 leaves
    open which one was used, so each is named):

    - `none`: `x @ W_U`, the raw direction;
    - `gain`: `(gain ⊙ x) @ W_U`, the linear part of the final norm; for an RMS norm it ranks tokens as `norm` does;
    - `norm`: exactly the model's head, with head bias, logit scale and soft cap.
    """

    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"] | None
    gain: Float[Tensor, " d_model"]
    """The final norm's effective gain (`1 + weight` where the family has it so)."""
    ln_final: Callable[[Tensor], Tensor]
    """The model's own final norm, called, never re-implemented."""
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def d_model(self) -> int:
        return self.W_U.shape[0]

    @property
    def d_vocab(self) -> int:
        return self.W_U.shape[1]

    def direction(self, token: int) -> Float[Tensor, " d_model"]:
        """The column of `W_U` that writes this token.

        Raises:
            UnknownToken: if the id is outside the vocabulary.
        """
        if not 0 <= token < self.d_vocab:
            raise UnknownToken(f"Token id {token} is outside the vocabulary; ids go from 0 to {self.d_vocab - 1}.")
        return self.W_U[:, token]

    def linear_part(self, x: Float[Tensor, "*batch d_model"], decoder: Decoder) -> Float[Tensor, "*batch d_model"]:
        """What multiplies `W_U` if only the linear part of the decoder is taken: x, scaled by the gain unless it is `none`."""
        return x if decoder == "none" else x.to(_accumulation_dtype(x)) * self.gain.to(_accumulation_dtype(x))

    @torch.no_grad()
    def logits_of(self, x: Float[Tensor, "rows d_model"], ids: Int[Tensor, "rows k"]) -> Float[Tensor, "rows k"]:
        """Products of each row with a few columns of `W_U` of its own (decoder `none`)."""
        return torch.stack([(x * self.W_U.T[column].to(x.dtype)).sum(1) for column in ids.T], 1)

    @torch.no_grad()
    def logits(self, x: Float[Tensor, "*batch d_model"], *, decoder: Decoder = "norm") -> Float[Tensor, "*batch d_vocab"]:
        """All logits of a few vectors, dense. For many rows use `project`, which does not store them."""
        rows = self.decoded(x.flatten(0, -2), decoder)
        out = torch.cat([self.tile(rows, a, b, decoder) for a, b in self.spans(TILE)], 1)
        return out.unflatten(0, x.shape[:-1])

    def project(
        self,
        x: Float[Tensor, "rows d_model"],
        *,
        decoder: Decoder = "none",
        k: int = 10,
        k_bottom: int = 0,
        entropy: bool = False,
        targets: Int[Tensor, " targets"] | Int[Tensor, "rows targets"] | None = None,
        reference: Float[Tensor, "#rows d_model"] | None = None,
        memory: int | None = None,
    ) -> Projection:
        """Decode rows into the vocabulary in one pass over tiles.

        Products are accumulated in float32 (float64 for float64 rows), also for bfloat16 weights, whose products are
        exact in it; so ids equal those of a dense float64 computation up to ties of float32 rounding.

        Args:
            x: Vectors of the residual stream; any float dtype.
            decoder: See the class.
            k, k_bottom: How many best and worst tokens a row; each is cut to the vocabulary's size.
            targets: Token ids whose logit and rank are wanted, the same for all rows or a row of ids each.
            reference: Rows (or one row) q for KL(softmax(q) || softmax(x)), decoded by the same decoder.
            memory: Bytes of logits held at a time; 192 MiB on a CPU, 2 GiB on a GPU, if not given.
        Raises:
            NotFinite: if a row holds NaN or infinity; the first such row is named.
            UnknownToken: if a target is outside the vocabulary.
        """
        return Projector(self, decoder, k, k_bottom, entropy, memory)(x, targets, reference)

    @torch.no_grad()
    def logit_moments(
        self, mean: Float[Tensor, " d_model"], covariance: Float[Tensor, "d_model d_model"]
    ) -> tuple[Float[Tensor, " d_vocab"], Float[Tensor, " d_vocab"]]:
        """Mean and standard deviation of every token's logit over a population of rows, from the rows' moments alone.

        `E[u·w] = u·E[w]` and `Var[u·w] = uᵀ Cov[w] u` (decoder `none`): no row is projected.
        """
        means, deviations = [], []
        for a, b in self.spans(TILE):
            U = self.W_U[:, a:b].to(covariance.dtype)
            means.append(mean @ U)
            deviations.append(((covariance @ U) * U).sum(0).clamp_min(0).sqrt())
        return torch.cat(means), torch.cat(deviations)

    def decoded(self, x: Tensor, decoder: Decoder) -> Tensor:
        """Rows as the matrix product takes them: normed, or scaled by the gain, or as they are."""
        if decoder == "norm":
            return self.ln_final(x.to(self.gain.dtype)).to(_accumulation_dtype(x))
        if decoder == "gain":
            return self.linear_part(x, decoder)
        return x if _multiplies_exactly(x, self.W_U) else x.to(_accumulation_dtype(x))

    def tile(
        self, rows: Float[Tensor, "rows d_model"], a: int, b: int, decoder: Decoder, out: Tensor | None = None
    ) -> Float[Tensor, "rows tile"]:
        """Logits of the tokens a to b for rows that were `decoded`, in the accumulation dtype; into `out`, if given."""
        U = self.W_U[:, a:b]
        if rows.dtype == torch.bfloat16:
            z = torch.mm(rows, U, out_dtype=torch.float32)
            z = z if out is None else out.copy_(z)
        else:
            z = torch.mm(rows, U.to(rows.dtype), out=out)
        if decoder == "norm":
            if self.logit_scale != 1.0:
                z *= self.logit_scale
            if self.b_U is not None:
                z += self.b_U[a:b].to(z.dtype)
            if self.softcap is not None:
                z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def spans(self, width: int) -> Iterator[tuple[int, int]]:
        """Token ranges of this width that cover the vocabulary."""
        return ((a, min(a + width, self.d_vocab)) for a in range(0, self.d_vocab, width))


class Projector:
    """`Vocabulary.project` with its options fixed, for many calls: the buffers are kept from one call to the next.

    On a CPU fresh buffers cost 5 % of a layer of SmolLM2, all of it page faults.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        decoder: Decoder = "none",
        k: int = 10,
        k_bottom: int = 0,
        entropy: bool = False,
        memory: int | None = None,
    ):
        self.vocabulary = vocabulary
        self.decoder: Decoder = decoder
        self.k, self.k_bottom = min(k, vocabulary.d_vocab), min(k_bottom, vocabulary.d_vocab)
        self.entropy = entropy
        self.memory = memory
        self._buffers: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "rows d_model"],
        targets: Int[Tensor, " targets"] | Int[Tensor, "rows targets"] | None = None,
        reference: Float[Tensor, "#rows d_model"] | None = None,
    ) -> Projection:
        _refuse_not_finite(x)
        if targets is not None:
            for token in targets[(targets < 0) | (targets >= self.vocabulary.d_vocab)].tolist():
                self.vocabulary.direction(token)  # raises
            targets = targets.to(x.device).expand(len(x), -1)
        height = HEIGHT.get(x.device.type, HEIGHT["cpu"])
        blocks = []
        for start in range(0, max(len(x), 1), height):
            rows = slice(start, start + height)
            target = None if targets is None else targets[rows]
            other = reference if reference is None or len(reference) == 1 else reference[rows]
            blocks.append(self._block(x[rows], target, other))
        return _stack(blocks)

    def _block(self, x: Tensor, targets: Tensor | None, reference: Tensor | None) -> Projection:
        """One block of rows through all tiles. A tile is reduced while it is in cache: into the running normaliser, and to
        the extremes of its groups, from which the tokens are chosen when a window of tiles is full."""
        vocabulary, decoder = self.vocabulary, self.decoder
        rows = vocabulary.decoded(x, decoder)
        dtype = _accumulation_dtype(x)
        window, scratch = self._space(len(x), x.device, dtype)
        softmax = RunningSoftmax(len(x), entropy=self.entropy, device=x.device, dtype=dtype)
        divergence = None if reference is None else _Divergence(vocabulary, reference, decoder, len(x))
        ranking = None if targets is None else _Ranking(vocabulary, rows, targets, decoder)
        top = bottom = _no_tokens(len(x), x.device, dtype)
        for start, stop in vocabulary.spans(window.shape[1]):
            highs, lows = [], []
            for a in range(start, stop, TILE):
                b = min(a + TILE, stop)
                z = vocabulary.tile(rows, a, b, decoder, out=window[:, a - start : b - start])
                highs.append(group_extremes(z, largest=True))
                if self.k_bottom:
                    lows.append(group_extremes(z, largest=False))
                if ranking is not None:
                    ranking.add(z, a)
                if divergence is not None:
                    divergence.add(z, a, b)
                softmax.add(z, _row_maxima(z, highs[-1]), scratch[:, : b - a])
            held = window[:, : stop - start]
            top = _better(top, held, start, self.k, torch.cat(highs, 1), largest=True)
            if self.k_bottom:
                bottom = _better(bottom, held, start, self.k_bottom, torch.cat(lows, 1), largest=False)
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
        memory = self.memory or MEMORY.get(device.type, MEMORY["cpu"])
        tiles = max(1, memory // (dtype.itemsize * TILE * max(rows, 1)))
        width = min(tiles * TILE, self.vocabulary.d_vocab)
        window = torch.empty(rows, width, device=device, dtype=dtype)
        self._buffers = window, torch.empty(rows, min(TILE, width), device=device, dtype=dtype)
        return self._buffers


class _Ranking:
    """How many tokens stand before each target: those of a higher logit, or of an equal one and a lower id."""

    def __init__(self, vocabulary: Vocabulary, rows: Tensor, targets: Tensor, decoder: Decoder):
        self.targets = targets
        self.ranks = torch.zeros_like(targets)
        self.logits = torch.zeros(targets.shape, device=rows.device, dtype=_accumulation_dtype(rows))
        # From the tiles' own products: a logit computed otherwise would differ in its last bit and beat itself.
        for a, b in vocabulary.spans(TILE):
            inside = (targets >= a) & (targets < b)
            if inside.any():
                own = vocabulary.tile(rows, a, b, decoder).gather(1, (targets - a).clamp(0, b - a - 1))
                self.logits = torch.where(inside, own, self.logits)

    def add(self, z: Tensor, start: int) -> None:
        ids = torch.arange(start, start + z.shape[1], device=z.device)
        for i in range(self.targets.shape[1]):
            own, target = self.logits[:, i, None], self.targets[:, i, None]
            self.ranks[:, i] += ((z > own) | ((z == own) & (ids < target))).sum(1)


class _Divergence:
    """KL(reference || rows) = Σ p (log p - log q), from the sums of p·(logit_p - logit_q) and the two normalisers."""

    def __init__(self, vocabulary: Vocabulary, reference: Tensor, decoder: Decoder, rows: int):
        self.vocabulary = vocabulary
        self.decoder: Decoder = decoder
        self.rows = vocabulary.decoded(reference, decoder)
        dtype = _accumulation_dtype(reference)
        self.softmax = RunningSoftmax(len(reference), device=reference.device, dtype=dtype)
        self.difference = torch.zeros(rows, device=reference.device, dtype=torch.float64)

    def add(self, z: Tensor, a: int, b: int) -> None:
        p = self.vocabulary.tile(self.rows, a, b, self.decoder)
        weights, shrink = self.softmax.add(p, p.amax(1, keepdim=True), torch.empty_like(p))
        self.difference = self.difference * shrink + (weights * (p - z)).sum(1)

    def from_reference(self, softmax: RunningSoftmax) -> Tensor:
        """Rounding can leave a KL of 0 a hair below it; it is cut there."""
        mean = self.difference / self.softmax.total
        return (mean - self.softmax.log_normaliser + softmax.log_normaliser).clamp_min(0)


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


def _refuse_not_finite(x: Tensor) -> None:
    finite = torch.isfinite(x).all(1)
    if not finite.all():
        raise NotFinite(
            f"Row {int((~finite).nonzero()[0])} of the {len(x)} to project holds NaN or infinity. "
            "Find where it arises (capture the layers below), or drop the row."
        )


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _multiplies_exactly(x: Tensor, W_U: Tensor) -> bool:
    """Whether bfloat16 can be multiplied into float32 without rounding the sum back (CUDA, torch >= 2.8)."""
    return x.is_cuda and x.dtype == W_U.dtype == torch.bfloat16 and _MM_TAKES_OUT_DTYPE


def _stack(blocks: list[Projection]) -> Projection:
    if len(blocks) == 1:
        return blocks[0]
    parts = {f.name: [getattr(block, f.name) for block in blocks] for f in fields(Projection)}
    joined: dict[str, Any] = {name: None if part[0] is None else torch.cat(part) for name, part in parts.items()}
    return Projection(**joined)
