"""What is learnt on a model's activations: probes, with the controls that make their scores mean something."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.dataset import Dataset as Dataset
    from probes.estimators.logistic import LogisticProbe as LogisticProbe
    from probes.estimators.moments import LDAProbe as LDAProbe
    from probes.estimators.moments import MeanDifferenceProbe as MeanDifferenceProbe
    from probes.estimators.moments import RidgeProbe as RidgeProbe
    from probes.estimators.moments import RidgeRegressionProbe as RidgeRegressionProbe
    from probes.estimators.nonlinear import MLPProbe as MLPProbe
    from probes.estimators.nonlinear import MLPRegressionProbe as MLPRegressionProbe
    from probes.estimators.project import ProjectAndProbe as ProjectAndProbe
    from probes.estimators.sparse import SparseProbe as SparseProbe
    from probes.fit import fit_probe as fit_probe
    from probes.probe_sweep import ProbeSweep as ProbeSweep
    from probes.probe_sweep import sweep as sweep
    from probes.reading import read_probe as read_probe
    from probes.shipped import shipped_sets as shipped_sets
    from probes.states import States as States
    from probes.states import collect_states as collect_states
    from probes.untrained_model import untrained as untrained

_HOMES = {
    "Dataset": "probes.dataset",
    "LDAProbe": "probes.estimators.moments",
    "LogisticProbe": "probes.estimators.logistic",
    "MLPProbe": "probes.estimators.nonlinear",
    "MLPRegressionProbe": "probes.estimators.nonlinear",
    "MeanDifferenceProbe": "probes.estimators.moments",
    "ProbeSweep": "probes.probe_sweep",
    "ProjectAndProbe": "probes.estimators.project",
    "RidgeProbe": "probes.estimators.moments",
    "RidgeRegressionProbe": "probes.estimators.moments",
    "SparseProbe": "probes.estimators.sparse",
    "States": "probes.states",
    "collect_states": "probes.states",
    "fit_probe": "probes.fit",
    "read_probe": "probes.reading",
    "shipped_sets": "probes.shipped",
    "sweep": "probes.probe_sweep",
    "untrained": "probes.untrained_model",
}
"""Public names and where they live. They are resolved when first used (PEP 562): scikit-learn alone takes a second."""

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
