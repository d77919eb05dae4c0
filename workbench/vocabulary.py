"""Vocabulary projection: the one place where anything meets the whole unembedding matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.projection import Decoder, Projection, accumulation_dtype, no_such_id
from workbench.projector import Projector
from workbench.tiles import TILE, spans

_HALVES = (torch.bfloat16, torch.float16)
_MM_TAKES_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


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
    gain: Float[Tensor, " d_model"] | None
    """The final norm's effective gain (`1 + weight` where the family has it so); None for a norm without weights."""
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
            raise no_such_id(token, self.d_vocab)
        return self.W_U[:, token]

    def mean_direction(self) -> Float[Tensor, " d_model"]:
        """The mean of all columns of `W_U`, in the accumulation dtype: what a logit is centred by."""
        return self.W_U.mean(1, dtype=accumulation_dtype(self.W_U))

    def linear_part(self, x: Float[Tensor, "*batch d_model"], decoder: Decoder) -> Float[Tensor, "*batch d_model"]:
        """What multiplies `W_U` if only the linear part of the decoder is taken: x, scaled by the gain unless it is `none`."""
        if decoder == "none" or self.gain is None:
            return x
        return x.to(accumulation_dtype(x)) * self.gain.to(x.device, accumulation_dtype(x))

    @torch.no_grad()
    def logits_of(self, x: Float[Tensor, "rows d_model"], ids: Int[Tensor, "rows k"]) -> Float[Tensor, "rows k"]:
        """Products of each row with a few columns of `W_U` of its own (decoder `none`)."""
        return torch.stack([(x * self.W_U.T[column].to(x.dtype)).sum(1) for column in ids.T], 1)

    def logits_at(
        self, rows: Float[Tensor, "rows d_model"], ids: Int[Tensor, "rows k"], decoder: Decoder
    ) -> Float[Tensor, "rows k"]:
        """Logits of a few tokens of each row's own, for rows that were `decoded`, in their dtype."""
        return self._head(self.logits_of(rows, ids), None if self.b_U is None else self.b_U[ids], decoder)

    @torch.no_grad()
    def scale(self, decoder: Decoder) -> float:
        """A bound of the logits of a decoded row of norm 1: rounding errors are relative to it."""
        longest = float(self.W_U.norm(dim=0, dtype=accumulation_dtype(self.W_U)).amax())
        if decoder != "norm":
            return longest
        bias = 0.0 if self.b_U is None else float(self.b_U.abs().amax())
        return longest * abs(self.logit_scale) + bias + (self.softcap or 0.0)

    def matrix(self, decoder: Decoder) -> Float[Tensor, "d_model d_vocab"] | None:
        """`W_U`, if the decoder's logits are the product with it and nothing more."""
        is_plain = self.b_U is None and self.softcap is None and self.logit_scale == 1.0
        return self.W_U if decoder != "norm" or is_plain else None

    @torch.no_grad()
    def logits(self, x: Float[Tensor, "*batch d_model"], *, decoder: Decoder = "norm") -> Float[Tensor, "*batch d_vocab"]:
        """All logits of a few vectors, dense. For many rows use `project`, which does not store them."""
        rows = self.decoded(x.flatten(0, -2), decoder)
        out = torch.cat([self.tile(rows, a, b, decoder) for a, b in spans(self.d_vocab, TILE)], 1)
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
        last_of: int | None = None,
        memory: int | None = None,
    ) -> Projection:
        """Decode rows into the vocabulary in one pass over tiles.

        Products are accumulated in float32 (float64 for float64 rows), also for bfloat16 weights, whose products are
        exact in it. Tokens whose order float32 rounding leaves open are compared in float64 (`near_ties`), so ids are those
        of a dense float64 product, whatever device or library multiplies (with `norm`, of the rows as the model's own norm
        gives them, in its own precision).

        Args:
            x: Vectors of the residual stream; any float dtype.
            decoder: See the class.
            k, k_bottom: How many best and worst tokens a row; each is cut to the vocabulary's size.
            targets: Token ids whose logit and rank are wanted, the same for all rows or a row of ids each.
            reference: Rows (or one row) q for KL(softmax(q) || softmax(x)), decoded by the same decoder.
            last_of: Rows come in groups of so many, and the last of each is the reference of all in it: KL without a product
                more.
            memory: Bytes of logits held at a time; 384 MiB on a CPU, 2 GiB on a GPU, if not given.
        Raises:
            NotFinite: if a row holds NaN or infinity; the first such row is named.
            UnknownToken: if a target is outside the vocabulary.
        """
        return Projector(self, decoder, k, k_bottom, entropy, memory)(x, targets, reference, last_of)

    @torch.no_grad()
    def logit_moments(
        self, mean: Float[Tensor, " d_model"], covariance: Float[Tensor, "d_model d_model"]
    ) -> tuple[Float[Tensor, " d_vocab"], Float[Tensor, " d_vocab"]]:
        """Mean and standard deviation of every token's logit over a population of rows, from the rows' moments alone.

        `E[u·w] = u·E[w]` and `Var[u·w] = uᵀ Cov[w] u` (decoder `none`): no row is projected.
        """
        means, deviations = [], []
        for a, b in spans(self.d_vocab, TILE):
            U = self.W_U[:, a:b].to(covariance.dtype)
            means.append(mean @ U)
            deviations.append(((covariance @ U) * U).sum(0).clamp_min(0).sqrt())
        return torch.cat(means), torch.cat(deviations)

    def decoded(self, x: Tensor, decoder: Decoder) -> Tensor:
        """Rows as the matrix product takes them: normed, or scaled by the gain, or as they are."""
        x = x.to(self.W_U.device)  # of a model that is spread over several, the layers may lie on others
        if decoder == "norm":
            normed = self.ln_final(x.to(self.W_U.dtype)).to(x.device)
            return normed if _multiplies_exactly(x, self.W_U) else normed.to(accumulation_dtype(x))
        if decoder == "gain" and self.gain is not None:
            return self.linear_part(x, decoder)
        return x if _multiplies_exactly(x, self.W_U) else x.to(accumulation_dtype(x))

    def tile(
        self, rows: Float[Tensor, "rows d_model"], a: int, b: int, decoder: Decoder, out: Tensor | None = None
    ) -> Float[Tensor, "rows tile"]:
        """Logits of the tokens a to b for rows that were `decoded`, in the accumulation dtype; into `out`, if given."""
        U = self.W_U[:, a:b]
        if rows.dtype in _HALVES:
            z = torch.mm(rows, U, out_dtype=torch.float32, out=out)
        else:
            z = torch.mm(rows, U.to(rows.dtype), out=out)
        return self._head(z, None if self.b_U is None else self.b_U[a:b], decoder)

    def _head(self, z: Tensor, bias: Tensor | None, decoder: Decoder) -> Tensor:
        """What decoder `norm` makes of products, in place."""
        if decoder == "norm":
            if self.logit_scale != 1.0:
                z *= self.logit_scale
            if bias is not None:
                z += bias.to(z.dtype)
            if self.softcap is not None:
                z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z


def _multiplies_exactly(x: Tensor, W_U: Tensor) -> bool:
    """Whether half-precision numbers can be multiplied into float32 without rounding the sum back (CUDA, torch >= 2.8)."""
    return x.is_cuda and x.dtype == W_U.dtype and x.dtype in _HALVES and _MM_TAKES_OUT_DTYPE
