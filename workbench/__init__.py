"""A mechanistic-interpretability workbench for Hugging Face decoder language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.analyses.neuron_map import NeuronMap as NeuronMap
    from workbench.analyses.neuron_map import map_neurons as map_neurons
    from workbench.errors import WorkbenchError as WorkbenchError
    from workbench.loading import load as load
    from workbench.model import LanguageModel as LanguageModel
    from workbench.model_files import models as models
    from workbench.sites import Site as Site
    from workbench.tracer import capture as capture
    from workbench.vocabulary import Vocabulary as Vocabulary

_HOMES = {
    "LanguageModel": "workbench.model",
    "NeuronMap": "workbench.analyses.neuron_map",
    "Site": "workbench.sites",
    "Vocabulary": "workbench.vocabulary",
    "WorkbenchError": "workbench.errors",
    "capture": "workbench.tracer",
    "load": "workbench.loading",
    "map_neurons": "workbench.analyses.neuron_map",
    "models": "workbench.model_files",
}
"""Public names and where they live. They are resolved when first used (PEP 562): importing torch takes a second."""

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
