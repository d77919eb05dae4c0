"""Minimum description length: the bits that it takes to send the labels to someone who has the states alone.

Source: Voita and Titov 2020 (arXiv 2003.12298), the online code. Labels go in blocks; each is coded by a probe that learnt
from the blocks before it, the first by nothing. Differently from theirs, blocks are of whole groups, so that no block is coded
by what the words of another give away; a probe with a strength codes everything at each strength, and the shortest code is
taken, at log₂ of their number more; columns are standardised by all states, which the other side has too; and probabilities
are mixed with a little of the uniform, since a class may not have been seen yet.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.estimators.logistic import LogisticProbe, Scaled, log_probabilities
from probes.estimators.strength import afresh
from probes.evaluation.cross_fit import weighted
from workbench.errors import TooFewExamples

SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Of the examples, sent up to the end of each block: the paper's."""
FEWEST = 4
"""Examples of the first block at least."""


class CodeLength(NamedTuple):
    """Bits of all labels."""

    bits: float
    uniform: float
    """Bits where all classes count as equally likely."""
    ends: list[int]
    """Examples sent up to the end of each block."""
    blocks: list[float]
    """Bits of each, at the strength of the shortest code."""

    @property
    def compression(self) -> float:
        """Uniform over actual bits."""
        return self.uniform / self.bits


def code_length(probe: Any, rows: Tensor, index: np.ndarray, n_classes: int, groups: np.ndarray, seed: int) -> CodeLength:
    """The online code of the labels.

    Args:
        index: `[n]`, classes.
        groups: `[n]`, sent one after another, in random order.
    """
    order, ends = blocks_of(groups, seed)
    x, own = rows[torch.from_numpy(order).to(rows.device)], index[order]
    variants: list[Any] = probe.variants()
    scaled: Scaled | None = None
    if isinstance(probe, LogisticProbe):
        scaled = Scaled.of(x, torch.ones(len(x), device=x.device), standardize=probe.standardize)
        if probe.standardize:  # by all states, so that no block needs units of its own
            scaled = scaled._replace(spread=torch.ones_like(scaled.spread))
            variants = [afresh(one, standardize=False) for one in variants]
    bits = np.zeros((len(variants), len(ends)))
    bits[:, 0] = ends[0] * math.log2(n_classes)
    for block, (start, end) in enumerate(pairwise(ends), 1):
        seen = own[:start]
        if len(set(seen.tolist())) < 2:
            log_p = np.full((len(variants), end - start, n_classes), -math.log(n_classes))
        elif scaled is None:
            log_p = _coded(variants, x, seen, end, n_classes)
        else:
            log_p = _coded_at_once(variants, scaled, seen, end, n_classes)
        rare = 1 / (start + n_classes)
        p = (1 - rare) * np.exp(log_p[:, np.arange(end - start), own[start:end]]) + rare / n_classes
        bits[:, block] = -np.log2(p).sum(1)
    best = int(bits.sum(1).argmin())
    total = float(bits[best].sum()) + math.log2(len(variants))
    return CodeLength(total, len(own) * math.log2(n_classes), ends, bits[best].tolist())


def blocks_of(groups: np.ndarray, seed: int) -> tuple[np.ndarray, list[int]]:
    """Examples in the order they are sent, and where blocks end: at the end of a group."""
    own = np.unique(groups, return_inverse=True)[1]
    place = np.random.default_rng(seed).permutation(own.max() + 1)[own]
    order = np.argsort(place, kind="stable")
    last = np.flatnonzero(np.append(np.diff(place[order]) != 0, True)) + 1
    wanted = np.maximum(np.array(SHARES) * len(own), FEWEST)
    return order, sorted({int(last[np.searchsorted(last, min(one, len(own)))]) for one in wanted})


def _coded(variants: list[Any], x: Tensor, seen: np.ndarray, end: int, n_classes: int) -> np.ndarray:
    """Logarithms of the probabilities of the rows after those whose labels were seen, `[variant, row, class]`."""
    n = len(seen)
    found = np.full((len(variants), end - n, n_classes), -math.log(n_classes))
    for at, one in enumerate(variants):
        try:
            fitted = one.fit(x[:n], seen)
        except TooFewExamples:  # so few that they spread along no direction: they are coded by nothing
            continue
        found[at] = -np.inf
        found[at][:, fitted.classes_] = fitted.predict_log_proba(x[n:end])
    return found


def _coded_at_once(variants: list[LogisticProbe], x: Scaled, seen: np.ndarray, end: int, n_classes: int) -> np.ndarray:
    """The same of all strengths in one go."""
    probe, n = variants[0], len(seen)
    probe.classes_ = np.arange(n_classes)
    learnt, asked = (x._replace(x=x.x[part]) for part in (slice(0, n), slice(n, end)))
    weights = weighted(probe, seen[:, None], np.ones((n, 1), bool))
    fitted = probe.solve(learnt, seen[:, None], weights, [float(one.C) for one in variants])
    return log_probabilities(fitted, asked)[:, 0].double().cpu().numpy()
