"""The backward lens: what the gradient of a loss would write into each weight matrix, in words.

Source: Katz, Belinkov, Geva and Wolf 2024 (arXiv 2402.12865). Every gradient is a sum over tokens of what went in times the
derivative at what came out (`workbench.gradients.gradient`). The one of the two that is as wide as the stream is read through
the vocabulary: inputs of the matrices that read the stream, derivatives of those that write to it. Where it differs from the
paper:

- vectors are brought to length 1 and read by the linear part of the final norm (`gain`). Derivatives are so short (1e-3 and
  less) that the norm's epsilon and bias would drown them; `paper=True` reads them as the paper does, by the whole norm;
- both ends of the vocabulary are shown: of a derivative the lowest tokens are those that a step writes;
- what is 0 by construction (in the last block, at tokens that nothing later reads) is left out, not shown as words;
- after a norm that follows attention or MLP, or a multiplier, the derivative at the matrix is not that at the stream: both are
  shown (`attn_out`, `mlp_out`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from workbench.analyses.backward_lens_tables import matrices_table, random_scores, vectors_table, words_table
from workbench.analyses.moved_neurons import moved_neurons
from workbench.artifacts import read_tables, write_tables
from workbench.errors import BadArtifact, UnknownOption
from workbench.gradients.collect import Gradients, Loss, collect_gradients
from workbench.gradients.targets import Target, Targets, with_targets
from workbench.model import Batch, LanguageModel
from workbench.results import Result, versions

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "backward_lens"


@dataclass(frozen=True, eq=False, repr=False)
class BackwardLens(Result):
    """`table` has a row a vector, end (`up`, `down`) and rank: row (the text), layer, matrix, vector (`X` or `D`), pos, end,
    rank, token_id, token, score (the logit of the vector at length 1; the model's logit with `paper=True`). Several matrices
    that read the same input stand in one name, as `W_Q W_K W_V`. Of a derivative D, `down` is what a step of gradient descent
    writes.

    `vectors` has a row a text, matrix and position: row, layer, matrix, pos, token, x_norm, d_norm, norm (their product, the
    length of that token's part of the gradient), zero (by construction), target_rank (of the text's first target token among
    all, 0 the highest; None where nothing is as wide as the stream).

    `matrices` has a row a text and matrix: row, layer, matrix, tokens, norm (Frobenius), rank, largest (singular value), share
    (of the squared norm in the first direction).

    `targets` has a row a target token: row, pos (the token that should foretell it), target_id, target, log_probability, rank.
    """

    vectors: pd.DataFrame
    matrices: pd.DataFrame
    targets: pd.DataFrame
    gradients: Gradients | None = None
    """Both factors of every matrix; None in a result that was read from a folder."""

    def neurons(self, layer: int, matrix: str = "W_out", *, row: int = 0, k: int = 10) -> pd.DataFrame:
        """Neurons of a layer's MLP that a step on one text's loss would move most, with the words of what it adds to each: see
        `workbench.analyses.moved_neurons`.

        Raises:
            BadArtifact: if the result was read from a folder, which holds no factors.
            MissingWeight: if the layer has no such matrix, or gradients of it were not asked for.
        """
        if self.gradients is None:
            raise BadArtifact("A result that was read from a folder holds no factors. Run wb.backward_lens again.")
        return moved_neurons(self.gradients, layer, matrix, row, k)

    def plot(self, matrix: str | None = None, *, row: int = 0) -> go.Figure:
        """How long each token's part of the gradient is, layers up and tokens across, blank where it is 0 by construction;
        words under the cursor.

        Args:
            matrix: `W_out`, say; all matrices beside each other, if None.
            row: Which text.
        """
        from workbench.plots.backward_lens import plot_backward_lens

        return plot_backward_lens(self, matrix, row)

    def save(self, folder: str | Path) -> Path:
        """Write backward_lens.parquet, vectors.parquet, matrices.parquet, targets.parquet and, last, run.json. Factors are not
        written.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        tables = {KIND: self.table, "vectors": self.vectors, "matrices": self.matrices, "targets": self.targets}
        return write_tables(folder, KIND, self.settings, tables)

    @classmethod
    def load(cls, folder: str | Path) -> BackwardLens:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        table, others, settings = read_tables(folder, KIND, "workbench backward-lens", ("vectors", "matrices", "targets"))
        vectors, matrices, targets = others["vectors"], others["matrices"], others["targets"]
        if vectors is None or matrices is None or targets is None:
            raise BadArtifact(f"The {KIND} in {str(folder)!r} is damaged: a table is missing. Make it again.")
        return cls(table=table, settings=settings, vectors=vectors, matrices=matrices, targets=targets)

    def __str__(self) -> str:
        from workbench.analyses.backward_lens_text import summary

        return summary(self)


def backward_lens(
    model: LanguageModel,
    prompts: str | Sequence[str],
    target: Target | Sequence[Target] | None = None,
    *,
    loss: Loss | None = None,
    layers: str | None = None,
    matrices: Sequence[str] | None = None,
    k: int = 5,
    paper: bool = False,
) -> BackwardLens:
    """Take the gradient of -log p(target | prompt), summed over target tokens and texts, and read it.

    Args:
        prompts: One or several texts.
        target: What should follow: a text (of which a leading space is a part), a token id, or several ids; for several prompts
            one each. Its tokens are foretold one after the other, each with those before it in place.
        loss: Another loss in the place of a target's: from logits `[batch, pos, d_vocab]` and batch to a number.
        layers: Blocks, as `parse_layers` reads them; all, if None.
        matrices: Of `W_Q W_K W_V W_O W_in W_gate W_out W_router`; if None those and every other linear module of the blocks.
            Routed experts are given only some of the tokens, and have no gradient here.
        k: How many tokens of each end.
        paper: Read vectors as they are by the whole final norm, as the paper does.
    Raises:
        UnknownOption: if k is not 1 or more, a target has no tokens, or not one of target and loss is given.
        UnknownToken, LengthMismatch: as `with_targets`.
        NoGradient, NotFinite: as `collect_gradients`.
        MissingWeight, LayerOutOfRange, TextTooLong, WorkbenchError: as `matrices_of` and `capture`.
    """
    import pandas as pd

    if k < 1:
        raise UnknownOption(f"k={k} tokens were asked for. Ask for one or more.")
    if (target is None) == (loss is None):
        raise UnknownOption("Give a target, or a loss of your own: one of the two.")
    if loss is None:
        assert target is not None
        wanted = with_targets(model, prompts, target)
        said: list[Tensor] = []
        gradients = collect_gradients(
            model, wanted.batch, _noting(wanted, said), columns=wanted.columns, layers=layers, matrices=matrices
        )
        targets, first = _targets_table(model, wanted, wanted.logits(said[0])), wanted.token[wanted.first()]
    else:
        gradients = collect_gradients(model, model.tokenize(prompts), loss, layers=layers, matrices=matrices)
        targets, first = pd.DataFrame(columns=["row", "pos", "target_id", "target", "log_probability", "rank"]), None
    table, ranks = words_table(gradients, first, k, paper=paper)
    settings = model.provenance | {
        "texts": prompts if isinstance(prompts, str) else list(prompts), "loss": gradients.loss, "own_loss": loss is not None,
        "layers": layers, "matrices": None if matrices is None else list(matrices), "k": k, "paper": paper,
        "null_score": None if paper else random_scores(model.vocabulary), "versions": versions(),
    }  # fmt: skip
    vectors = vectors_table(gradients, ranks)
    return BackwardLens(
        table=table,
        settings=settings,
        vectors=vectors,
        matrices=matrices_table(gradients),
        targets=targets,
        gradients=gradients,
    )


def _noting(wanted: Targets, said: list[Tensor]) -> Loss:
    """The targets' loss, which puts the logits into the list: they are in the table of targets too."""

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        said.append(logits.detach())
        return wanted.loss(logits, batch)

    return loss


def _targets_table(model: LanguageModel, wanted: Targets, logits: Tensor) -> pd.DataFrame:
    import pandas as pd

    own = logits.gather(1, wanted.token[:, None])
    places = wanted.batch.mask.long().cumsum(1)[wanted.row, wanted.column] - 1
    ids = wanted.token.tolist()
    return pd.DataFrame(
        {
            "row": wanted.row.tolist(), "pos": places.tolist(), "target_id": ids,
            "target": [model.token_strings[i] for i in ids],
            "log_probability": (own[:, 0] - logits.logsumexp(-1)).tolist(), "rank": (logits > own).sum(1).tolist(),
        }
    )  # fmt: skip
