"""What a step on a loss would do to single neurons, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workbench.analyses.backward_lens_tables import unit
from workbench.errors import MissingWeight, UnknownOption
from workbench.gradients.collect import Gradients
from workbench.tokens import shown

if TYPE_CHECKING:
    import pandas as pd

WORDS = 5


def moved_neurons(gradients: Gradients, layer: int, matrix: str, row: int, k: int) -> pd.DataFrame:
    """The neurons of a layer that a step of size 1 on one text's loss would move most, to be scaled by the step.

    - of `W_in` and `W_gate`: by how much the neuron's own input moves at the text's last token, `change` (all tokens of the
      text taking part, exact) and `imprint` (the last token's part alone, `-|x|² δ_j`, as Lemma 5.2 has it); its words are
      those of what is added to the direction that it reads;
    - of `W_out`: by how much what the neuron writes at the text's last token moves: `change` (the length of that) and `shift`
      (the last token's part alone, `-x_j² δ`); its words are those of what is added to the direction that it writes.

    Returns:
        A row a neuron, the largest change first: neuron, change, imprint or shift, more, less (the tokens that what is added
        has most and least of).
    Raises:
        UnknownOption: for a text that there is not, or k below 1.
        MissingWeight: if gradients of the layer's matrix are not there, or it has no neurons.
    """
    import pandas as pd

    name = f"{matrix}.{layer % gradients.model.n_layers}"
    if matrix not in ("W_in", "W_gate", "W_out") or name not in gradients.matrices:
        raise MissingWeight(f"There are no gradients of neurons called {name!r}. Ask for W_in, W_gate or W_out of a layer.")
    if k < 1 or not 0 <= row < len(gradients.batch.mask):
        raise UnknownOption(f"row={row}, k={k}: there are {len(gradients.batch.mask)} texts, and k is 1 or more.")
    own = gradients[name].of_row(row)
    if matrix == "W_out":
        x = own.X[-1].to(own.rows(torch.zeros(0, dtype=torch.long)))
        every = torch.arange(own.X.shape[1], device=own.X.device)
        change = x.abs() * torch.cat([own.rows(some).norm(dim=1) for some in every.split(1024)])
        alone = x.square() * own.D[-1].to(x).norm()
    else:
        change, alone = own.step_effect(1.0)[-1], own.imprint()[-1]
    chosen = change.abs().topk(min(k, int((change != 0).sum()))).indices
    added = -(own.rows(chosen) if matrix == "W_out" else own.columns(chosen))
    vocabulary, strings = gradients.model.vocabulary, gradients.model.token_strings
    found = vocabulary.project(unit(added).to(vocabulary.W_U.device), decoder="gain", k=WORDS, k_bottom=WORDS)

    def words(ids: torch.Tensor) -> list[str]:
        return ["  ".join(shown(strings[i]) for i in line) for line in ids.tolist()]

    part = "shift" if matrix == "W_out" else "imprint"
    return pd.DataFrame(
        {
            "neuron": chosen.tolist(), "change": change[chosen].tolist(), part: alone[chosen].tolist(),
            "more": words(found.top_ids), "less": words(found.bottom_ids),
        }
    )  # fmt: skip
