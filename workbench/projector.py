"""Rows into tokens: which engine multiplies, and the order of tokens that its rounding leaves open.

On GPUs where it was measured one kernel multiplies and ranks (`fused_projection`); all else goes through `tiles`.
"""

from dataclasses import replace
from functools import cache, cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import NotFinite, require_one_of
from workbench.near_ties import ERROR, GROWTH, SPARE, settle
from workbench.projection import Decoder, Head, Projection, accumulation_dtype, no_such_id, stacked
from workbench.tiles import Tiles, memory_of

if TYPE_CHECKING:
    from workbench.fused_projection import FusedProduct

Engine = Literal["tiles", "fused"]
NORMS = 4096
"""Rows that are decoded at a time for their norms: all at once would take more memory than the logits in flight."""
COLUMNS_AT_ONCE = 32768


class Projector:
    """`Vocabulary.project` with its options fixed, for many calls: buffers are kept from one call to the next."""

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
        bottom = self.k_bottom + SPARE if self.k_bottom else 0
        self._tiles = Tiles(head, decoder, self.k + SPARE, bottom, entropy, memory)
        self._fused: FusedProduct | None = None

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "rows d_model"],
        targets: Int[Tensor, " targets"] | Int[Tensor, "rows targets"] | None = None,
        reference: Float[Tensor, "#rows d_model"] | None = None,
        last_of: int | None = None,
    ) -> Projection:
        require_one_of("decoder", self.decoder, get_args(Decoder))
        if reference is not None:
            _refuse_not_finite(reference, "of the reference")
            if len(reference) not in (1, len(x)):
                raise ValueError(f"reference has {len(reference)} rows for {len(x)} to project; give one, or one for each.")
        if last_of is not None and (reference is not None or last_of < 1 or len(x) % last_of):
            raise ValueError(f"last_of={last_of} for {len(x)} rows: give groups of one size, and no other reference.")
        if targets is not None:
            for token in targets[(targets < 0) | (targets >= self.head.d_vocab)].tolist():
                raise no_such_id(token, self.head.d_vocab)
            targets = targets.to(x.device).expand(len(x), -1)
        if reference is None and self._takes_fused(x):
            self.engine = "fused"
            found, crowded = self._in_one_kernel(x, targets, last_of)
        else:
            self.engine = "tiles"
            found, crowded = self._settled(x, self._tiles(x, targets, reference, last_of))
        if not torch.isfinite(found.log_normaliser).all():
            _refuse_not_finite(x, "to project")
            raise NotFinite("Logits overflow: rows of this size have no softmax. Scale them down, or use decoder='norm'.")
        if len(rows := crowded.nonzero()[:, 0]):
            exactly = Projector(self.head, self.decoder, self.k, self.k_bottom, memory=self.memory)(x[rows].double())
            for name in ("top_ids", "top_logits", "bottom_ids", "bottom_logits"):
                part = getattr(found, name)
                part[rows] = getattr(exactly, name).to(part.dtype)
        return found

    def _settled(self, x: Tensor, found: Projection) -> tuple[Projection, Bool[Tensor, " rows"]]:
        """The tokens that are wanted, those that rounding left open put in order, and the rows with too many such."""
        best = {
            "top": (found.top_logits, found.top_ids, self.k),
            "bottom": (found.bottom_logits, found.bottom_ids, self.k_bottom),
        }
        settled, crowded = {}, torch.zeros(len(x), dtype=torch.bool, device=x.device)
        error = self._error(x) if len(x) and accumulation_dtype(x) == torch.float32 else None

        def exact(rows: Tensor, ids: Tensor) -> Tensor:
            return self.head.logits_at(self.head.decoded(x[rows].double(), self.decoder), ids, self.decoder)

        for name, (logits, ids, k) in best.items():
            if error is not None and k:
                growth = GROWTH * x.shape[1] * logits.abs().amax(1)
                logits, ids, full = settle(logits, ids, k, error + growth, exact, largest=name == "top")
                crowded[full] = True
            settled |= {f"{name}_logits": logits[:, :k].contiguous(), f"{name}_ids": ids[:, :k].contiguous()}
        return replace(found, **settled), crowded

    def _error(self, x: Tensor) -> Float[Tensor, " rows"]:
        """By how much logits of each row may err, beside what grows with the logit."""
        norms = [self.head.decoded(part, self.decoder).norm(dim=1, dtype=torch.float32) for part in x.split(NORMS)]
        return ERROR * self._scale * torch.cat(norms)

    @cached_property
    def _scale(self) -> float:
        return self.head.scale(self.decoder)

    def _takes_fused(self, x: Tensor) -> bool:
        if not x.is_cuda or not len(x) or not _has_triton():
            return False
        from workbench.fused_projection import fits

        W_U, rows = self.head.matrix(self.decoder), self.head.decoded(x[:1], self.decoder)
        return W_U is not None and fits(rows, W_U, max(self.k, self.k_bottom))

    def _in_one_kernel(
        self, x: Tensor, targets: Tensor | None, last_of: int | None
    ) -> tuple[Projection, Bool[Tensor, " rows"]]:
        """A token counts as before a target only where its logit is higher by more than rounding can make it: unlike in
        `tiles`, the target's own logit is another product than those it is compared with. So the rank of a token in the thick
        of the vocabulary may come out too small by as many as lie that near to it."""
        from workbench.fused_projection import FusedProduct, bytes_a_row

        most, together = max(1, memory_of(x.device, self.memory) // bytes_a_row(self.head.d_vocab)), last_of or 1
        height = -(-len(x) // -(-len(x) // most))  # blocks of one size
        height = max(1, -(-height // together)) * together
        bars = 0 if targets is None else targets.shape[1]
        W_U = self.head.matrix(self.decoder)
        assert W_U is not None
        if self._fused is None or self._fused.height < height or self._fused.bars != bars:
            self._fused = FusedProduct(W_U, height, self.k, self.k_bottom, self.entropy, bars)
        blocks, crowded = [], []
        for start in range(0, len(x), height):
            part = x[start : start + height]
            rows, error = self.head.decoded(part, self.decoder), self._error(part)
            own = torch.empty(len(part), 0, device=x.device)
            if targets is not None:
                own = self.head.logits_at(rows.float(), targets[start : start + height], self.decoder)
            top, bottom, normaliser, entropy, above = self._fused(
                rows, error, own + error[:, None] + GROWTH * x.shape[1] * own.abs()
            )
            blocks.append(
                Projection(
                    top.columns, top.values, bottom.columns, bottom.values, normaliser,
                    entropy_nats=entropy if self.entropy else None,
                    target_logits=own if bars else None, target_ranks=above if bars else None,
                    kl_nats=None if last_of is None else _from_last(rows, normaliser, W_U, last_of),
                )
            )  # fmt: skip
            crowded.append(top.crowded | bottom.crowded)
        return stacked(blocks), torch.cat(crowded)


def _from_last(rows: Tensor, normaliser: Tensor, W_U: Tensor, last_of: int) -> Tensor:
    """KL(last || row) in groups of so many: Σ p (logit_last - logit_row) is the difference of the rows, times the mean column
    of `W_U` under p. So it takes a product for each group, not for each row. The p are split in two halves, as their products
    with half-precision columns are exact only so."""
    groups, lasts = rows.unflatten(0, (-1, last_of)).float(), rows[last_of - 1 :: last_of]
    of_lasts = normaliser[last_of - 1 :: last_of, None]
    mean = torch.zeros(lasts.shape, device=rows.device, dtype=torch.float32)
    for a in range(0, W_U.shape[1], COLUMNS_AT_ONCE):
        U = W_U[:, a : a + COLUMNS_AT_ONCE]
        p = torch.mm(lasts, U, out_dtype=torch.float32).sub_(of_lasts).exp_()
        high = p.to(U.dtype)
        for half in (high, p.sub_(high).to(U.dtype)):
            mean += torch.mm(half, U.T, out_dtype=torch.float32)
    difference = torch.linalg.vecdot(groups[:, -1:] - groups, mean[:, None])
    return (difference + normaliser.unflatten(0, (-1, last_of)) - of_lasts).clamp_min(0).flatten()


def _refuse_not_finite(x: Tensor, which: str) -> None:
    finite = torch.isfinite(x).all(1)
    if not finite.all():
        raise NotFinite(
            f"Row {int((~finite).nonzero()[0])} of the {len(x)} {which} holds NaN or infinity. "
            "Find where it arises (capture the layers below), or drop the row."
        )


@cache
def _has_triton() -> bool:
    """Whether there is a Triton with tensor descriptors, which the kernel is written for."""
    return find_spec("triton") is not None and find_spec("triton.tools.tensor_descriptor") is not None
