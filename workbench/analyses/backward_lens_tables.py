"""Tables of a backward lens: words of the factors that are as wide as the stream, lengths of all, ranks of the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.analyses.vocabulary_ends import ends_table
from workbench.gradients.collect import Gradients
from workbench.gradients.matrices import READING, WRITING
from workbench.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas as pd

RANDOM = 256
"""Random vectors whose best score is the null of a score."""


class Vectors(NamedTuple):
    """One vector a token, as wide as the stream."""

    layer: int
    matrix: str
    kind: str
    """`X`, what went in; `D`, the derivative at what came out."""
    rows: Float[Tensor, "token d_model"]
    zero: Bool[Tensor, " token"]
    """Where the parts of the gradient that it belongs to are 0."""


def stream_vectors(gradients: Gradients) -> list[Vectors]:
    """All factors that are as wide as the stream: inputs of the matrices that read it, those of one input once; derivatives of
    those that write to it, and the stream's own where a norm or a multiplier stands between."""
    found: list[Vectors] = []
    read: dict[tuple[int, int], int] = {}
    for one in gradients.matrices.values():
        if one.kind not in (*READING, *WRITING):
            continue
        own = gradients[one.name]
        zero = own.D.abs().amax(1) == 0
        if one.kind in READING:
            key = (one.layer, gradients.inputs[one.path].data_ptr())
            if key in read:
                known = found[read[key]]
                found[read[key]] = known._replace(matrix=f"{known.matrix} {one.kind}", zero=known.zero & zero)
            else:
                read[key] = len(found)
                found.append(Vectors(one.layer, one.kind, "X", own.X, zero))
        else:
            found.append(Vectors(one.layer, one.kind, "D", own.D, zero))
            site = "attn_out" if one.kind == "W_O" else "mlp_out"
            if (apart := gradients.stream.get(f"{site}.{one.layer}")) is not None:
                found.append(Vectors(one.layer, site, "D", apart, apart.abs().amax(1) == 0))
    return found


def words_table(
    gradients: Gradients, first: Int[Tensor, " batch"] | None, k: int, *, paper: bool
) -> tuple[pd.DataFrame, dict[tuple[int, str], Int[Tensor, " token"]]]:
    """The table, and the rank of each text's first target token by layer and name (-1 where the part is 0). All vectors are
    projected together."""
    import numpy as np
    import pandas as pd

    vocabulary, found = gradients.model.vocabulary, stream_vectors(gradients)
    home, (row, pos) = vocabulary.W_U.device, gradients.tokens_at
    rows = torch.cat([one.rows.to(home) for one in found]) if found else torch.zeros(0, vocabulary.d_model, device=home)
    kept = ~torch.cat([one.zero.to(home) for one in found]) if found else torch.zeros(0, dtype=torch.bool, device=home)
    at = kept.nonzero()[:, 0]
    which, token = (at // len(row)).cpu().numpy(), (at % len(row)).to(row.device)
    said = vocabulary.project(
        rows[kept] if paper else unit(rows[kept]), decoder="norm" if paper else "gain", k=k, k_bottom=k,
        targets=None if first is None else first[row[token]].to(home)[:, None],
    )  # fmt: skip
    ranks = {}
    if said.target_ranks is not None:
        every = torch.full((len(rows),), -1)
        every[at.cpu()] = said.target_ranks[:, 0].cpu()
        own = every.unflatten(0, (-1, len(row)))
        ranks = {(one.layer, name): own[i] for i, one in enumerate(found) for name in one.matrix.split()}
    where = pd.DataFrame(
        {
            "row": row[token].cpu().numpy(), "layer": np.array([one.layer for one in found], dtype=int)[which],
            "matrix": np.array([one.matrix for one in found], dtype=object)[which],
            "vector": np.array([one.kind for one in found], dtype=object)[which], "pos": pos[token].cpu().numpy(),
        }
    )  # fmt: skip
    return ends_table(where, said, gradients.model.token_strings, "score"), ranks


def unit(rows: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
    """Rows at length 1, in float32 at least; brought to size first, as the squares of short derivatives would be 0."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    rows = rows / rows.abs().amax(1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True)


def random_scores(vocabulary: Vocabulary, seed: int = 0) -> dict[str, float]:
    """The best score of random vectors of length 1: median, and what one in a hundred comes to."""
    d = vocabulary.d_model
    rows = unit(torch.randn(RANDOM, d, generator=torch.Generator().manual_seed(seed))).to(vocabulary.W_U.device)
    best = vocabulary.project(rows, decoder="gain", k=1).top_logits[:, 0].float()
    return {"median": float(best.median()), "one_in_100": float(best.quantile(0.99))}


def vectors_table(gradients: Gradients, ranks: dict[tuple[int, str], Int[Tensor, " token"]]) -> pd.DataFrame:
    """Lengths of both factors, by matrix and token."""
    import numpy as np
    import pandas as pd

    row, pos = (index.cpu().numpy() for index in gradients.tokens_at)
    strings, ids = gradients.model.token_strings, gradients.batch.tokens[gradients.batch.mask].tolist()
    matrices, n = list(gradients.matrices.values()), len(gradients.matrices)
    factors = [gradients[one.name] for one in matrices]
    X, D = (torch.cat([_lengths(getattr(one, side)) for one in factors]).numpy() for side in ("X", "D"))
    zero = torch.cat([(one.D.abs().amax(1) == 0).cpu() for one in factors]).numpy()
    unknown = torch.full((len(row),), -1)
    rank = pd.Series(torch.cat([ranks.get((one.layer, one.kind), unknown) for one in matrices]).numpy(), dtype="Int64")
    return pd.DataFrame(
        {
            "row": np.tile(row, n), "layer": np.repeat([one.layer for one in matrices], len(row)),
            "matrix": np.repeat(np.array([one.kind for one in matrices], dtype=object), len(row)), "pos": np.tile(pos, n),
            "token": [strings[i] for i in ids] * n, "x_norm": X, "d_norm": D, "norm": X * D, "zero": zero,
            "target_rank": rank.where(rank >= 0),
        }
    )  # fmt: skip


def _lengths(rows: Tensor) -> Tensor:
    return (rows if rows.dtype == torch.float64 else rows.float()).norm(dim=1).cpu()


def matrices_table(gradients: Gradients) -> pd.DataFrame:
    """Length, rank and first direction of each text's gradient of each matrix, from singular values of the factors."""
    import pandas as pd

    rows = []
    for name, one in gradients.matrices.items():
        whole = gradients[name]
        for row in range(len(gradients.batch.mask)):
            own = whole.of_row(row)
            values = own.singular_values()
            squares = values.square()
            total = float(squares.sum())
            rows.append(
                {
                    "row": row, "layer": one.layer, "matrix": one.kind, "tokens": len(own.X), "norm": total**0.5,
                    "rank": own.rank_of(values), "largest": float(values[0]),
                    "share": float(squares[0]) / total if total else None,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)
