"""How far a neuron stands out for a word, among the neurons of its side, and how far a random direction would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.projection import Decoder
from workbench.projector import Projector
from workbench.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas as pd

NULL_ROWS = 2000
"""Random directions a side. Their 99 % quantile then rests on 20 of them."""


class Population:
    """The neurons of one side: what logits they give every token when scaled to unit norm, and the moments of their rows."""

    def __init__(self, vocabulary: Vocabulary, decoder: Decoder, rows: Callable[[int], Tensor], layers: Sequence[int]):
        self.vocabulary = vocabulary
        self.decoder: Decoder = decoder
        total = torch.zeros(vocabulary.d_model, dtype=torch.float64, device=vocabulary.W_U.device)
        products = torch.zeros(vocabulary.d_model, vocabulary.d_model, dtype=torch.float64, device=vocabulary.W_U.device)
        raw_total, raw_products = torch.zeros_like(total), torch.zeros_like(products)
        count = 0
        for layer in layers:
            own = rows(layer)  # once: it may be read from a file
            unit = self.unit(own)
            total += unit.sum(0).double()
            products += (unit.T @ unit).double()  # rows of norm 1: a layer's float32 sums are good to 1e-6
            count += len(unit)
            raw = own.float()
            raw_total += raw.double().sum(0)
            raw_products += (raw.T @ raw).double()
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        self.row_mean = raw_total / count
        self.row_covariance = raw_products / count - torch.outer(self.row_mean, self.row_mean)
        # float32 is good to 1e-6 of a standard deviation here, and faster than float64.
        self.unit_mean, self.unit_covariance = mean.float(), covariance.float()

    @cached_property
    def token_moments(self) -> tuple[Float[Tensor, " d_vocab"], Float[Tensor, " d_vocab"]]:
        """Mean and standard deviation of every token's logit."""
        return self.vocabulary.logit_moments(self.unit_mean, self.unit_covariance)

    def unit(self, rows: Tensor) -> Float[Tensor, "rows d_model"]:
        """What the linear part of the decoder makes of rows, scaled to unit norm."""
        linear = self.vocabulary.linear_part(rows, self.decoder).float()
        return linear / linear.norm(dim=1, keepdim=True).clamp_min(1e-30)

    def scores(
        self, rows: Float[Tensor, "rows d_model"], ids: Int[Tensor, "rows k"], logits: Float[Tensor, "rows k"]
    ) -> Float[Tensor, "rows k"]:
        """How far rows that were decoded stand out for some tokens each, whose logits were found: scaled to unit norm, in
        standard deviations of the population."""
        mean, deviation = self.token_moments
        ids, logits = ids.to(mean.device), logits.to(mean)  # those of a stopped job come from a file
        if self.decoder == "norm":  # its logits are not linear in the row
            return self._standardised(self.unit(rows), ids, mean[ids], deviation[ids])
        lengths = self.vocabulary.linear_part(rows, self.decoder).norm(dim=1, keepdim=True, dtype=mean.dtype)
        return ((logits / lengths.clamp_min(1e-30) - mean[ids]) / deviation[ids].clamp_min(1e-30)).float()

    def scores_of_few(self, unit: Float[Tensor, "rows d_model"], ids: Int[Tensor, "rows k"]) -> Float[Tensor, "rows k"]:
        """As `scores`, with the moments of these tokens alone: those of all take longer than decoding a few rows does."""
        tokens, places = ids.unique(return_inverse=True)
        few = replace(self.vocabulary, W_U=self.vocabulary.W_U[:, tokens])
        mean, deviation = few.logit_moments(self.unit_mean, self.unit_covariance)
        return self._standardised(unit, ids, mean[places], deviation[places])

    def _standardised(self, unit: Tensor, ids: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        return ((self.vocabulary.logits_of(unit, ids) - mean) / deviation.clamp_min(1e-30)).float()

    def random(self, seed: int, n: int) -> Float[Tensor, "rows d_model"]:
        """Gaussian rows of the mean and covariance that the neurons' rows have, before any decoder."""
        values, vectors = torch.linalg.eigh(self.row_covariance)
        generator = torch.Generator().manual_seed(seed)
        white = torch.randn(n, len(values), generator=generator, dtype=torch.float64).to(values.device)
        return (self.row_mean + (white * values.clamp_min(0).sqrt()) @ vectors.T).float()


class Isotropic(Population):
    """Directions without a preferred one, in closed form: what few vectors are held against, whose own moments say little."""

    def __init__(self, vocabulary: Vocabulary, decoder: Decoder):
        self.vocabulary = vocabulary
        self.decoder: Decoder = decoder
        d_model, device = vocabulary.d_model, vocabulary.W_U.device
        weight = vocabulary.linear_part(torch.ones(1, d_model, device=device), decoder)[0].float() ** 2
        self.unit_mean, self.unit_covariance = torch.zeros(d_model, device=device), torch.diag(weight / weight.sum())

    def random(self, seed: int, n: int) -> Float[Tensor, "rows d_model"]:
        """Gaussian rows, of norm 1 on average."""
        d_model, generator = self.vocabulary.d_model, torch.Generator().manual_seed(seed)
        return (torch.randn(n, d_model, generator=generator) / d_model**0.5).to(self.unit_mean.device)


def random_rows(rows: Float[Tensor, "neurons d_model"], seed: int, n: int) -> Float[Tensor, "n d_model"]:
    """Gaussian rows as `Population.random` draws them, of rows that are at hand: random sums of them have their covariance, and
    no eigenvectors are needed, which take longer than all else where rows are long."""
    mean = rows.mean(0)
    white = torch.randn(n, len(rows), generator=torch.Generator().manual_seed(seed)).to(rows)
    return mean + white @ (rows - mean) / len(rows) ** 0.5


def null_scores(population: Population, projector: Projector, side: str, seed: int) -> pd.DataFrame:
    """The best score among the top tokens of random rows, found as a neuron's is, decoder included: columns side, score."""
    import pandas as pd

    rows = population.random(seed, NULL_ROWS)
    found = projector(rows)
    scores = population.scores(rows, found.top_ids, found.top_logits)
    return pd.DataFrame({"side": side, "score": scores.amax(1).cpu().numpy()})
