"""What each layer already predicts: the last state that a lens makes of each state, read by the model's own norm and head.

`layer` is the block whose output is read; -1 is the state that enters the first block. Every KL is KL(final || lens), in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.artifacts import read_tables, write_tables
from workbench.capturing import capture
from workbench.errors import UnknownOption
from workbench.lenses.lens import Lens
from workbench.model import Batch, LanguageModel
from workbench.results import Result, versions
from workbench.sites import parse_layers
from workbench.tokens import shown

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "lens"
PRECISIONS = (1, 5, 10)


@dataclass(frozen=True, eq=False, repr=False)
class LensView(Result):
    """`table` has a row a text, layer, position and rank: row, layer, pos, rank, token_id, token, logit, probability,
    entropy_nats, kl_to_final_nats.

    `positions` has a row a text, layer and position: token (that stands there), entropy_nats, kl_to_final_nats, agrees (the
    likeliest token is the model's own), final_rank (of the model's likeliest token), surprisal_nats (-log of the probability
    that the model gives the lens's likeliest token), and of the target (the text's next token, or the one asked for):
    target_id, target, target_rank, target_log_probability.
    """

    positions: pd.DataFrame

    def by_layer(self) -> pd.DataFrame:
        """Means over positions: layer, kl_to_final_nats, entropy_nats, agreement, precision_1, precision_5, precision_10 (how
        often the model's likeliest token is among so many), surprisal_nats."""
        own = self.positions
        for k in PRECISIONS:
            own = own.assign(**{f"precision_{k}": own["final_rank"] < k})
        own = own.assign(agreement=own["agrees"])
        wanted = ["kl_to_final_nats", "entropy_nats", "agreement", *(f"precision_{k}" for k in PRECISIONS), "surprisal_nats"]
        return own.groupby("layer")[wanted].mean().reset_index()

    def plot(self, *, row: int = 0, stride: int | None = None) -> go.Figure:
        """Layers up, tokens across, the likeliest token in each cell.

        Args:
            row: Which text.
            stride: Every so-manieth layer, the last always among them; as many as fit, if None.
        """
        from workbench.plots.lens import plot_lens

        return plot_lens(self, row, stride)

    def save(self, folder: str | Path) -> Path:
        """Write lens.parquet, positions.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return write_tables(folder, KIND, self.settings, {KIND: self.table, "positions": self.positions})

    @classmethod
    def load(cls, folder: str | Path) -> LensView:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        table, others, settings = read_tables(folder, KIND, "workbench lens", ("positions",))
        positions = others["positions"]
        assert positions is not None
        return cls(table=table, settings=settings, positions=positions)

    def __str__(self) -> str:
        own, last = self.settings, self.positions["pos"].max()
        best = self.table[(self.table["rank"] == 0) & (self.table["pos"] == last) & (self.table["row"] == 0)]
        lines = [f"{own['lens']} lens of {own['model']} at the last token", "  layer  probability    KL to final  likeliest"]
        lines += [
            f"  {row['layer']:5}  {row['probability']:11.2%}  {row['kl_to_final_nats']:13.3f}  {shown(row['token'])}"
            for row in best.to_dict("records")
        ]
        return "\n".join([*lines, "  .table .positions .by_layer() .plot() .save(folder)"])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def logit_lens(model: LanguageModel, inputs: str | Sequence[str] | Batch, **options: Any) -> LensView:
    """`lens` with every state as it is."""
    return lens(model, inputs, Lens.logit(model), **options)


@torch.no_grad()
def lens(
    model: LanguageModel,
    inputs: str | Sequence[str] | Batch,
    lens: Lens | None = None,
    *,
    layers: str | None = None,
    k: int = 5,
    target: str | int | None = None,
) -> LensView:
    """Read every state of some texts through a lens.

    Args:
        lens: The logit lens, if None.
        layers: Blocks whose outputs are read, as `parse_layers` reads them; all, and the state before the first, if None. The
            last is always among them: it is the model's own output.
        k: How many of the likeliest tokens.
        target: Followed at every position; the next token of the text, if None (at the last position the model's likeliest
            one).
    Raises:
        UnknownOption: if k is not 1 or more.
        UnknownToken: if the target is no single token.
        OtherJob: if the lens is of another model.
        TextTooLong, LayerOutOfRange, WorkbenchError: as `capture`.
    """
    import pandas as pd

    if k < 1:
        raise UnknownOption(f"k={k} tokens were asked for. Ask for one or more.")
    lens = Lens.logit(model) if lens is None else lens
    lens.require_model(model)
    followed = None if target is None else model.token_id(target)
    n = model.n_layers
    chosen = [-1, *range(n)] if layers is None else [*dict.fromkeys([*parse_layers(layers, n), n - 1])]
    sites = [("resid_pre.0" if layer < 0 else f"resid_post.{layer}") for layer in chosen]
    acts = capture(model, inputs, sites)
    vocabulary, mask = model.vocabulary, acts.mask.cpu()
    home = vocabulary.W_U.device
    real = mask.to(home)
    states = torch.stack(
        [lens.read(acts[site].to(home)[real], layer + 1) for site, layer in zip(sites, chosen, strict=True)], 1
    )  # [token, layer, d_model], the last one the model's own
    final = vocabulary.project(states[:, -1], decoder="norm", k=1)
    following = _following(acts.tokens.cpu(), mask, final.top_ids[:, 0].cpu(), followed)
    targets = torch.stack([final.top_ids[:, 0], following.to(home)], 1).repeat_interleave(len(chosen), 0)
    found = vocabulary.project(
        states.flatten(0, 1), decoder="norm", k=min(k, model.d_vocab), entropy=True, targets=targets, last_of=len(chosen)
    )
    rows, columns = mask.nonzero(as_tuple=True)
    position = (mask.long().cumsum(1) - 1)[rows, columns]
    surprisal = _surprisal(model, states[:, -1], found.top_ids[:, 0].unflatten(0, (-1, len(chosen))), final.log_normaliser)
    strings = model.token_strings
    where = {
        "row": rows.repeat_interleave(len(chosen)).numpy(), "layer": torch.tensor(chosen).repeat(len(rows)).numpy(),
        "pos": position.repeat_interleave(len(chosen)).numpy(),
    }  # fmt: skip
    assert found.target_ranks is not None
    assert found.entropy_nats is not None
    assert found.kl_nats is not None
    of_position = {"entropy_nats": found.entropy_nats.cpu().numpy(), "kl_to_final_nats": found.kl_nats.cpu().numpy()}
    target_ids = targets[:, 1].tolist()
    positions = pd.DataFrame(
        where
        | {"token": [strings[i] for i in acts.tokens.cpu()[rows, columns].repeat_interleave(len(chosen)).tolist()]}
        | of_position
        | {
            "agrees": (found.top_ids[:, 0] == targets[:, 0]).cpu().numpy(),
            "final_rank": found.target_ranks[:, 0].cpu().numpy(),
            "surprisal_nats": surprisal.cpu().numpy(), "target_id": target_ids, "target": [strings[i] for i in target_ids],
            "target_rank": found.target_ranks[:, 1].cpu().numpy(),
            "target_log_probability": found.target_log_probabilities[:, 1].cpu().numpy(),
        }
    )  # fmt: skip
    width = found.top_ids.shape[1]
    ids = found.top_ids.flatten().tolist()
    table = pd.DataFrame(
        {name: values.repeat(width) for name, values in where.items()}
        | {
            "rank": list(range(width)) * len(positions), "token_id": ids, "token": [strings[i] for i in ids],
            "logit": found.top_logits.flatten().cpu().numpy(), "probability": found.top_probabilities.flatten().cpu().numpy(),
        }
        | {name: values.repeat(width) for name, values in of_position.items()}
    )  # fmt: skip
    settings = model.provenance | {
        "lens": lens.kind, "layers": chosen, "k": k, "target": None if followed is None else strings[followed],
        "texts": inputs if isinstance(inputs, str) else None if isinstance(inputs, Batch) else list(inputs),
        "lens_settings": {name: value for name, value in lens.settings.items() if name not in model.provenance},
        "versions": versions(),
    }  # fmt: skip
    return LensView(table=table, settings=settings, positions=positions)


def _following(tokens: Tensor, mask: Tensor, final: Tensor, followed: int | None) -> Tensor:
    """The target of every real token, `[token]`."""
    if followed is not None:
        return torch.full_like(final, followed)
    rows = [row[own] for row, own in zip(tokens, mask, strict=True)]
    ends = torch.cat([torch.arange(len(row)) == len(row) - 1 for row in rows])
    return torch.where(ends, final, torch.cat([row.roll(-1) for row in rows]))


def _surprisal(model: LanguageModel, last: Tensor, ids: Tensor, normaliser: Tensor) -> Tensor:
    """-log of the probability that the model gives to some tokens at each position, `[token, layer]`, flattened."""
    vocabulary = model.vocabulary
    logits = vocabulary.logits_at(vocabulary.decoded(last, "norm"), ids, "norm")
    return (normaliser[:, None] - logits).flatten()
