"""All that the workbench knows of one neuron, on one page, with a null beside each number.

Its words (Davies 2025, arXiv 2501.02688) say what its weights are like; the text, where it fires; the clamp, what becomes of
the model's words; the direct effect, which part of that is its own doing. They need not agree, and seldom do: that is why
they stand on one page.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, get_args

import numpy as np
import torch

from workbench.analyses.direct_effect import DirectEffect, direct_change
from workbench.analyses.neuron_effect import neuron_effect, neuron_of, other_neurons
from workbench.analyses.neuron_map import NeuronMap, Side, neuron_rows
from workbench.analyses.neuron_text import NeuronText, neuron_text
from workbench.analyses.neuron_weights import NULL_ROWS, weights_of
from workbench.artifacts import output_folder, strict, write_html
from workbench.corpus.corpus import Corpus
from workbench.errors import UnknownOption, require_one_of
from workbench.model import LanguageModel
from workbench.projection import Decoder
from workbench.results import Result, versions

if TYPE_CHECKING:
    import pandas as pd

CORPUS, MAX_TOKENS = "wikipedia", 30_000
PROMPTS = ("My favourite animal is", "The capital of France is", "I think that")
NEW_TOKENS = 10
"""Of the clamped continuations."""
NULL_WORDS = 100
"""Neurons whose words are tried in place of its own: most words are rare, and only those of a few neurons are seen enough."""


@dataclass(frozen=True, eq=False, repr=False)
class NeuronCard(Result):
    """One neuron. `table` has the words of its sides: side, end (`top`, `bottom`), rank, token_id, token, logit, probability.

    What a family lacks (the gate of a plain MLP) has no row, and what needs text or a value is None without one.
    """

    sides: pd.DataFrame
    """A row a side: side, norm, longer_fraction (the share of its layer's neurons whose row is shorter), null_nearest_median
    and null_nearest (of `nearest`)."""
    scores: pd.DataFrame
    """For which of its words it stands out most, a row a side and end: side, end, word, score (by how many standard
    deviations, among the neurons of `among`: its `layer`, or the `model` if a map was given) and null_score (99 % of random
    directions do not score beyond it; missing for bottom words of a map)."""
    cosines: pd.DataFrame
    """Whether it writes what it reads, a row a pair of its sides: side, other, cosine, layer_low, layer_median, layer_high
    (1 %, 50 % and 99 % of its layer's neurons), above_fraction. What it reads is scaled by the gain of the norm before it."""
    nearest: pd.DataFrame
    """The neurons of all layers whose rows are most `similar` and most `opposite`: side, end, rank, layer, neuron, cosine,
    tokens (their top words). The null: the largest cosine of a random direction with as many neurons has the size
    `sides.null_nearest_median`; 99 % stay below `sides.null_nearest`. Random directions are 100 Gaussian ones, of the mean
    and covariance that the rows of the neuron's own layer have."""
    text: NeuronText | None
    """What it does on text; None without a corpus."""
    logits: pd.DataFrame | None
    """What one unit of the neuron adds to the logits directly: end, rank, token_id, token, logit. See
    `workbench.analyses.direct_effect`; None without a corpus, on which the norms' scales rest."""
    clamp: pd.DataFrame | None
    """What a clamp of the neuron does, a row a value and prompt: value, its words (the top ones of what it writes; the bottom
    ones, if the value is negative), usual (its own value at the prompt's last token), before, after and change (of the words'
    log-probability, in nats), direct (the part of it that is the neuron's own write, had later layers given what they gave),
    null_median, null_low, null_high, p and counts of words as `NeuronEffect.summary` has them, text_before and text_after.
    None without a value."""

    @property
    def name(self) -> str:
        """Layer and number: `12.345`."""
        return f"{self.settings['layer']}.{self.settings['neuron']}"

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        text = None
        if self.text is not None:
            own = self.text
            tables = {"statistics": own.statistics, "examples": own.examples, "words": own.words}
            text = {name: one.to_dict("records") for name, one in tables.items()} | {"histogram": own.histogram.tolist()}
        tables = {
            "tokens": self.table, "sides": self.sides, "scores": self.scores, "cosines": self.cosines, "nearest": self.nearest,
            "logits": self.logits, "clamp": self.clamp,
        }  # fmt: skip
        plain = {name: None if one is None else one.to_dict("records") for name, one in tables.items()}
        return strict({"settings": self.settings, **plain, "text": text})

    def save(self, path: str | Path) -> Path:
        """Write it as a page, which needs nothing beside it.

        Raises:
            CannotWrite: if the file cannot be written.
        """
        from workbench.plots.neuron_card import card_page

        output_folder(Path(path).parent, "Name another place")
        return write_html(Path(path), card_page(self))

    def __str__(self) -> str:
        from workbench.analyses.neuron_card_text import lines_of

        return "\n".join(lines_of(self))

    def _repr_html_(self) -> str:
        from workbench.plots.neuron_card import card_html

        return card_html(self)


def neuron_card(
    model: LanguageModel,
    layer: SupportsIndex,
    neuron: SupportsIndex,
    *,
    corpus: Corpus | Any | None = CORPUS,
    max_tokens: int | None = MAX_TOKENS,
    prompts: str | Sequence[str] | None = PROMPTS,
    value: float | None = None,
    k: int = 10,
    n_nearest: int = 8,
    n_random: int = 20,
    decoder: Decoder = "none",
    neurons: NeuronMap | None = None,
    seed: int = 0,
    progress: bool = True,
) -> NeuronCard:
    """Read a neuron's weights, watch it on text, and clamp it.

    Args:
        layer: Negative ones count from the end.
        corpus: A `Corpus`, or what one is made of; None leaves out what needs text.
        max_tokens: The corpus ends after so many, if it is no `Corpus`, which has an end of its own.
        prompts: Where the clamp is tried; none for no clamp.
        value: What the neuron (the input of the down projection) is clamped to. If None, its highest value on the text, if
            that is above zero, and its lowest, if that is below.
        k: Words a side and end, and examples an end.
        n_nearest: Neighbours a side and end.
        n_random: Neurons of the layer that are clamped in its place, for the null.
        decoder: How rows meet the vocabulary; see `workbench.vocabulary.Vocabulary`.
        neurons: A map of the model's neurons, whose scores are taken; else the neuron is scored among its layer's.
        seed: Of the random neurons and directions.
    Raises:
        LayerOutOfRange, UnknownOption: if there is no such layer or neuron, or a number is out of range.
        MissingWeight: if the layer is a mixture of experts.
        OtherJob: if the map is of other weights or another layer, or made otherwise.
        BadCorpus, NotFinite, OutOfMemory, TextTooLong: as `wb.stream` and `wb.neuron_effect`.
    """
    require_one_of("decoder", decoder, get_args(Decoder))
    layer, neuron, rows = neuron_of(model, layer, neuron, "down")
    other_neurons(len(rows), neuron, n_random, seed)  # refused here, before any work
    if min(k, n_nearest) < 1:
        raise UnknownOption(f"k={k}, n_nearest={n_nearest}: ask for one or more of each.")
    if corpus is not None and not isinstance(corpus, Corpus):
        corpus = Corpus(corpus, max_tokens=max_tokens)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if value is not None and not math.isfinite(value):
        raise UnknownOption(f"value={value} is no number that a neuron can be clamped to.")
    started = time.perf_counter()
    weights = weights_of(
        model, layer, neuron, decoder=decoder, k=k, n_nearest=n_nearest, neurons=neurons, seed=seed, progress=progress
    )
    settings = model.provenance | {
        "layer": layer, "neuron": neuron, "sides": weights.sides["side"].tolist(), "n_layers": model.n_layers,
        "layer_neurons": len(rows), "k": k, "n_nearest": n_nearest, "n_random": n_random, "decoder": decoder, "seed": seed,
        "null_directions": NULL_ROWS, "prompts": prompts, "versions": versions(),
    }  # fmt: skip
    text = logits = clamp = None
    values = [] if value is None else [value]
    if corpus is not None:
        others = other_neurons(len(rows), neuron, min(NULL_WORDS, len(rows) - 1), seed)
        words = _words(model, settings["sides"], layer, [neuron, *others], decoder, k)
        effect = DirectEffect(model, layer, neuron)
        text = neuron_text(model, corpus, layer, neuron, words, effect, k=k, progress=progress)
        logits = effect.table(k)
        settings["text"] = text.settings
        if value is None:
            row = text.statistics.set_index("side").loc["down"]
            values = [float(end) for end, sign in ((row["highest"], 1), (row["lowest"], -1)) if sign * end > 0]
    if prompts and values:
        clamp = _clamp(model, layer, neuron, values, prompts, weights.tokens, n_random, seed, progress)
    settings |= {"values": values, "seconds": round(time.perf_counter() - started, 2)}
    return NeuronCard(weights.tokens, settings, *weights[1:], text, logits, clamp)


def _words(
    model: LanguageModel, sides: list[Side], layer: int, which: list[int], decoder: Decoder, k: int
) -> dict[tuple[Side, str], np.ndarray]:
    """By side and end, ids of the words of some neurons of a layer, `[neuron, k]`."""
    found = {}
    for side in sides:
        rows = neuron_rows(model, side, layer)[which].to(model.weight("W_U").device)
        words = model.vocabulary.project(rows, decoder=decoder, k=k, k_bottom=k)
        found[side, "top"], found[side, "bottom"] = words.top_ids.cpu().numpy(), words.bottom_ids.cpu().numpy()
    return found


@torch.no_grad()
def _clamp(
    model: LanguageModel,
    layer: int,
    neuron: int,
    values: list[float],
    prompts: list[str],
    tokens: pd.DataFrame,
    n_random: int,
    seed: int,
    progress: bool,
) -> pd.DataFrame:
    """The neuron at each value, by `wb.neuron_effect`, and what of the change is its own write."""
    import pandas as pd

    written, frames = tokens[tokens["side"] == "down"], []
    for value in values:
        words = written[written["end"] == ("top" if value >= 0 else "bottom")]["token_id"].tolist()
        effect = neuron_effect(
            model, layer, neuron, prompts, value=value, side="down", words=words, n_random=n_random,
            max_new_tokens=NEW_TOKENS, seed=seed, progress=progress,
        )  # fmt: skip
        summary = effect.summary()
        direct = [float(direct_change(model, prompt, layer, neuron, value)[words].mean()) for prompt in summary["prompt"]]
        texts = [effect.texts(prompt) for prompt in summary["prompt"]]
        frames.append(
            summary.assign(
                value=value, words=[effect.settings["words"]] * len(summary), usual=effect.settings["usual"], direct=direct,
                text_before=[before for before, _ in texts], text_after=[after for _, after in texts],
            )
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True)
