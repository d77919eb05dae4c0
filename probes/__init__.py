"""What is learnt on a model's activations: probes, with the controls that make their scores mean something."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.dataset import Dataset as Dataset
    from probes.erasers.closed_forms import LEACE as LEACE
    from probes.erasers.closed_forms import SAL as SAL
    from probes.erasers.closed_forms import MeanProjection as MeanProjection
    from probes.erasers.closed_forms import OracleLEACE as OracleLEACE
    from probes.erasers.closed_forms import RandomSubspace as RandomSubspace
    from probes.erasers.eraser import Eraser as Eraser
    from probes.erasers.files import load_erasers as load_erasers
    from probes.erasers.files import save_erasers as save_erasers
    from probes.erasers.fit import fit_erasers as fit_erasers
    from probes.erasers.inlp import INLP as INLP
    from probes.erasers.rlace import RLACE as RLACE
    from probes.erasing.erasure import Erasure as Erasure
    from probes.erasing.erasure import erase as erase
    from probes.erasing.following import Followed as Followed
    from probes.erasing.following import follow as follow
    from probes.erasing.scrubbing import Scrubbing as Scrubbing
    from probes.erasing.scrubbing import fit_scrubbers as fit_scrubbers
    from probes.erasing.scrubbing import scrub as scrub
    from probes.erasing.steering import Steering as Steering
    from probes.erasing.steering import steer as steer
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
    "Eraser": "probes.erasers.eraser",
    "Erasure": "probes.erasing.erasure",
    "Followed": "probes.erasing.following",
    "INLP": "probes.erasers.inlp",
    "LDAProbe": "probes.estimators.moments",
    "LEACE": "probes.erasers.closed_forms",
    "LogisticProbe": "probes.estimators.logistic",
    "MLPProbe": "probes.estimators.nonlinear",
    "MLPRegressionProbe": "probes.estimators.nonlinear",
    "MeanDifferenceProbe": "probes.estimators.moments",
    "MeanProjection": "probes.erasers.closed_forms",
    "OracleLEACE": "probes.erasers.closed_forms",
    "ProbeSweep": "probes.probe_sweep",
    "ProjectAndProbe": "probes.estimators.project",
    "RLACE": "probes.erasers.rlace",
    "RandomSubspace": "probes.erasers.closed_forms",
    "RidgeProbe": "probes.estimators.moments",
    "RidgeRegressionProbe": "probes.estimators.moments",
    "SAL": "probes.erasers.closed_forms",
    "Scrubbing": "probes.erasing.scrubbing",
    "SparseProbe": "probes.estimators.sparse",
    "States": "probes.states",
    "Steering": "probes.erasing.steering",
    "collect_states": "probes.states",
    "erase": "probes.erasing.erasure",
    "fit_erasers": "probes.erasers.fit",
    "fit_probe": "probes.fit",
    "fit_scrubbers": "probes.erasing.scrubbing",
    "follow": "probes.erasing.following",
    "load_erasers": "probes.erasers.files",
    "read_probe": "probes.reading",
    "save_erasers": "probes.erasers.files",
    "scrub": "probes.erasing.scrubbing",
    "shipped_sets": "probes.shipped",
    "steer": "probes.erasing.steering",
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
