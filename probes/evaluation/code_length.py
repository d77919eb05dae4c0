"""Minimum description length: the bits that it takes to send the labels to someone who has the states alone.

Source: Voita and Titov 2020 (arXiv 2003.12298), the online code. Labels go in blocks; each is coded by a probe that learnt
from the blocks before it, the first by nothing. Differently from theirs, blocks are of whole groups, so that no block is coded
by what the words of another give away; a probe with a strength codes everything at each strength, and the shortest code is
taken, at log₂ of their number more; and probabilities are mixed with a little of the uniform, since a class may not have been
seen yet.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.estimators.logistic import LogisticProbe, Scaled, log_probabilities
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
    variants = probe.variants() if hasattr(probe, "variants") else [probe]
    bits = np.zeros((len(variants), len(ends)))
    bits[:, 0] = ends[0] * math.log2(n_classes)
    for block, (start, end) in enumerate(pairwise(ends), 1):
        log_p = _coded(probe, variants, x[:end], own[:start], n_classes)
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


def _coded(probe: Any, variants: list[Any], x: Tensor, seen: np.ndarray, n_classes: int) -> np.ndarray:
    """Logarithms of the probabilities of the rows after those whose labels were seen, `[variant, row, class]`."""
    n = len(seen)
    if len(set(seen.tolist())) < 2:
        return np.full((len(variants), len(x) - n, n_classes), -math.log(n_classes))
    if not isinstance(probe, LogisticProbe):
        found = np.full((len(variants), len(x) - n, n_classes), -math.log(n_classes))
        for at, one in enumerate(variants):
            try:
                fitted = one.fit(x[:n], seen)
            except TooFewExamples:  # so few that they spread along no direction: they are coded by nothing
                continue
            found[at] = -np.inf
            found[at][:, fitted.classes_] = fitted.predict_log_proba(x[n:])
        return found
    weights = torch.zeros(len(x), device=x.device)
    weights[:n] = 1
    probe = variants[0]
    probe.classes_ = np.arange(n_classes)
    rows = Scaled.of(x, weights, standardize=probe.standardize)
    labels = np.concatenate([seen, np.zeros(len(x) - n, seen.dtype)])[:, None]
    train = weights.bool().cpu().numpy()[:, None]
    fitted = probe.solve(rows, labels, weighted(probe, labels, train), [one.C for one in variants])
    return log_probabilities(fitted, rows)[:, 0, n:].double().cpu().numpy()
