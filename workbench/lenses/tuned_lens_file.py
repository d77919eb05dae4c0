"""Lenses of the package tuned-lens (0.1 to 0.2): config.json, and params.pt with a translator a state.

Source: "Eliciting Latent Predictions from Transformers with the Tuned Lens" (Belrose et al. 2023, arXiv 2303.08112). Its
package adds what a translator gives to the state, h + A h + b, and translator i reads Hugging Face's hidden_states[i]: state 0
enters the first block, state l + 1 leaves block l.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.artifacts import read_json
from workbench.errors import BadArtifact, NotComparable, UnreadableWeight
from workbench.lenses.foreign import KNOWN, Published, numbers
from workbench.model import LanguageModel
from workbench.sites import state

_KEY = re.compile(r"\d+\.(weight|bias)")
_OLD_KEY = re.compile(r"(input|layer)_(translator|adapter|probe)")
_PRINTED: dict[str, Any] = {
    "edgeitems": 3, "threshold": 1000, "linewidth": 75, "suppress": False, "sign": "-", "floatmode": "maxprec",
    "formatter": None,
}  # fmt: skip
"""How NumPy prints an array unless it is told otherwise: the package's hash is of what is printed."""


def is_tuned_lens(values: dict[Any, Any]) -> bool:
    """Whether the keys are those of a tuned lens, of whatever version."""
    return bool(values) and all(isinstance(key, str) for key in values) and any(
        _KEY.fullmatch(key) or _OLD_KEY.match(key) for key in values
    )  # fmt: skip


def tuned_lens(file: Path, values: dict[Any, Any], model: LanguageModel) -> Published:
    """
    Raises:
        BadArtifact: if config.json is missing, the version is not known, or a translator is missing or damaged.
        NotComparable: if it was made for a model of another shape, or with another unembedding.
        NotFinite: if there is NaN or infinity in it.
    """
    if any(_OLD_KEY.match(key) for key in values):
        raise BadArtifact(
            f"{str(file)!r} is of tuned-lens 0.0, which kept the model's norm, head or blocks beside the translators. That is "
            f"not read; take the same lens as 0.1 and later write it. Known are {KNOWN}."
        )
    config = _config(file)
    d, n = model.d_model, model.n_layers
    if (config.get("d_model"), config.get("num_hidden_layers")) != (d, n):
        raise NotComparable(
            f"{str(file)!r} is a lens of a model of {config.get('num_hidden_layers')} layers, d_model {config.get('d_model')}; "
            f"{model.name!r} has {n} of {d}. Name the model that it was made for: {config.get('base_model_name_or_path')!r}."
        )
    agrees = _unembedding_agrees(file, config, model)
    biased = config.get("bias", True)
    wanted = [f"{number}.{part}" for number in range(n) for part in (["weight", "bias"] if biased else ["weight"])]
    if odd := sorted(set(wanted) ^ set(values)):
        raise BadArtifact(
            f"{str(file)!r} should hold translators 0 to {n - 1}, {'each' if biased else 'none'} with a bias, as config.json "
            f"says; missing or too much: {', '.join(odd[:4])}. Fetch the lens again, whole."
        )
    maps = {}
    for number in range(n):
        weight = numbers(file, f"{number}.weight", values[f"{number}.weight"], (d, d))
        bias = numbers(file, f"{number}.bias", values[f"{number}.bias"], (d,)) if biased else torch.zeros(d)
        # float64: beside the 1 of the identity, float32 would round the small numbers of A away
        maps[state(number, n)] = torch.eye(d, dtype=torch.float64) + weight.T.double(), bias.double()
    name = config.get("base_model_name_or_path")
    says = {"config": config, "unembedding_agrees": agrees}
    return Published("tuned", "tuned-lens", maps, bool(biased), name if isinstance(name, str) else None, says)


def unembedding_hashes(W_U: Float[Tensor, "d_model d_vocab"]) -> set[str]:
    """What tuned-lens may have noted of this matrix, loaded in whatever precision.

    The package hashes the text that NumPy prints of the matrix with one decimal: of a large one its corners, nine numbers each.
    A fingerprint to tell models apart by, no proof.
    """
    rows = W_U.detach().T
    edge = 500 // W_U.shape[0] + 3  # as many as NumPy shows, and enough for it to leave some out
    if len(rows) > 2 * edge:
        rows = torch.cat([rows[:edge], rows[-edge:]])
    rows = rows.cpu()
    seen = [rows.float(), rows.half().float(), rows.bfloat16().float(), rows.half()]  # 0.1.0 printed half precision as it is
    with np.printoptions(**_PRINTED):
        return {hashlib.sha256(np.array_str(one.numpy(), precision=1).encode()).hexdigest() for one in seen}


def _config(file: Path) -> dict[str, Any]:
    beside = file.with_name("config.json")
    if not beside.is_file():
        raise BadArtifact(
            f"{str(file)!r} holds the translators of a tuned lens, but no config.json lies beside it. Fetch that too."
        )
    config = read_json(beside)
    if not isinstance(config, dict) or config.get("lens_type", "linear_tuned_lens") != "linear_tuned_lens":
        kind = config.get("lens_type") if isinstance(config, dict) else config
        raise BadArtifact(f"{str(beside)!r} describes a lens of type {kind!r}; only 'linear_tuned_lens' is known.")
    return config


def _unembedding_agrees(file: Path, config: dict[str, Any], model: LanguageModel) -> bool | None:
    """None where the file has no hash, or the model's matrix cannot be read.

    Raises:
        NotComparable: if the hash is of another matrix.
    """
    noted = config.get("unembed_hash") or config.get("unemebd_hash")  # so spelled by 0.1.0
    try:
        if noted is None or noted in unembedding_hashes(model.weight("W_U")):
            return None if noted is None else True
    except UnreadableWeight:
        return None
    raise NotComparable(
        f"{str(file)!r} was made with another unembedding matrix than that of {model.name!r} (hash {str(noted)[:12]}…): for "
        f"{config.get('base_model_name_or_path')!r}, revision {config.get('base_model_revision')}. Name that model, in the "
        "precision that it was published in."
    )
