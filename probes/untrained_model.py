"""The same model with the weights that it would have begun its training with."""

from __future__ import annotations

from copy import deepcopy

import torch

from workbench.loading import load
from workbench.model import LanguageModel


def untrained(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """A model of the same config, tokenizer, dtype and device, with Hugging Face's random initialisation of that family.

    What a probe finds in it is not learnt: the words themselves and their places, which random weights mix but keep. (Norm
    gains are 1, biases 0, and matrices have the config's `initializer_range`: a training run may have begun elsewhere. Weights
    are drawn on the model's device: another device draws others from the same seed.)
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(model.device):
        torch.manual_seed(seed)
        fresh = type(model.hf)(deepcopy(model.hf.config))
    for parameter in fresh.parameters():
        parameter.data = parameter.data.to(model.dtype)
    fresh.config._name_or_path = f"{model.name}, untrained"
    return load(fresh, tokenizer=model.tokenizer)
