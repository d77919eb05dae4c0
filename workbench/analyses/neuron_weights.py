"""What a neuron's weights say: its words, how much it stands out for them, and which neurons of all layers are like it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analyses.neuron_map import NULL_QUANTILE, SIDES, NeuronMap, Side, neuron_rows
from workbench.analyses.neuron_score import Population, random_rows
from workbench.errors import OtherJob
from workbench.model import LanguageModel
from workbench.projection import Decoder, Projection
from workbench.projector import Projector
from workbench.tokens import joined

if TYPE_CHECKING:
    import pandas as pd

NULL_ROWS = 100
"""Random directions a side: few enough for a card to be made in a second. Their 99 % quantile is the second of them, good to
half a standard deviation of a score; that of a map rests on 2,000."""


class Weights(NamedTuple):
    """Tables of a neuron's weights; `workbench.analyses.neuron_card.NeuronCard` says their columns."""

    tokens: pd.DataFrame
    sides: pd.DataFrame
    scores: pd.DataFrame
    cosines: pd.DataFrame
    nearest: pd.DataFrame


@torch.no_grad()
def weights_of(
    model: LanguageModel,
    layer: int,
    neuron: int,
    *,
    decoder: Decoder,
    k: int,
    n_nearest: int,
    neurons: NeuronMap | None,
    seed: int,
    progress: bool,
) -> Weights:
    """Read the rows of one neuron, and those of all layers once.

    Raises:
        OtherJob: if the map is of other weights, of another layer, or made otherwise.
    """
    import pandas as pd

    if neurons is not None:
        _require_same(neurons, model, layer, decoder)
    tokens, sides, scores, nearest = [], [], [], []
    for side in tqdm(sides_of(model, layer), desc="weights", unit="side", disable=not progress):
        one = _Side(model, side, layer, neuron, decoder, k, seed)
        near, null = one.nearest(n_nearest)
        tokens.append(one.tokens())
        sides.append({"side": side} | one.norm() | null)
        scores += one.scores() if neurons is None or side not in neurons.settings["sides"] else one.scores_of_map(neurons)
        nearest.append(near)
    return Weights(
        pd.concat(tokens, ignore_index=True), pd.DataFrame(sides), pd.DataFrame(scores),
        own_cosines(model, layer, neuron), pd.concat(nearest, ignore_index=True),
    )  # fmt: skip


def sides_of(model: LanguageModel, layer: int) -> list[Side]:
    """The sides that the neurons of a layer have."""
    return [side for side in SIDES if side != "gate" or model.block_row(layer).is_gated]


@torch.no_grad()
def own_cosines(model: LanguageModel, layer: int, neuron: int) -> pd.DataFrame:
    """Cosines between the sides of a neuron, among those of its layer's neurons.

    What it reads is scaled by the gain of the norm that feeds the MLP, if it has one: the direction of the stream that the
    neuron responds to. What it writes is taken before a post-norm.
    """
    import pandas as pd

    reading = "raw" if model.optional_weight("ln2.w", layer) is None else "gain"
    rows = {
        side: neuron_rows(model, side, layer, "raw" if side == "down" else reading).float() for side in sides_of(model, layer)
    }
    found = []
    for a, b in combinations(rows, 2):
        cosines = torch.cosine_similarity(rows[a], rows[b].to(rows[a].device), dim=1).cpu()
        low, median, high = cosines.quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
        found.append(
            {
                "side": a, "other": b, "cosine": float(cosines[neuron]), "layer_low": low, "layer_median": median,
                "layer_high": high, "above_fraction": _above(cosines, neuron),
            }
        )  # fmt: skip
    return pd.DataFrame(found)


class _Side:
    """One side of the neuron, and random directions of the mean and covariance that its layer's neurons have there."""

    def __init__(self, model: LanguageModel, side: Side, layer: int, neuron: int, decoder: Decoder, k: int, seed: int) -> None:
        self.model, self.layer, self.neuron, self.k = model, layer, neuron, k
        self.side: Side = side
        self.decoder: Decoder = decoder
        self.home = model.weight("W_U").device
        self.rows = self._rows(layer)
        self.row = self.rows[neuron : neuron + 1]
        self.population = Population(model.vocabulary, decoder, lambda _: self.rows, [layer])
        self.random = random_rows(self.rows, seed, NULL_ROWS)
        self.words = self._decoded(self.row, bottom=True)

    def tokens(self) -> pd.DataFrame:
        """Columns side, end, rank, token_id, token, logit, probability."""
        import pandas as pd

        found, strings = self.words, self.model.token_strings
        frames = []
        for end, ids, logits, probabilities in (
            ("top", found.top_ids, found.top_logits, found.top_probabilities),
            ("bottom", found.bottom_ids, found.bottom_logits, found.bottom_probabilities),
        ):
            ids = ids[0].tolist()
            frames.append(
                pd.DataFrame(
                    {
                        "side": self.side, "end": end, "rank": range(len(ids)), "token_id": ids,
                        "token": [strings[i] for i in ids], "logit": logits[0].tolist(),
                        "probability": probabilities[0].tolist(),
                    }
                )
            )  # fmt: skip
        return pd.concat(frames, ignore_index=True)

    def norm(self) -> dict[str, float]:
        """The row's length, and the share of the layer's that are shorter."""
        norms = self.rows.norm(dim=1).cpu()
        return {"norm": float(norms[self.neuron]), "longer_fraction": _above(norms, self.neuron)}

    def scores(self) -> list[dict[str, Any]]:
        """The word for which it stands out most at either end, and what random directions reach."""
        unit = self.population.unit(torch.cat([self.row, self.random]))
        null = self._decoded(self.random, bottom=True)
        found = []
        for end, sign, own, of_null in (
            ("top", 1, self.words.top_ids, null.top_ids), ("bottom", -1, self.words.bottom_ids, null.bottom_ids),
        ):  # fmt: skip
            scores = sign * self.population.scores_of_few(unit, torch.cat([own, of_null]))
            best = int(scores[0].argmax())
            word = self.model.token_strings[int(own[0, best])]
            limit = sign * float(scores[1:].amax(1).quantile(NULL_QUANTILE))
            found.append(self._score(end, word, sign * float(scores[0, best]), limit, "layer"))
        return found

    def scores_of_map(self, neurons: NeuronMap) -> list[dict[str, Any]]:
        """The same from a map, among the neurons of all its layers; its null is of top words alone."""
        limit = float(neurons.null.loc[neurons.null["side"] == self.side, "score"].quantile(NULL_QUANTILE))
        found = []
        for end, sign, table, null in (("top", 1, neurons.table, limit), ("bottom", -1, neurons.bottom, None)):
            own = table[(table["side"] == self.side) & (table["layer"] == self.layer) & (table["neuron"] == self.neuron)]
            row = own.iloc[int((sign * own["score"]).argmax())]
            found.append(self._score(end, str(row["token"]), float(row["score"]), null, "model"))
        return found

    def _score(self, end: str, word: str, score: float, null: float | None, among: str) -> dict[str, Any]:
        return {"side": self.side, "end": end, "word": word, "score": score, "null_score": null, "among": among}

    def nearest(self, n: int) -> tuple[pd.DataFrame, dict[str, float]]:
        """The neurons of all layers most like this one and most opposite to it on this side, with their top words; and what
        the largest cosine of a random direction with as many neurons is in size, its median and 99 % quantile."""
        import pandas as pd

        queries = torch.cat([self.row, self.random])
        queries = (queries / queries.norm(dim=1, keepdim=True).clamp_min(1e-30)).T.contiguous()
        largest = torch.zeros(len(self.random), device=self.home)
        cosines, places = [], []
        for layer in self._layers():
            rows = self._rows(layer)
            with_all = (rows @ queries) / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
            largest = largest.maximum(with_all[:, 1:].abs().amax(0))
            others = torch.arange(len(rows), device=self.home)
            others = others[others != self.neuron] if layer == self.layer else others
            own = with_all[others, 0]
            for ends in (own.topk(min(n, len(own))), own.topk(min(n, len(own)), largest=False)):
                cosines.append(ends.values)
                places.append(torch.stack([torch.full_like(ends.indices, layer), others[ends.indices]], 1))
        cosine, place = torch.cat(cosines), torch.cat(places)
        place, kept = place.unique(dim=0, return_inverse=True)  # of few neurons one is at both ends of its layer
        cosine = torch.zeros(len(place), device=self.home).scatter_(0, kept, cosine)
        frames = []
        for end, descending in (("similar", True), ("opposite", False)):
            order = cosine.argsort(descending=descending, stable=True)[:n]
            rows = torch.cat([self._rows(layer, slice(i, i + 1)) for layer, i in place[order].tolist()])
            words = self._decoded(rows, bottom=False).top_ids.tolist()
            frames.append(
                pd.DataFrame(
                    {
                        "side": self.side, "end": end, "rank": range(len(order)), "layer": place[order, 0].tolist(),
                        "neuron": place[order, 1].tolist(), "cosine": cosine[order].tolist(),
                        "tokens": [joined(self.model.token_strings[i] for i in ids) for ids in words],
                    }
                )
            )  # fmt: skip
        low, high = largest.cpu().quantile(torch.tensor([0.5, NULL_QUANTILE])).tolist()
        return pd.concat(frames, ignore_index=True), {"null_nearest_median": low, "null_nearest": high}

    def _layers(self) -> Iterator[int]:
        """Those whose neurons have this side; in a mixture of experts there is none."""
        for layer in range(self.model.n_layers):
            block = self.model.block_row(layer)
            if block.down is not None and (self.side != "gate" or block.is_gated):
                yield layer

    def _rows(self, layer: int, which: slice = slice(None)) -> Float[Tensor, "neurons d_model"]:
        return neuron_rows(self.model, self.side, layer)[which].to(self.home, torch.float32)

    def _decoded(self, rows: Tensor, *, bottom: bool) -> Projection:
        return Projector(self.model.vocabulary, self.decoder, self.k, self.k if bottom else 0)(rows)


def _above(values: Tensor, index: int) -> float:
    """The share of the others that one of the values is larger than, those equal to it counting half."""
    own, n = values[index], max(len(values) - 1, 1)
    return float(((values < own).sum() + ((values == own).sum() - 1) / 2) / n)


def _require_same(neurons: NeuronMap, model: LanguageModel, layer: int, decoder: Decoder) -> None:
    """
    Raises:
        OtherJob: if what the map says is not of this neuron, decoded in this way.
    """
    own = neurons.settings
    if own["weights_hash"] != model.weights_hash:
        raise OtherJob(f"The map is of {own['model']!r}, of other weights than {model.name!r} has. Map this model's neurons.")
    made, needed = (own["part"], own["reading"], own["decoder"]), ("mlp", "raw", decoder)
    if made != needed or layer not in own["layers"]:
        raise OtherJob(
            f"The map is of part, reading and decoder {made}, layers {own['layers'][0]} to {own['layers'][-1]}; this card "
            f"needs {needed} and layer {layer}. Map those, or leave the map out."
        )
