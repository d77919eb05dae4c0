"""Probes by name, and fitting one to rows that are at hand."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from workbench.errors import UnknownOption, require_one_of

CLASSES = {
    "logistic": ("logistic", "LogisticProbe"),
    "lda": ("moments", "LDAProbe"),
    "mean": ("moments", "MeanDifferenceProbe"),
    "sparse": ("sparse", "SparseProbe"),
    "project": ("project", "ProjectAndProbe"),
    "mlp": ("nonlinear", "MLPProbe"),
    "ridge": ("moments", "RidgeProbe"),
}
"""Probes of classes; all but the last, which gives no probabilities, can be swept."""
NUMBERS = {"ridge": ("moments", "RidgeRegressionProbe"), "mlp": ("nonlinear", "MLPRegressionProbe")}
"""Probes of numbers."""


def probe_named(name: str, kind: str = "classes", **options: Any) -> Any:
    """An estimator that is not fitted.

    Args:
        kind: `classes` or `numbers`.
        options: Its own.
    Raises:
        UnknownOption: if there is no such probe, or it has no such option.
    """
    require_one_of("kind", kind, ("classes", "numbers"))
    known = NUMBERS if kind == "numbers" else CLASSES
    if name not in known:
        raise UnknownOption(f"There is no probe {name!r} of {kind}. Use one of {', '.join(known)}.")
    module, own = known[name]
    try:
        return getattr(import_module(f"probes.estimators.{module}"), own)(**options)
    except TypeError as error:
        raise UnknownOption(f"The probe {name!r} does not take these options: {error}.") from None


def fit_probe(X: Any, y: Any, probe: str = "logistic", *, kind: str = "classes", groups: Any = None, **options: Any) -> Any:
    """Fit a probe to rows, and return it: a scikit-learn estimator with `coef_`, `predict` and, of classes, `direction`.

    Its own `score` on the same rows says nothing: `probes.sweep({"mine": X}, probes.Dataset(None, y, groups=groups))` scores it
    on groups that it did not see, beside its controls.

    Args:
        X: `[n, d]`, an array or a tensor on any device.
        y: Labels `[n]`, or numbers `[n]` or `[n, target]` with `kind="numbers"`.
        probe: Its name: `logistic`, `lda`, `mean`, `ridge`, `sparse`, `project`, `mlp`.
        groups: Rows of one are held out together while a strength is chosen.
        options: The probe's own, such as `C=1.0`.
    Raises:
        UnknownOption: if there is no such probe or option.
        TooFewExamples, BadDataset, NotFinite: as the probe's `fit`.
    """
    return probe_named(probe, kind, **options).fit(X, y, groups=groups)
