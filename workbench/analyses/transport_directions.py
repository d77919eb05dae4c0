"""Directions of a target whose transport is scored one by one, and what each turns out to be: carried, mixed, or made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analyses.directions import given_directions
from workbench.errors import UnknownOption
from workbench.model import LanguageModel
from workbench.moments.moments import Spread
from workbench.sites import Site
from workbench.transports.prediction import Prediction
from workbench.transports.solving import Spectrum

Asked = str | Path | Tensor | np.ndarray | Mapping[str, Tensor]
"""`principal:32`, `unembedding:32` or `unembedding: Paris`, `neurons:32` or `neurons@12:32`, `random:32`; a file; vectors."""
EACH = 32
STREAM = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
KINDS = ("principal", "unembedding", "neurons", "random")
BACKGROUND = 256
"""Random directions of the target that say what an average one scores."""
QUANTILE = 0.95


class Chosen(NamedTuple):
    """Unit vectors, and what each is called."""

    labels: list[dict[str, str]]
    """kind and name."""
    rows: Float[Tensor, "f d"]


class Thresholds(NamedTuple):
    """What a direction's R² is held against; both come from the null."""

    made: float
    """95 % of all directions score less with the documents shuffled: at most this is as good as nothing carried."""

    @classmethod
    def of(cls, null: Tensor) -> Thresholds:
        scores = null[~null.isnan()]
        return cls(float(scores.quantile(QUANTILE)) if len(scores) else 0.0)

    @property
    def carried(self) -> float:
        """Halfway from there to 1: above it more is carried than is made on the way."""
        return (1 + self.made) / 2

    def verdict(self, r2: float) -> str:
        if r2 != r2:
            return "constant"
        return "made" if r2 <= self.made else "carried" if r2 > self.carried else "mixed"


def choose(model: LanguageModel, target: str, spread: Spread, asked: Sequence[Asked] | None, seed: int) -> Chosen:
    """
    Args:
        spread: Of the target, whose principal directions are asked for.
        asked: See `Asked`; if None, 32 of each kind that the target has: unembedding columns and what neurons write are
            directions of the stream.
        seed: Of what is drawn: random directions, tokens, neurons.
    Raises:
        UnknownOption: for a kind that does not exist, or directions of another width than the target.
        BadArtifact: if a file cannot be read.
        MissingWeight: if neurons are asked for by name, and the block has none of its own (a mixture of experts).
    """
    width, labels, rows = len(spread.mean), [], []
    generator = torch.Generator().manual_seed(seed)
    for one in _those_there(model, target, width) if asked is None else asked:
        if isinstance(one, str) and one.partition(":")[0].partition("@")[0] in KINDS:
            names, vectors = _of_kind(model, target, spread, one, generator)
            kind = one.partition(":")[0]
        else:
            given = given_directions(model, one, width=width)
            kind = Path(given.kind).name
            names = [f"{name} {row}".strip() for name, row in given.labels[["name", "row"]].itertuples(index=False)]
            vectors = torch.cat([given.read(part) for part in range(len(given.sizes))])
        if vectors.shape[1] != width:
            raise UnknownOption(
                f"Directions {kind!r} have {vectors.shape[1]} numbers, and {target} has {width}. Take directions of that site: "
                "principal:32, random:32, or a file of your own."
            )
        labels += [{"kind": kind, "name": name} for name in names]
        rows.append(vectors.detach().double().cpu())
    joined = torch.cat(rows) if rows else torch.zeros(0, width, dtype=torch.float64)
    norms = joined.norm(dim=1, keepdim=True)
    if bool((norms == 0).any()):
        raise UnknownOption(f"Direction {labels[int((norms == 0).nonzero()[0, 0])]['name']!r} is zero: it points nowhere.")
    return Chosen(labels, joined / norms)


def random_rows(n: int, width: int, seed: int) -> Float[Tensor, "n width"]:
    """Unit vectors, uniform on the sphere."""
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


def direction_rows(chosen: Chosen, prediction: Prediction, null: Prediction | None, seed: int) -> list[dict[str, Any]]:
    """Scores over all tokens of the stratum, from moments alone: a row a direction."""
    width = prediction.yy.shape[0]
    background = prediction.along(random_rows(BACKGROUND, width, seed)).r2.cpu()
    own, thresholds, shuffled = prediction.along(chosen.rows), None, None
    if null is not None:
        shuffled = null.along(chosen.rows).r2.cpu()
        thresholds = Thresholds.of(torch.cat([shuffled, null.along(random_rows(BACKGROUND, width, seed)).r2.cpu()]))
    total, r2 = float(prediction.yy.trace()), own.r2.tolist()
    columns: dict[str, list[Any]] = {
        "variance_share": (own.target / total).tolist(), "r2": r2, "correlation": own.correlation.tolist(),
        "slope": own.slope.tolist(), "rms_ratio": own.rms_ratio.tolist(),
        "above_random": [float((background < value).double().mean()) for value in r2],
    }  # fmt: skip
    if shuffled is not None and thresholds is not None:
        columns |= {"null": shuffled.tolist(), "verdict": [thresholds.verdict(value) for value in r2]}
        columns |= {"made_below": [thresholds.made] * len(r2), "carried_above": [thresholds.carried] * len(r2)}
    return [label | {name: values[i] for name, values in columns.items()} for i, label in enumerate(chosen.labels)]


def _of_kind(
    model: LanguageModel, target: str, spread: Spread, asked: str, generator: torch.Generator
) -> tuple[list[str], Tensor]:
    kind, _, what = asked.partition(":")
    kind, _, where = kind.partition("@")
    if kind == "unembedding" and not what.isdecimal():
        token = model.token_id(what)
        return [model.token_strings[token]], _columns(model, [token])
    if not what.isdecimal() or not int(what) or (where and kind != "neurons"):
        raise UnknownOption(f"Directions {asked!r} are not understood. Say how many: principal:32, neurons:32, neurons@12:32.")
    n = int(what)
    if kind == "principal":
        vectors = Spectrum.of(spread.xx).vectors.T[:n]
        vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()  # their sign is free
        return [f"principal {i}" for i in range(len(vectors))], vectors
    if kind == "random":
        return [f"random {i}" for i in range(n)], torch.randn(n, len(spread.mean), generator=generator)
    if kind == "unembedding":
        tokens = torch.randperm(model.d_vocab, generator=generator)[:n].tolist()
        return [model.token_strings[token] for token in tokens], _columns(model, tokens)
    layer = _writing(model, target) if not where else int(where) if where.isdecimal() else model.n_layers
    if not 0 <= layer < model.n_layers:
        raise UnknownOption(
            f"Directions {asked!r}: {target} has no MLP before it, or there is no such layer. Write a layer of this model, "
            f"counted from 0: neurons@{model.n_layers - 1}:32."
        )
    weight = model.weight("W_out", layer).detach()
    neurons = torch.randperm(len(weight), generator=generator)[:n]
    return [f"neuron {layer}.{neuron}" for neuron in neurons.tolist()], weight[neurons.to(weight.device)]


def _those_there(model: LanguageModel, target: str, width: int) -> list[str]:
    """Of the kinds, those that a target has."""
    found = ["principal", "random"]
    if target.partition(".")[0] in STREAM and width == model.d_model:
        found.append("unembedding")
        layer = _writing(model, target)
        if layer >= 0 and model.optional_weight("W_out", layer) is not None:
            found.append("neurons")
    return [f"{kind}:{EACH}" for kind in KINDS if kind in found]


def _writing(model: LanguageModel, target: str) -> int:
    """The last layer whose MLP has written when a site is read; -1 if none has."""
    site = Site.parse(target, model.n_layers)
    if site.layer is None:
        return -1 if site.name == "embed" else model.n_layers - 1
    return site.layer - (site.name not in ("mlp_out", "resid_post"))


def _columns(model: LanguageModel, tokens: list[int]) -> Tensor:
    """Of the unembedding, less their common mean: what makes a token's logit differ from the average one."""
    vocabulary = model.vocabulary
    return torch.stack([vocabulary.direction(token).double() for token in tokens]) - vocabulary.mean_direction().double()
