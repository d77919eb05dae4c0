"""What attention and the MLP of each block add to what a lens says there: parts of a sum, to the logit.

A lens's map is linear and so is the final norm once its scale is held, so the logits that a lens reads from a state are the sum
of what the embedding and every block's attention and MLP before it put there, and of a constant. A part alone has no
distribution: its softmax, or a norm of its own, would say what the model never computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.analyses.vocabulary_ends import ends_table
from workbench.artifacts import read_tables, write_tables
from workbench.capturing import capture
from workbench.errors import UnknownOption
from workbench.frozen_norm import frozen_norm
from workbench.lenses.lens import Lens
from workbench.model import Batch, LanguageModel
from workbench.results import Result, versions
from workbench.sites import named_once, parse_layers, state
from workbench.tokens import shown

if TYPE_CHECKING:
    import pandas as pd

KIND = "lens_contributions"
PARTS = ("resid_pre", "attn_out", "mlp_out")


@dataclass(frozen=True, eq=False, repr=False)
class LensContributions(Result):
    """`table` has a row a text, layer, part, position, end (`up`, `down`) and rank: row, layer, part, pos, end, rank, token_id,
    token, contribution (what the part adds to the token's logit, in nats). Parts are `resid_pre` (all that was there before
    the block), `attn_out` and `mlp_out`.

    `targets` has a row a text, layer, part and position: target_id, target, contribution. Parts of a position, and the
    `constant` (biases of lens, norm and head), add up to `logit`, what the lens reads from the block's output.
    """

    targets: pd.DataFrame

    def save(self, folder: str | Path) -> Path:
        """Write lens_contributions.parquet, targets.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return write_tables(folder, KIND, self.settings, {KIND: self.table, "targets": self.targets})

    @classmethod
    def load(cls, folder: str | Path) -> LensContributions:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        table, others, settings = read_tables(folder, KIND, "wb.lens_contributions", ("targets",))
        targets = others["targets"]
        assert targets is not None
        return cls(table=table, settings=settings, targets=targets)

    def __str__(self) -> str:
        first = self.targets[self.targets["row"] == 0]
        own = first[first["pos"] == first["pos"].max()]
        wide = own.pivot(index="layer", columns="part", values="contribution")[[*PARTS, "constant"]]
        said, token = self.settings, shown(own["target"].iloc[0])
        head = f"{said['lens']} lens of {said['model']}: the logit of {token} at the last token"
        return f"{head}\n{wide.round(2).to_string()}\n  .table .targets .save(folder)"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


@torch.no_grad()
def lens_contributions(
    model: LanguageModel,
    inputs: str | Sequence[str] | Batch,
    lens: Lens | None = None,
    *,
    layers: str | None = None,
    k: int = 5,
    target: str | int | None = None,
) -> LensContributions:
    """What attention and the MLP of some blocks add to the logits that a lens reads from the blocks' outputs.

    Args:
        lens: The logit lens, if None.
        layers: Blocks, as `parse_layers` reads them; all, if None.
        k: How many tokens of each end: those raised most, and those lowered most.
        target: Followed at every position; the likeliest token of the model there, if None.
    Raises:
        UnknownOption: if k is not 1 or more, or the model's head has a soft cap, through which no sum goes.
        UnknownToken: if the target is no single token.
        OtherJob, NotComparable: if the lens is of another model, or has no map from a block's output.
        UnknownNorm: if the final norm is neither a LayerNorm nor an RMS norm.
        TextTooLong, LayerOutOfRange, WorkbenchError: as `capture`.
    """
    import pandas as pd

    vocabulary = model.vocabulary
    if k < 1:
        raise UnknownOption(f"k={k} tokens were asked for. Ask for one or more.")
    if vocabulary.softcap is not None:
        raise UnknownOption(
            f"{model.name!r} caps its logits ({vocabulary.softcap}), so that they are no sum of parts. Compare readings with "
            "wb.lens, before and after a block."
        )
    lens = Lens.logit(model) if lens is None else lens
    lens.require_model(model)
    n, chosen = model.n_layers, parse_layers(layers, model.n_layers)
    sites = [f"{part}.{layer}" for layer in chosen for part in PARTS]
    acts = capture(model, inputs, [*sites, *(f"resid_post.{layer}" for layer in chosen), state(n, n)])
    home = vocabulary.W_U.device

    def rows_of(site: str) -> Tensor:
        return acts[site].to(home)[acts.mask.to(home)]

    rows, columns = acts.mask.cpu().nonzero(as_tuple=True)
    position = (acts.mask.cpu().long().cumsum(1) - 1)[rows, columns]
    final = rows_of(state(n, n))
    best = vocabulary.project(final, decoder="norm", k=1).top_ids[:, 0]
    wanted = best if target is None else torch.full_like(best, model.token_id(target))
    strings = model.token_strings
    added, where, targets = [], [], []
    for layer in chosen:
        site = named_once(f"resid_post.{layer}", n)
        after = lens.read(rows_of(site), site)
        norm = frozen_norm(model, model.row.path("ln_final"), after[0].float())
        scale = norm.scales(vocabulary.ln_final, after.float())[:, None] * vocabulary.logit_scale
        zero = lens.read(torch.zeros_like(after), site)
        parts = {part: lens.read(rows_of(f"{part}.{layer}"), site) - zero for part in PARTS}
        bias = norm.bias @ vocabulary.W_U[:, wanted].float() * vocabulary.logit_scale
        bias = bias if vocabulary.b_U is None else bias + vocabulary.b_U[wanted]
        said = {"row": rows.numpy(), "layer": layer, "pos": position.numpy(), "target_id": wanted.cpu().numpy()}
        for part, value in {**parts, "constant": zero}.items():
            directions = scale * norm.gain * _centred(value.float(), norm.centred)
            own = vocabulary.logits_of(directions, wanted[:, None])[:, 0] + (bias if part == "constant" else 0)
            targets.append(pd.DataFrame(said | {"part": part, "contribution": own.cpu().numpy()}))
            if part != "constant":
                added.append(directions)
                where.append(pd.DataFrame({"row": rows.numpy(), "layer": layer, "part": part, "pos": position.numpy()}))
        logit = vocabulary.logits_at(vocabulary.decoded(after, "norm"), wanted[:, None], "norm")[:, 0]
        targets.append(pd.DataFrame(said | {"part": "logit", "contribution": logit.float().cpu().numpy()}))
    said_of_all = vocabulary.project(torch.cat(added), decoder="none", k=k, k_bottom=k)  # in one pass over the vocabulary
    table = ends_table(pd.concat(where, ignore_index=True), said_of_all, strings, "contribution")
    of_targets = pd.concat(targets, ignore_index=True)
    settings = model.provenance | {
        "lens": lens.kind, "layers": chosen, "k": k, "target": None if target is None else strings[int(wanted[0])],
        "lens_settings": {name: value for name, value in lens.settings.items() if name not in model.provenance},
        "versions": versions(),
    }  # fmt: skip
    return LensContributions(
        table=table,
        settings=settings,
        targets=of_targets.assign(target=[strings[i] for i in of_targets["target_id"]]),
    )


def _centred(x: Tensor, centred: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centred else x
