"""How much of a neuron map another model keeps: two maps of the same neurons, compared neuron by neuron.

Source: Davies 2025 (arXiv 2501.02688), which reports that most up projections of Llama-3.1-8B and of its instruct version
share their top token. By itself such a share says little: attractor tokens, which win for many neurons, are shared by neurons
that have nothing to do with each other, and a small enough change of weights changes no token, whatever its direction. So each
figure stands beside its nulls:

- `shuffled`: each neuron of a beside another neuron of the same layer and side of b;
- `perturbed`, if both models are given: each row of a, moved in a random direction exactly as far as b's row lies from it,
  beside map a. Training changes rows and vocabulary (the unembedding, and with other decoders the final norm), and this null
  moves rows alone, decoded through a's vocabulary. (A random step leaves a's row in: where rows moved by their own length, as
  in a model trained anew, their cosine says more.) So it is to be read against
- `rows`: b's own rows through a's vocabulary, beside map a. Where it lies above `perturbed`, training spared the tokens more
  than chance would; what lies between it and the figure of the maps themselves is the vocabulary's part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from workbench.analyses.map_alignment import MEASURES, agreement, aligned, common, generator, groups, other_tokens
from workbench.analyses.map_rows import compare_rows
from workbench.analyses.neuron_map import NeuronMap, Side
from workbench.analyses.rank_overlap import PERSISTENCE
from workbench.artifacts import output_folder, settings_of, staged, write_json
from workbench.errors import BadArtifact, UnknownOption
from workbench.model import LanguageModel
from workbench.results import Result, versions
from workbench.sites import parse_layers
from workbench.tokens import shown

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "map comparison"
COMPARED = {
    "": "the second map", "rows_": "its rows alone", "perturbed_": "random rows as far away", "shuffled_": "another neuron",
}  # fmt: skip
_COLUMNS = ("same", "same_low", "same_high", "same_folded", "rbo", "rbo_bottom")


@dataclass(frozen=True, eq=False, repr=False)
class MapComparison(Result):
    """`table` has a row a neuron and side: layer, neuron, side, and of both maps, ending in `_a` and `_b`, token_id, token
    and score of the top token, and tokens, all top ones in order.

    How alike the two are: same (whether the top token is the same id), same_folded (or the same word, space and case aside),
    rbo and rbo_bottom (rank-biased overlap of the top and the bottom tokens, see `workbench.analyses.rank_overlap`). The same
    four of the nulls begin with `shuffled_` and, if both models were given, with `rows_` and `perturbed_`; there are then also
    cosine (between the rows of both models) and change (norm of their difference, relative to that of a's row).
    """

    def summary(self) -> pd.DataFrame:
        """A row a side: side, neurons, and for the maps and each null the share with the same top token (same, with its 95 %
        Wilson interval, same_low to same_high, which takes neurons as independent), same_folded, and the means rbo and
        rbo_bottom; with models cosine_median, cosine_low (5 % quantile) and change_median."""
        return self._means(["side"])

    def by_layer(self) -> pd.DataFrame:
        """As `summary`, a row a side and layer."""
        return self._means(["side", "layer"])

    def changed(
        self, n: int = 20, *, side: Side | None = None, layers: str | None = None, words: int | None = None
    ) -> pd.DataFrame:
        """The neurons that changed most: the least rank-biased overlap of their top tokens first, and of equal ones (0 says
        that no token is left) that which stood out most for the token it had, by its score in map a.

        Args:
            words: How many of a neuron's top tokens to name; all, if None.

        Columns: layer, neuron, side, rbo, score_a, score_b, tokens_a, tokens_b, and with models cosine and change.
        """
        table = self.table if side is None else self.table[self.table["side"] == side]
        if layers is not None:
            table = table[table["layer"].isin(parse_layers(layers, self.settings["n_layers"]))]
        ranked = table.sort_values(["rbo", "score_a"], ascending=[True, False], kind="stable").head(n)
        columns = ["layer", "neuron", "side", "rbo", "score_a", "score_b", "tokens_a", "tokens_b", "cosine", "change"]
        found = ranked[[column for column in columns if column in ranked]].reset_index(drop=True)
        for column in ("tokens_a", "tokens_b"):
            found[column] = found[column].map(lambda line: "  ".join(line.split("  ")[:words]))
        return found

    def compared(self) -> dict[str, str]:
        """What map a was held against, in words, by the prefix of its columns."""
        return {prefix: words for prefix, words in COMPARED.items() if f"{prefix}same" in self.table}

    def plot(self) -> go.Figure:
        """Share of neurons with the same top token by layer, and mean overlap, beside the nulls."""
        from workbench.plots.map_comparison import plot_map_comparison

        return plot_map_comparison(self)

    def save(self, folder: str | Path) -> Path:
        """Write comparison.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        folder = output_folder(Path(folder))
        with staged(folder / "comparison.parquet") as beside:
            self.table.to_parquet(beside, index=False, compression="zstd")
        write_json(folder / "run.json", {"kind": KIND} | self.settings)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> MapComparison:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        import pandas as pd

        settings = settings_of(Path(folder), KIND, "workbench compare-maps")
        try:
            table = pd.read_parquet(Path(folder) / "comparison.parquet")
        except (OSError, ValueError) as error:  # pyarrow's errors of a damaged file are among them
            raise BadArtifact(f"The {KIND} in {str(folder)!r} is damaged ({error}). Make it again.") from None
        return cls(table=table, settings=settings)

    def headline(self) -> str:
        """What was compared, and each side's figures beside its nulls, in a few lines."""
        own = self.settings
        a, b = (f"{own[which]['model']} ({own[which]['dtype']})" for which in ("a", "b"))
        depths = [own[which]["k"] for which in ("a", "b")]
        fewer = "" if depths[0] == depths[1] else f", the fewer of {depths[0]} and {depths[1]}"
        lines = [f"{a} beside {b}: neurons with the same top token, overlap of their {own['k']} top tokens{fewer}"]
        if own["other_tokens"]:
            lines.append(f"{own['other_tokens']} token ids stand for other strings in the second")
        for row in self.summary().to_dict("records"):
            lines.append(f"{row['side']} ({row['neurons']:,} neurons)")
            for prefix, against in self.compared().items():
                share, low, high, folded, top, bottom = (row[f"{prefix}{name}"] for name in _COLUMNS)
                lines.append(
                    f"  {against:<23}{share:7.2%} ({low:.2%} to {high:.2%}), folded {folded:7.2%}; "
                    f"overlap {top:.3f}, of the bottom {bottom:.3f}"
                )
            if "cosine_median" in row:
                lines.append(
                    f"  rows: cosine {row['cosine_median']:.5f} (5 % lie below {row['cosine_low']:.5f}), "
                    f"moved by {row['change_median']:.2%} of their norm (medians)"
                )
        return "\n".join(lines)

    def __str__(self) -> str:
        changed = [
            f"  {row.side:>5} {row.layer}.{row.neuron:<6}{row.rbo:5.2f}  {row.tokens_a}  ->  {row.tokens_b}"
            for row in self.changed(8, words=4).itertuples()
        ]
        end = "  .table .summary() .by_layer() .changed(20) .plot() .save(folder)"
        return "\n".join([self.headline(), "changed most, by their overlap:", *changed, end])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.headline())}</pre>{self.changed(10, words=5).to_html(index=False)}"

    def _means(self, keys: list[str]) -> pd.DataFrame:
        grouped = self.table.groupby(keys, observed=True, sort=False)
        found = grouped.size().rename("neurons").to_frame()
        for prefix in self.compared():
            means = grouped[[f"{prefix}{name}" for name in MEASURES]].mean()
            low, high = wilson(means[f"{prefix}same"].to_numpy(), found["neurons"].to_numpy())
            means[f"{prefix}same_low"], means[f"{prefix}same_high"] = low, high
            found = found.join(means[[f"{prefix}{name}" for name in _COLUMNS]])
        if "cosine" in self.table:
            found["cosine_median"] = grouped["cosine"].median()
            found["cosine_low"] = grouped["cosine"].quantile(0.05)
            found["change_median"] = grouped["change"].median()
        return found.reset_index()


def compare_maps(
    a: NeuronMap,
    b: NeuronMap,
    *,
    models: tuple[LanguageModel, LanguageModel] | None = None,
    side: Side | None = None,
    layers: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MapComparison:
    """Hold each neuron of a map against the same neuron in the map of another model, beside nulls.

    Args:
        a, b: Maps made in the same way, of two models of one shape and tokenizer. The sides that both have are compared, and as
            many tokens as the shorter lists have.
        models: Both maps' models, for the null that moves rows, and to compare the rows themselves.
        side, layers: Only these; all, if None.
        seed: Of the nulls.
    Raises:
        NotComparable: if the maps were made in different ways, or their neurons or tokens are not the same.
        LayerOutOfRange, UnknownOption: if there is no such layer; for a seed below 0.
        OtherJob: if a model has other weights than its map.
    """
    import pandas as pd

    if seed < 0:
        raise UnknownOption(f"seed={seed} was given. Seeds are 0 or more.")
    sides, chosen, k = common(a, b, side, layers)
    top_a, top_b, lists_a, lists_b = aligned(a, b, sides, chosen, k)
    partner = np.empty(len(top_a), np.int64)
    for (one, layer), at in groups(top_a).items():
        circle = generator(seed, "shuffled", one, layer).permutation(at)  # each takes the next one's: none meets itself
        partner[circle] = np.roll(circle, 1)
    columns = agreement("", lists_a, lists_b) | agreement("shuffled_", lists_a, lists_b.of(partner))
    table = top_a[["layer", "neuron", "side"]].copy()
    for which, neurons, top, lists in (("a", a, top_a, lists_a), ("b", b, top_b, lists_b)):
        for name in ("token_id", "token", "score"):
            table[f"{name}_{which}"] = top[name]
        table[f"tokens_{which}"] = _lines(neurons.tokens, lists.top)
    own = a.settings
    settings = {
        **{which: {name: neurons.settings[name] for name in ("model", "revision", "weights_hash", "family", "dtype", "k")}
           for which, neurons in (("a", a), ("b", b))},
        "sides": sides, "layers": chosen, "n_layers": own["n_layers"], "part": own["part"], "reading": own["reading"],
        "decoder": own["decoder"], "k": k, "persistence": PERSISTENCE, "other_tokens": other_tokens(a, b), "seed": seed,
        "versions": versions(),
    }  # fmt: skip
    table = table.join(pd.DataFrame(columns))
    if models is not None:
        table = table.join(compare_rows(a, b, models, top_a, lists_a, seed, progress))
    return MapComparison(table=table, settings=settings)


def wilson(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval of a share found among n (Wilson 1927): within 0 and 1, and of some width at both."""
    z2 = 1.959964**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return middle - half, middle + half


def _lines(tokens: list[str], ids: Int[np.ndarray, "neuron k"]) -> np.ndarray:
    """All tokens of each neuron on one line, as `workbench.tokens.joined` writes them."""
    words = np.array([shown(token) for token in tokens], dtype=object)  # of the vocabulary, once: neurons are many more
    return reduce(lambda line, column: line + "  " + words[column], ids.T[1:], words[ids[:, 0]])
