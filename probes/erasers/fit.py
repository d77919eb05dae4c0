"""Erasers of many sites at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.base import clone

from probes.dataset import Dataset
from probes.erasers.closed_forms import LEACE
from probes.erasers.concept import indicators, joint_of
from probes.erasers.eraser import Eraser, MomentEraser
from probes.erasers.named import eraser_named
from probes.states import BAG, EMBEDDING, States
from workbench.errors import BadDataset
from workbench.model import LanguageModel
from workbench.transports.transport import OF_THE_MODEL, of_model

log = logging.getLogger("workbench")
FEW = 2
"""Rows a column below which LEACE's oblique direction is mostly noise: of 400 rows of 576 columns, at all layers, ordinary text
lost 2.8 nats a token, of 2,256 rows 0.08."""


def model_of(states: Mapping[str, Any]) -> dict[str, Any]:
    """Of which model states are, as far as they say so."""
    settings = states.settings if isinstance(states, States) else {}
    return {name: settings[name] for name in OF_THE_MODEL if name in settings}


def class_labels(dataset: Dataset) -> np.ndarray:
    """Labels as erasers read them: fractions that name classes are written out, or they would be taken for numbers."""
    return dataset.labels.astype(str) if dataset.kind == "classes" and dataset.labels.dtype.kind == "f" else dataset.labels


def fit_erasers(
    states: Mapping[str, Any],
    dataset: Dataset | None = None,
    eraser: str | Eraser = "leace",
    *,
    model: LanguageModel | None = None,
    device: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """An eraser of a dataset's concept for every site, from states that one pass of the model gave.

    Args:
        states: `[n, d]` by site, of `probes.collect_states`, or rows of your own.
        dataset: Whose labels they are; the states' own, if None.
        eraser: A name (`leace`, `inlp`, `mean`, `sal`, `rlace`, `random`), or an eraser with its options.
        model: Of which the states are, where they do not say so (`States` do): erasers refuse to be used on another.
        device: Where they are fitted.
        options: Of an eraser that is named.
    Raises:
        BadDataset: if there are not as many states as labels.
        UnknownOption: if there is no such eraser, or it has no such option.
    """
    if dataset is None:
        if not isinstance(states, States):
            raise BadDataset("Rows by themselves have no labels. Give the dataset that they are of.")
        dataset = states.dataset
    own: Any = eraser_named(eraser, **options) if isinstance(eraser, str) else eraser
    about = model_of(states) if model is None else of_model(model)
    labels = class_labels(dataset)
    columns = None
    found = {}
    for site, given in states.items():
        if site in (BAG, EMBEDDING):
            continue
        rows = torch.as_tensor(given)
        if len(rows) != len(dataset):
            raise BadDataset(
                f"Rows of {site!r} are {len(rows)}, and {dataset.name!r} has {len(dataset)} labels. Give one each."
            )
        one: Any = clone(own)
        x = rows.to(device or rows.device, torch.float64 if rows.dtype == torch.float64 else torch.float32)
        if isinstance(one, LEACE) and len(x) < FEW * x.shape[1]:
            log.warning(
                "%s: LEACE has %d rows of %d columns, few to say along which direction rows move least: what it does to others "
                "may be large. Give more rows, or take mean projection.", site, len(x), x.shape[1],
            )  # fmt: skip
        if isinstance(one, MomentEraser):
            if columns is None:
                columns = indicators(labels, len(dataset))
            one.classes_ = columns[1]
            one.fit_moments(joint_of(x, columns[0]))
        else:
            one.fit(x, labels, groups=dataset.groups[:, 0])
        one.settings_ = about | dataset.settings | {"site": site, "pool": getattr(states, "settings", {}).get("pool")}
        found[site] = one
    return found
