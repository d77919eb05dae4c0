"""Does a neuron fire on the word that it decodes to? The claim of a neuron map, tried on text.

A neuron map reads a neuron's weights as words; nothing in it says that the neuron is active where these words are. Here every
neuron of a map is watched over a corpus: how well does its own number tell the tokens that are among its top words from all
others (area under the ROC curve: 0.5 is chance), and how strongly does it go with them (point-biserial correlation)? The same
two for the next token, which a neuron that writes would foretell. Beside each stands the null: the words of another neuron of
the same layer and side, drawn at random, so that common words help both alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.analyses.neuron_map import NULL_QUANTILE, NeuronMap, Side, neuron_site
from workbench.analyses.word_statistics import LEAST, TARGETS, WordStatistics, target_ids
from workbench.artifacts import output_folder, settings_of, staged, write_json
from workbench.corpus.corpus import STRATA, Corpus, stratum_indices
from workbench.errors import BadArtifact, OtherJob, UnknownOption, require_one_of
from workbench.model import LanguageModel
from workbench.results import Result, versions
from workbench.streaming.stream import stream

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "word activations"


@dataclass(frozen=True, eq=False, repr=False)
class WordActivations(Result):
    """A row a neuron: `table` has layer, neuron, side, token (its top word), score, and for `current` and `next` (the token at
    which it is looked at, and the one after): present (how often one of its words stood there), auc, correlation, null_present,
    null_auc and null_correlation (the same with another neuron's words). Areas come from histograms of four bins an octave, in
    which ties count half."""

    def summary(self) -> pd.DataFrame:
        """A row a side and target: side, target, neurons (whose words stood there 10 times; those of the null are counted by
        themselves), median_auc, null_median_auc, threshold (the null's 99 % quantile), above_fraction (areas above it),
        null_fraction, median_correlation, null_median_correlation."""
        import pandas as pd

        rows = []
        for target in TARGETS:
            for side, own in self._seen_enough(target).groupby("side", observed=True, sort=False):
                rows.append(
                    {
                        "side": side, "target": target, "neurons": own["auc"].count(), "median_auc": own["auc"].median(),
                        "null_median_auc": own["null_auc"].median(), "threshold": own["threshold"].iloc[0],
                        "above_fraction": own["above"].mean(), "null_fraction": 1 - NULL_QUANTILE,
                        "median_correlation": own["correlation"].median(),
                        "null_median_correlation": own["null_correlation"].median(),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows).sort_values("side", kind="stable", ignore_index=True)

    def by_layer(self, target: str = "current", starts: Sequence[int] | None = None) -> pd.DataFrame:
        """Columns side, layer, neurons, median_auc, null_median_auc, above_fraction (of the side's threshold).

        Args:
            starts: First layers of bands that are taken together; `layer` is then `1 to 9`. Each layer alone, if None.
        """
        import pandas as pd

        require_one_of("target", target, TARGETS)
        own = self._seen_enough(target)
        if starts is not None:
            edges = sorted({0, *starts} | {int(own["layer"].max()) + 1})
            names = [str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in pairwise(edges)]
            own["layer"] = pd.cut(own["layer"], edges, right=False, labels=names)
        grouped = own.groupby(["side", "layer"], observed=True, sort=False)
        return grouped.agg(
            neurons=("auc", "count"), median_auc=("auc", "median"), null_median_auc=("null_auc", "median"),
            above_fraction=("above", "mean"),
        ).reset_index()  # fmt: skip

    def _seen_enough(self, target: str) -> pd.DataFrame:
        """Columns side, layer, and auc, null_auc, correlation, null_correlation, missing where fewer than 10 tokens were among
        the words; threshold, and above (1 or 0; missing without an area)."""
        own = self.table[["side", "layer"]].copy()
        for kind in ("", "null_"):
            enough = self.table[f"{target}_{kind}present"] >= LEAST
            for measure in ("auc", "correlation"):
                own[f"{kind}{measure}"] = self.table[f"{target}_{kind}{measure}"].where(enough)
        own["threshold"] = own.groupby("side", observed=True)["null_auc"].transform("quantile", NULL_QUANTILE)
        own["above"] = (own["auc"] > own["threshold"]).astype(float).where(own[["auc", "threshold"]].notna().all(axis=1))
        return own

    def save(self, folder: str | Path) -> Path:
        """Write word_activations.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        folder = output_folder(Path(folder))
        with staged(folder / "word_activations.parquet") as beside:
            self.table.to_parquet(beside, index=False, compression="zstd")
        write_json(folder / "run.json", {"kind": KIND} | self.settings)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> WordActivations:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        import pandas as pd

        settings = settings_of(Path(folder), KIND, "workbench word-activations")
        try:
            table = pd.read_parquet(Path(folder) / "word_activations.parquet")
        except (OSError, ValueError) as error:  # pyarrow's errors of a damaged file are among them
            raise BadArtifact(f"The {KIND} in {str(folder)!r} are damaged ({error}). Make them again.") from None
        return cls(table=table, settings=settings)

    def plot(self) -> go.Figure:
        """Median area by layer, beside the null's, and the share of neurons above the null's 99 % quantile: at a neuron's words
        and before them."""
        from workbench.plots.word_activations import plot_word_activations

        return plot_word_activations(self)

    def __str__(self) -> str:
        own = self.settings
        lines = [
            f"WordActivations of {own['model']} over {own['tokens']:,} tokens of {own['corpus']} ({', '.join(own['strata'])}): "
            f"does a neuron fire on one of its top {own['words']} words?"
        ]
        for row in self.summary().to_dict("records"):
            where = "on the word" if row["target"] == "current" else "before it"
            lines.append(
                f"{row['side']:<5}{where:<12} AUC {row['median_auc']:.3f} (null {row['null_median_auc']:.3f}); "
                f"{row['above_fraction']:6.1%} of {row['neurons']:,} neurons above 99 % of the null ({row['threshold']:.3f})"
            )
        return "\n".join(lines)


@torch.no_grad()
def word_activations(
    neurons: NeuronMap,
    model: LanguageModel,
    corpus: Corpus | Any,
    *,
    words: int = 10,
    strata: str | Sequence[str] = ("ordinary",),
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> WordActivations:
    """Watch every neuron of a map over a corpus, in one pass.

    A neuron's number is that of its side: the up projection's output (`up`), the input of the nonlinearity (`gate`), or the
    neuron itself (`down`).

    Args:
        neurons: A map of this model's MLPs.
        words: How many of a neuron's top words count as its own.
        strata: Kinds of tokens that count; see `workbench.corpus.corpus.STRATA`.
        seed: Of the null's drawing.
    Raises:
        OtherJob: if the map is of other weights.
        UnknownOption: for a part of a mixture of experts, whose neurons no site holds, or options out of range.
        BadCorpus, NotFinite, OutOfMemory: as `wb.stream`.
    """
    own = neurons.settings
    if own["weights_hash"] != model.weights_hash:
        raise OtherJob(f"The map is of {own['model']!r}, of other weights than {model.name!r} has. Map this model's neurons.")
    if own["part"] != "mlp":
        raise UnknownOption(f"The map is of part {own['part']!r}: no site holds the neurons of an expert. Map part 'mlp'.")
    if not 1 <= words <= own["k"]:
        raise UnknownOption(f"words={words} is out of range: the map has {own['k']} top words a neuron.")
    wanted = stratum_indices(strata)
    kinds = [STRATA[i] for i in wanted]
    started = time.perf_counter()
    watched = [_Watched(neurons, model, side, layer, words, seed) for side in own["sides"] for layer in own["layers"]]
    flow = stream(model, corpus, [str(one.site) for one in watched], batch_tokens=batch_tokens, progress=progress)
    tokens = 0
    for batch in flow:
        chosen = np.isin(batch.tokens.stratum, wanted).nonzero()[0]
        at = torch.from_numpy(chosen).to(model.device)
        ids = target_ids(batch.tokens, chosen)
        for one in watched:
            one.statistics.add(batch[str(one.site)].index_select(0, at), ids)
        tokens += len(chosen)
    if tokens == 0:
        raise UnknownOption(f"No token of the corpus is of the strata {', '.join(kinds)}. Take others, or more text.")
    settings = model.provenance | flow.settings | {
        "sides": own["sides"], "layers": own["layers"], "words": words, "strata": kinds, "tokens": tokens, "seed": seed,
        "versions": versions(), "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip
    return WordActivations(table=_table(neurons, watched), settings=settings)


class _Watched:
    """The neurons of one side and layer."""

    def __init__(self, neurons: NeuronMap, model: LanguageModel, side: Side, layer: int, words: int, seed: int) -> None:
        self.side, self.layer, self.site = side, layer, neuron_site(model, side, layer)
        rows = neurons.table[(neurons.table["side"] == side) & (neurons.table["layer"] == layer)]
        own = rows["token_id"].to_numpy().reshape(-1, neurons.settings["k"])[:, :words]
        circle = np.random.default_rng([seed, layer, neurons.settings["sides"].index(side)]).permutation(len(own))
        another = np.empty_like(own)
        another[circle] = own[np.roll(circle, 1)]  # each takes the words of the one before it: none its own
        self.statistics = WordStatistics({"": own, "null_": another}, model.d_vocab, model.device)


def _table(neurons: NeuronMap, watched: list[_Watched]) -> pd.DataFrame:
    import pandas as pd

    first = neurons.table[neurons.table["rank"] == 0].set_index(["side", "layer"]).sort_index()
    frames = []
    for one in watched:
        own = first.loc[(one.side, one.layer)].sort_values("neuron")
        frames.append(
            pd.DataFrame({"layer": one.layer, "neuron": own["neuron"].to_numpy(), "side": one.side,
                          "token": own["token"].to_numpy(), "score": own["score"].to_numpy()} | one.statistics.found())
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True)
