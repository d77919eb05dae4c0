"""Which words directions speak for: attention's output rows, singular vectors, or any other, read as neurons are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analyses import direction_folder
from workbench.analyses.directions import Directions, given_directions
from workbench.analyses.neuron_map import NULL_QUANTILE
from workbench.analyses.neuron_score import NULL_ROWS, Isotropic, Population
from workbench.errors import UnknownOption, require_one_of
from workbench.model import LanguageModel
from workbench.projection import Decoder, Projection
from workbench.projector import Projector
from workbench.results import Result, versions
from workbench.tokens import joined, shown

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SHOWN = 20
"""Directions that are printed, all of them; of more the ten that stand out most."""


@dataclass(frozen=True, eq=False, repr=False)
class DecodedDirections(Result):
    """Top tokens of directions. `table` has one row a direction and rank.

    Columns: direction (a running number), the labels of its kind, rank (0 the best), token_id, token, logit, probability and
    score: standard deviations that the direction, scaled to norm 1, stands out for the token among the directions that
    `settings["population"]` names.
    """

    bottom: pd.DataFrame
    """As `table`, for the tokens of the lowest logits (rank 0 the lowest): of a direction whose sign is free, the other end."""
    null: pd.DataFrame
    """What random directions of that population reach: columns top (their best score) and bottom (their lowest)."""

    @property
    def labels(self) -> list[str]:
        """The columns that name a direction."""
        return list(self.table.columns[1 : self.table.columns.get_loc("rank")])

    def best(self) -> pd.DataFrame:
        """One row a direction: its labels, and of each end the word that stands out most, its score and all tokens in order.

        Columns: direction, labels, word, score, tokens, bottom_word, bottom_score, bottom_tokens.
        """
        import pandas as pd

        k = self.settings["k"]
        found = self.table.iloc[::k][["direction", *self.labels]].reset_index(drop=True)
        for end, table in (("", self.table), ("bottom_", self.bottom)):
            scores, tokens = (table[column].to_numpy().reshape(-1, k) for column in ("score", "token"))
            at = scores.argmin(1) if end else scores.argmax(1)
            rows = range(len(at))
            found[f"{end}word"], found[f"{end}score"] = tokens[rows, at], scores[rows, at]
            found[f"{end}tokens"] = [joined(row) for row in tokens]
        return pd.DataFrame(found)

    def summary(self) -> pd.DataFrame:
        """A row an end: columns end, directions, threshold (the null's 99 % quantile), beyond (share of directions past it),
        null_share (1 %), median_score, null_median_score."""
        import pandas as pd

        best, rows = self.best(), []
        for end, column, sign in (("top", "score", 1), ("bottom", "bottom_score", -1)):
            own, null = sign * best[column], sign * self.null[end]
            threshold = null.quantile(NULL_QUANTILE)
            rows.append(
                {
                    "end": end, "directions": len(own), "threshold": sign * threshold, "beyond": (own > threshold).mean(),
                    "null_share": 1 - NULL_QUANTILE, "median_score": sign * own.median(),
                    "null_median_score": sign * null.median(),
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def specialised(self, n: int = 20) -> pd.DataFrame:
        """The n directions that stand out most for a word at either end, as `best` gives them."""
        best = self.best()
        strongest = best[["score"]].assign(bottom=-best["bottom_score"]).max(axis=1)
        return best.loc[strongest.sort_values(ascending=False, kind="stable").index[:n]].reset_index(drop=True)

    def shares(self) -> pd.DataFrame:
        """Of attention's output rows: the share of each head's rows beyond the null's 99 % at the top, and its best row.

        Columns: layer, head, beyond, row, word, score.
        """
        if "head" not in self.labels:
            raise UnknownOption("Shares are of heads; these directions are " + self.settings["directions"] + ".")
        best = self.best()
        best["beyond"] = best["score"] > self.summary()["threshold"].iloc[0]
        heads = best.groupby(["layer", "head"])
        top = best.loc[heads["score"].idxmax(), ["layer", "head", "row", "word", "score"]].set_index(["layer", "head"])
        return heads["beyond"].mean().to_frame().join(top).reset_index()

    def plot(self) -> go.Figure:
        """Of heads, the share of their rows that speak for a word; of other directions, both ends' scores beside the null."""
        from workbench.plots.decoded_directions import plot_decoded_directions

        return plot_decoded_directions(self)

    def save(self, folder: str | Path) -> Path:
        """Write directions.parquet, directions_bottom.parquet, null.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return direction_folder.write(Path(folder), self.table, self.bottom, self.null, self.settings)

    @classmethod
    def load(cls, folder: str | Path) -> DecodedDirections:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no complete result of this kind.
        """
        table, bottom, null, settings = direction_folder.read(Path(folder))
        return cls(table=table, settings=settings, bottom=bottom, null=null)

    def __str__(self) -> str:
        own = self.settings
        lines = [f"{own['n']:,} {own['directions']} of {own['model']}, against {own['population']}"]
        lines += [
            f"  {row.end:<7}{row.beyond:6.1%} beyond {row.threshold:+.1f} (random directions: {row.null_share:.0%})"
            for row in self.summary().itertuples()
        ]
        shown_rows = self.best() if own["n"] <= SHOWN else self.specialised(SHOWN // 2)  # few keep their own order
        for row in shown_rows.to_dict("records"):
            name = " ".join(f"{column} {_short(row[column])}" for column in self.labels)
            lines += [
                f"  {name}",
                f"    {row['score']:+6.1f} {shown(row['word'])!r}: {row['tokens']}",
                f"    {row['bottom_score']:+6.1f} {shown(row['bottom_word'])!r}: {row['bottom_tokens']}",
            ]
        return "\n".join([*lines, "  .table .bottom .best() .specialised(20) .summary() .plot() .save(folder)"])


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@torch.no_grad()
def decode_directions(
    model: LanguageModel,
    directions: Directions | Tensor | np.ndarray | Mapping[str, Tensor] | str | Path,
    *,
    k: int = 10,
    decoder: Decoder = "none",
    seed: int = 0,
    progress: bool = True,
) -> DecodedDirections:
    """Read directions of the residual stream in the vocabulary, as `wb.map_neurons` reads neurons.

    A score says how far a direction stands out for a word among others. Those are the set's own directions, if there are more
    than `d_model` of them (so that their covariance has full rank), or else directions without a preference (Gaussian, in
    closed form); `settings["population"]` says which.

    Args:
        directions: `wb.head_directions(model)`, `wb.singular_directions(model, "W_out", 10)`, or your own: a tensor
            `[n, d_model]`, tensors by name, or a .safetensors or .npy file.
        k: Top and bottom tokens of each.
        decoder: How rows meet the vocabulary; see `workbench.vocabulary.Vocabulary`.
        seed: Of the random directions of the null.
    Raises:
        UnknownOption: if directions are not of the model's width, or k is below 1.
        BadArtifact: if a file cannot be read.
        NotFinite: if a direction holds NaN or infinity.
    """
    import pandas as pd

    require_one_of("decoder", decoder, get_args(Decoder))
    if k < 1:
        raise UnknownOption(f"k={k} tokens a direction were asked for. Ask for one or more.")
    found = directions if isinstance(directions, Directions) else given_directions(model, directions)
    k, vocabulary, parts = min(k, model.d_vocab), model.vocabulary, range(len(found.sizes))
    home = vocabulary.W_U.device

    def rows(part: int) -> Tensor:
        return found.read(part).to(home)

    own = len(found) > model.d_model
    population = Population(vocabulary, decoder, rows, parts) if own else Isotropic(vocabulary, decoder)
    projector = Projector(vocabulary, decoder, k, k)
    tops, bottoms = [], []
    for part in tqdm(parts, desc="decode", unit="part", disable=not progress or len(parts) < 2):
        these = rows(part)
        decoded = projector(these)
        tops.append(_ranked(population, these, decoded, model.token_strings, bottom=False))
        bottoms.append(_ranked(population, these, decoded, model.token_strings, bottom=True))
    settings: dict[str, Any] = model.provenance | {
        "directions": found.kind, "n": len(found), "k": k, "decoder": decoder, "seed": seed,
        "population": "themselves" if own else "directions without a preference", "engine": projector.engine,
        "versions": versions(),
    }  # fmt: skip
    names = found.labels.reset_index(names="direction")
    names = names.loc[names.index.repeat(k)].reset_index(drop=True)
    random = population.random(seed, NULL_ROWS)
    null = projector(random)
    return DecodedDirections(
        table=pd.concat([names, pd.concat(tops, ignore_index=True)], axis=1),
        settings=settings,
        bottom=pd.concat([names, pd.concat(bottoms, ignore_index=True)], axis=1),
        null=pd.DataFrame(
            {
                "top": population.scores(random, null.top_ids, null.top_logits).amax(1).cpu(),
                "bottom": population.scores(random, null.bottom_ids, null.bottom_logits).amin(1).cpu(),
            }
        ),
    )


def _ranked(population: Population, rows: Tensor, found: Projection, tokens: list[str], *, bottom: bool) -> pd.DataFrame:
    import pandas as pd

    ids = found.bottom_ids if bottom else found.top_ids
    logits = found.bottom_logits if bottom else found.top_logits
    probabilities = found.bottom_probabilities if bottom else found.top_probabilities
    flat = ids.flatten().int().cpu().numpy()
    return pd.DataFrame(
        {
            "rank": np.tile(np.arange(ids.shape[1], dtype=np.int32), len(ids)),
            "token_id": flat,
            "token": pd.array(tokens, dtype="str").take(flat),
            "logit": logits.flatten().float().cpu().numpy(),
            "probability": probabilities.flatten().float().cpu().numpy(),
            "score": population.scores(rows, ids, logits).flatten().cpu().numpy(),
        }
    )
