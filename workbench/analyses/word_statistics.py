"""How surely values tell tokens that are among a unit's words from all others: areas under the ROC curve, and correlations."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.streaming.batches import Tokens
from workbench.unit_statistics import N_BINS, UnitStatistics, bins_of

TARGETS = ("current", "next")
LEAST = 10
"""Tokens that must be among a unit's words before its area counts in a summary: with fewer it is mostly chance."""


class WordStatistics:
    """Units with words of their own: histograms over all tokens, and over those where one of a unit's words is.

    Args:
        words: Token ids of each unit's words, a row a unit, by kind (the words, or those of a null).
    """

    def __init__(self, words: Mapping[str, np.ndarray], d_vocab: int, device: torch.device) -> None:
        self.n = len(next(iter(words.values())))
        self.listed = {kind: _Listed(own, d_vocab, device) for kind, own in words.items()}
        self.running = UnitStatistics(self.n, 1, device, sample=0)
        self.held = {
            (target, kind): torch.zeros(self.n, N_BINS, dtype=torch.int32, device=device)
            for target in TARGETS
            for kind in self.listed
        }
        self.held_sums = {key: torch.zeros(self.n, dtype=torch.float64, device=device) for key in self.held}

    def add(self, values: Float[Tensor, "token unit"], ids: Mapping[str, np.ndarray]) -> None:
        """
        Args:
            ids: As `target_ids` gives them for the tokens.
        """
        self.running.add(values, torch.arange(len(values), device=values.device))
        for target, kind in self.held:
            unit, token = self.listed[kind].pairs(ids[target])
            present = values[token, unit].float()
            flat = unit * N_BINS + bins_of(present)
            self.held[target, kind].view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
            self.held_sums[target, kind].index_add_(0, unit, present.double())

    def found(self) -> dict[str, np.ndarray]:
        """For each target and kind: present, auc and correlation of every unit, named `{target}_{kind}auc` and so on."""
        mean, std, tokens = self.running.mean, self.running.std, self.running.tokens
        columns: dict[str, np.ndarray] = {}
        for target, kind in self.held:
            held = self.held[target, kind].long()
            present = held.sum(1)
            share = present / tokens
            # Point-biserial: (mean where present - mean) / std * sqrt(share / (1 - share)).
            there = self.held_sums[target, kind] / present
            columns[f"{target}_{kind}present"] = present.cpu().numpy()
            columns[f"{target}_{kind}auc"] = area(held, self.running.histogram - held).cpu().numpy()
            columns[f"{target}_{kind}correlation"] = ((there - mean) / std * (share / (1 - share)).sqrt()).cpu().numpy()
        return columns


class _Listed:
    """Which neurons have a token among their words."""

    def __init__(self, words: np.ndarray, d_vocab: int, device: torch.device) -> None:
        order = np.argsort(words.ravel(), kind="stable")
        self.units = torch.from_numpy(order // words.shape[1]).to(device)
        counts = np.bincount(words.ravel(), minlength=d_vocab)
        self.starts, self.counts = np.concatenate([[0], counts.cumsum()[:-1]]), counts

    def pairs(self, ids: np.ndarray) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Unit and token of every pair in which the token is among the unit's words; -1 is no token."""
        counts = np.where(ids < 0, 0, self.counts[ids])
        token = np.repeat(np.arange(len(ids)), counts)
        within = np.arange(len(token)) - np.repeat(counts.cumsum() - counts, counts)
        places = torch.from_numpy(self.starts[ids[token]] + within).to(self.units.device)
        return self.units[places], torch.from_numpy(token).to(self.units.device)


def area(positive: Int[Tensor, "unit bin"], negative: Int[Tensor, "unit bin"]) -> Float[Tensor, " unit"]:
    """The area under the ROC curve of binned values, ties in a bin counting half; NaN where a class has no member.

    The Mann-Whitney statistic: the chance that a positive lies above a negative.
    """
    positive, negative = positive.double(), negative.double()
    below = negative.cumsum(1) - negative
    wins = (positive * (below + negative / 2)).sum(1)
    return wins / (positive.sum(1) * negative.sum(1))


def target_ids(tokens: Tokens, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Ids of some tokens (`current`) and of those after them in their rows (`next`; -1 after the last)."""
    following = np.full(tokens.n, -1, np.int64)
    same = tokens.row[1:] == tokens.row[:-1]
    following[:-1][same] = tokens.token_id[1:][same]
    return {"current": tokens.token_id[chosen], "next": following[chosen]}
