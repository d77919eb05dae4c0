"""The rows behind two neuron maps: how far they moved, and whether a random move as long would have changed as many tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analyses.map_alignment import Lists, agreement, generator, groups
from workbench.analyses.neuron_map import NeuronMap, Side, expert_of, neuron_rows
from workbench.errors import NotComparable, OtherJob
from workbench.model import LanguageModel
from workbench.projection import Projection, accumulation_dtype
from workbench.projector import Projector

if TYPE_CHECKING:
    import pandas as pd

Models = tuple[LanguageModel, LanguageModel]


@torch.no_grad()
def compare_rows(
    a: NeuronMap, b: NeuronMap, models: Models, neurons: pd.DataFrame, lists: Lists, seed: int, progress: bool
) -> pd.DataFrame:
    """Columns, as `neurons` has rows: the measures of `rows_` and `perturbed_`, cosine and change.

    Args:
        neurons: Which (side, layer, and all of its neurons).
        lists: What map a says of them.
    Raises:
        OtherJob: if a model has other weights than its map.
        NotComparable: if the models' rows are not of one length.
    """
    import pandas as pd

    _require_mapped(a, b, models)
    k, vocabulary = lists.top.shape[1], models[0].vocabulary
    projector = Projector(vocabulary, a.settings["decoder"], k, k)
    frames = []
    for (side, layer), at in tqdm(groups(neurons).items(), desc="compare rows", unit="layer", disable=not progress):
        before, after = (_rows(model, a, side, layer).to(vocabulary.W_U.device) for model in models)
        moved = after - before
        distance, length = moved.norm(dim=1), before.norm(dim=1)
        direction = _directions(generator(seed, "perturbed", side, layer), before)
        columns = {
            "cosine": torch.cosine_similarity(before, after).cpu().numpy(),
            "change": (distance / length).cpu().numpy(),
        }
        for prefix, rows in (("rows_", after), ("perturbed_", before + distance[:, None] * direction)):
            columns |= agreement(prefix, lists.of(at), _lists(projector(rows), lists))
        frames.append(pd.DataFrame(columns, index=at))
    return pd.concat(frames)


def _require_mapped(a: NeuronMap, b: NeuronMap, models: Models) -> None:
    for neurons, model, which in zip((a, b), models, ("first", "second"), strict=True):
        own = neurons.settings
        if own["weights_hash"] != model.weights_hash:
            raise OtherJob(
                f"The {which} map is of {own['model']!r} in {own['dtype']}, and {model.name!r} in "
                f"{str(model.dtype).removeprefix('torch.')} has other weights. Give the models that were mapped, in that order."
            )
    if models[0].d_model != models[1].d_model:
        raise NotComparable(
            f"Rows have {models[0].d_model} numbers in the first model and {models[1].d_model} in the second, so none can be "
            "moved to the other's place. Leave the models out, and compare the maps alone."
        )


def _rows(model: LanguageModel, neurons: NeuronMap, side: Side, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """In the accumulation dtype: differences of bfloat16 rows would be rounded."""
    rows = neuron_rows(model, side, layer, neurons.settings["reading"], expert_of(neurons.settings["part"]))
    return rows.to(accumulation_dtype(rows))


def _directions(random: np.random.Generator, rows: Tensor) -> Tensor:
    """Random directions of unit norm, every one as likely as any other."""
    normal = torch.from_numpy(random.standard_normal(rows.shape, dtype=np.float32)).to(rows)
    return normal / normal.norm(dim=1, keepdim=True)


def _lists(found: Projection, like: Lists) -> Lists:
    return Lists(found.top_ids.cpu().numpy(), found.bottom_ids.cpu().numpy(), like.folded)
