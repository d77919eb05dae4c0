"""A mechanistic-interpretability workbench for Hugging Face decoder language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.analyses.activation_patching import activation_patching as activation_patching
    from workbench.analyses.backward_lens import BackwardLens as BackwardLens
    from workbench.analyses.backward_lens import backward_lens as backward_lens
    from workbench.analyses.decoded_directions import DecodedDirections as DecodedDirections
    from workbench.analyses.decoded_directions import decode_directions as decode_directions
    from workbench.analyses.directions import Directions as Directions
    from workbench.analyses.directions import head_directions as head_directions
    from workbench.analyses.directions import singular_directions as singular_directions
    from workbench.analyses.fact_edits import FactEdits as FactEdits
    from workbench.analyses.fact_edits import edit_facts as edit_facts
    from workbench.analyses.forward_shift import forward_shift as forward_shift
    from workbench.analyses.head_scores import HeadScores as HeadScores
    from workbench.analyses.head_scores import head_scores as head_scores
    from workbench.analyses.lens import LensView as LensView
    from workbench.analyses.lens import lens as lens
    from workbench.analyses.lens import logit_lens as logit_lens
    from workbench.analyses.lens_contributions import lens_contributions as lens_contributions
    from workbench.analyses.lens_quality import lens_quality as lens_quality
    from workbench.analyses.linearity import Linearity as Linearity
    from workbench.analyses.linearity import linearity as linearity
    from workbench.analyses.logit_attribution import Attribution as Attribution
    from workbench.analyses.logit_attribution import logit_attribution as logit_attribution
    from workbench.analyses.map_comparison import MapComparison as MapComparison
    from workbench.analyses.map_comparison import compare_maps as compare_maps
    from workbench.analyses.neuron_card import NeuronCard as NeuronCard
    from workbench.analyses.neuron_card import neuron_card as neuron_card
    from workbench.analyses.neuron_effect import neuron_effect as neuron_effect
    from workbench.analyses.neuron_map import NeuronMap as NeuronMap
    from workbench.analyses.neuron_map import map_neurons as map_neurons
    from workbench.analyses.prompt_states import AttentionPatterns as AttentionPatterns
    from workbench.analyses.prompt_states import StateNorms as StateNorms
    from workbench.analyses.prompt_states import attention_patterns as attention_patterns
    from workbench.analyses.prompt_states import state_norms as state_norms
    from workbench.analyses.scan import scan as scan
    from workbench.analyses.shortcuts import Shortcuts as Shortcuts
    from workbench.analyses.shortcuts import shortcuts as shortcuts
    from workbench.analyses.step_forecast import StepForecast as StepForecast
    from workbench.analyses.step_forecast import forecast_step as forecast_step
    from workbench.analyses.top_activations import TopActivations as TopActivations
    from workbench.analyses.top_activations import top_activations as top_activations
    from workbench.analyses.transport import transport as transport
    from workbench.analyses.transport_scores import TransportScores as TransportScores
    from workbench.analyses.word_activations import WordActivations as WordActivations
    from workbench.capturing import capture as capture
    from workbench.collecting import collect_moments as collect_moments
    from workbench.collecting import plan_moments as plan_moments
    from workbench.corpus.corpus import Corpus as Corpus
    from workbench.direction_ablation import DirectionAblation as DirectionAblation
    from workbench.direction_ablation import ablate_directions as ablate_directions
    from workbench.edits.files import load_edits as load_edits
    from workbench.edits.files import save_edits as save_edits
    from workbench.edits.make import ablate as ablate
    from workbench.edits.make import add as add
    from workbench.edits.make import clamp as clamp
    from workbench.edits.make import patch as patch
    from workbench.edits.make import project_out as project_out
    from workbench.edits.make import replace as replace
    from workbench.edits.make import scale as scale
    from workbench.errors import WorkbenchError as WorkbenchError
    from workbench.facts import shipped_facts as shipped_facts
    from workbench.gradients.collect import Gradients as Gradients
    from workbench.gradients.collect import collect_gradients as collect_gradients
    from workbench.gradients.gradient import Gradient as Gradient
    from workbench.intervention import intervene as intervene
    from workbench.lenses.convert import convert_lens as convert_lens
    from workbench.lenses.jacobian import fit_jacobian as fit_jacobian
    from workbench.lenses.lens import Lens as Lens
    from workbench.lenses.shipped import shipped_lens as shipped_lens
    from workbench.lenses.shortcut import fit_shortcut as fit_shortcut
    from workbench.lenses.tuned import fit_tuned as fit_tuned
    from workbench.loading import load as load
    from workbench.model import LanguageModel as LanguageModel
    from workbench.model_files import models as models
    from workbench.moments.moments import Moments as Moments
    from workbench.sites import Site as Site
    from workbench.store.store import ActivationStore as ActivationStore
    from workbench.store.write import capture_to_store as capture_to_store
    from workbench.streaming.stream import stream as stream
    from workbench.substitution import substitute as substitute
    from workbench.transports.fit import Transports as Transports
    from workbench.transports.fit import fit_transports as fit_transports
    from workbench.transports.transport import Transport as Transport
    from workbench.vocabulary import Vocabulary as Vocabulary
    from workbench.weight_edits import WeightEdit as WeightEdit
    from workbench.weight_edits import edit_weights as edit_weights
    from workbench.weight_edits import save_edited as save_edited

_HOMES = {
    "ActivationStore": "workbench.store.store",
    "AttentionPatterns": "workbench.analyses.prompt_states",
    "Attribution": "workbench.analyses.logit_attribution",
    "BackwardLens": "workbench.analyses.backward_lens",
    "Corpus": "workbench.corpus.corpus",
    "DecodedDirections": "workbench.analyses.decoded_directions",
    "DirectionAblation": "workbench.direction_ablation",
    "Directions": "workbench.analyses.directions",
    "FactEdits": "workbench.analyses.fact_edits",
    "Gradient": "workbench.gradients.gradient",
    "Gradients": "workbench.gradients.collect",
    "HeadScores": "workbench.analyses.head_scores",
    "LanguageModel": "workbench.model",
    "Lens": "workbench.lenses.lens",
    "LensView": "workbench.analyses.lens",
    "Linearity": "workbench.analyses.linearity",
    "MapComparison": "workbench.analyses.map_comparison",
    "Moments": "workbench.moments.moments",
    "NeuronCard": "workbench.analyses.neuron_card",
    "NeuronMap": "workbench.analyses.neuron_map",
    "Shortcuts": "workbench.analyses.shortcuts",
    "Site": "workbench.sites",
    "StateNorms": "workbench.analyses.prompt_states",
    "StepForecast": "workbench.analyses.step_forecast",
    "TopActivations": "workbench.analyses.top_activations",
    "Transport": "workbench.transports.transport",
    "TransportScores": "workbench.analyses.transport_scores",
    "Transports": "workbench.transports.fit",
    "Vocabulary": "workbench.vocabulary",
    "WeightEdit": "workbench.weight_edits",
    "WordActivations": "workbench.analyses.word_activations",
    "WorkbenchError": "workbench.errors",
    "ablate": "workbench.edits.make",
    "ablate_directions": "workbench.direction_ablation",
    "activation_patching": "workbench.analyses.activation_patching",
    "add": "workbench.edits.make",
    "attention_patterns": "workbench.analyses.prompt_states",
    "backward_lens": "workbench.analyses.backward_lens",
    "capture": "workbench.capturing",
    "capture_to_store": "workbench.store.write",
    "clamp": "workbench.edits.make",
    "collect_gradients": "workbench.gradients.collect",
    "collect_moments": "workbench.collecting",
    "compare_maps": "workbench.analyses.map_comparison",
    "convert_lens": "workbench.lenses.convert",
    "decode_directions": "workbench.analyses.decoded_directions",
    "edit_facts": "workbench.analyses.fact_edits",
    "edit_weights": "workbench.weight_edits",
    "fit_jacobian": "workbench.lenses.jacobian",
    "fit_shortcut": "workbench.lenses.shortcut",
    "fit_transports": "workbench.transports.fit",
    "fit_tuned": "workbench.lenses.tuned",
    "forecast_step": "workbench.analyses.step_forecast",
    "forward_shift": "workbench.analyses.forward_shift",
    "head_directions": "workbench.analyses.directions",
    "head_scores": "workbench.analyses.head_scores",
    "intervene": "workbench.intervention",
    "lens": "workbench.analyses.lens",
    "lens_contributions": "workbench.analyses.lens_contributions",
    "lens_quality": "workbench.analyses.lens_quality",
    "linearity": "workbench.analyses.linearity",
    "load": "workbench.loading",
    "load_edits": "workbench.edits.files",
    "logit_attribution": "workbench.analyses.logit_attribution",
    "logit_lens": "workbench.analyses.lens",
    "map_neurons": "workbench.analyses.neuron_map",
    "models": "workbench.model_files",
    "neuron_card": "workbench.analyses.neuron_card",
    "neuron_effect": "workbench.analyses.neuron_effect",
    "patch": "workbench.edits.make",
    "plan_moments": "workbench.collecting",
    "project_out": "workbench.edits.make",
    "replace": "workbench.edits.make",
    "save_edited": "workbench.weight_edits",
    "save_edits": "workbench.edits.files",
    "scale": "workbench.edits.make",
    "scan": "workbench.analyses.scan",
    "shipped_facts": "workbench.facts",
    "shipped_lens": "workbench.lenses.shipped",
    "shortcuts": "workbench.analyses.shortcuts",
    "singular_directions": "workbench.analyses.directions",
    "state_norms": "workbench.analyses.prompt_states",
    "stream": "workbench.streaming.stream",
    "substitute": "workbench.substitution",
    "top_activations": "workbench.analyses.top_activations",
    "transport": "workbench.analyses.transport",
}
"""Public names and where they live. They are resolved when first used (PEP 562): importing torch takes a second."""

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
