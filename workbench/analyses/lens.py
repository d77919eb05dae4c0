"""What each layer already predicts: the last state that a lens makes of each state, read by the model's own norm and head.

`layer` is the block whose output is read, or in which another site lies; -1 is the state that enters the first block. Every KL
is KL(final || lens), in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.analyses.lens_reading import Reading, read_states
from workbench.artifacts import read_tables, write_tables
from workbench.capturing import capture
from workbench.errors import UnknownOption, UnknownSite
from workbench.lenses.lens import STREAM, Lens
from workbench.model import Batch, LanguageModel
from workbench.results import Result, versions
from workbench.sites import Site, depth, named_once, parse_layers, parse_sites, state
from workbench.tokens import shown

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "lens"
PRECISIONS = (1, 5, 10)


@dataclass(frozen=True, eq=False, repr=False)
class LensView(Result):
    """`table` has a row a text, site, position and rank: row, site, layer, pos, rank, token_id, token, logit, probability,
    entropy_nats, kl_to_final_nats.

    `positions` has a row a text, site and position: row, site, layer, pos, token (that stands there), entropy_nats,
    kl_to_final_nats, agrees (the likeliest token is the model's own), final_rank (of the model's likeliest token),
    surprisal_nats (-log of the probability that the model gives the lens's likeliest token), and of the target (the text's next
    token, or the one asked for): target_id, target, target_rank, target_log_probability.
    """

    positions: pd.DataFrame

    def by_layer(self) -> pd.DataFrame:
        """Means over positions: site, layer, kl_to_final_nats, entropy_nats, agreement, precision_1, precision_5, precision_10
        (how often the model's likeliest token is among so many), surprisal_nats."""
        own = self.positions
        for k in PRECISIONS:
            own = own.assign(**{f"precision_{k}": own["final_rank"] < k})
        own = own.assign(agreement=own["agrees"])
        wanted = ["kl_to_final_nats", "entropy_nats", "agreement", *(f"precision_{k}" for k in PRECISIONS), "surprisal_nats"]
        return own.groupby(["site", "layer"], sort=False)[wanted].mean().reset_index()

    def plot(self, *, row: int = 0, stride: int | None = None) -> go.Figure:
        """Layers up, tokens across, the likeliest token in each cell.

        Args:
            row: Which text.
            stride: Every so-manieth layer, the last always among them; as many as fit, if None.
        """
        from workbench.plots.lens import plot_lens

        return plot_lens(self, row, stride)

    def plot_trajectories(self, measure: str = "kl_to_final_nats", *, row: int = 0) -> go.Figure:
        """One measure by layer, a line a token.

        Args:
            measure: kl_to_final_nats, entropy_nats, surprisal_nats, target_rank or target_log_probability.
            row: Which text.
        """
        from workbench.plots.lens import plot_trajectories

        return plot_trajectories(self, measure, row)

    def plot_difference(
        self, other: LensView, measure: str = "kl_to_final_nats", *, row: int = 0, other_row: int = 0
    ) -> go.Figure:
        """What this view has more of than another: another lens on the same text, or another text of equally many tokens.

        Args:
            measure: As `plot_trajectories`.
            row, other_row: Which text of each.
        """
        from workbench.plots.lens import plot_difference

        return plot_difference(self, other, measure, row, other_row)

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
        own, first = self.settings, self.table[self.table["row"] == 0]
        best = first[(first["rank"] == 0) & (first["pos"] == first["pos"].max())]
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


def lens(
    model: LanguageModel,
    inputs: str | Sequence[str] | Batch,
    lens: Lens | None = None,
    *,
    layers: str | None = None,
    sites: str | Sequence[str] | None = None,
    k: int = 5,
    target: str | int | None = None,
) -> LensView:
    """Read every state of some texts through a lens.

    Args:
        lens: The logit lens, if None.
        layers: Blocks whose outputs are read, as `parse_layers` reads them; all, and the state before the first, if None.
        sites: Other sites of the stream, as `parse_sites` reads them (`resid_mid`), in the place of layers.
        k: How many of the likeliest tokens.
        target: Followed at every position; the next token of the text, if None (at the last position the model's likeliest
            one).
    Returns:
        With the last state always among what is read: it is the model's own output.
    Raises:
        UnknownOption: if k is not 1 or more, or both layers and sites are given.
        UnknownSite: if a site is none of the stream.
        UnknownToken: if the target is no single token.
        OtherJob: if the lens is of another model.
        NotComparable: if it has no map from a site.
        TextTooLong, LayerOutOfRange, WorkbenchError: as `capture`.
    """
    if k < 1:
        raise UnknownOption(f"k={k} tokens were asked for. Ask for one or more.")
    if lens is None:
        lens = Lens.logit(model)
    else:
        lens.require_model(model)
    followed = None if target is None else model.token_id(target)
    chosen = sites_read(model, layers, sites)
    acts = capture(model, inputs, chosen)
    mask = acts.mask.cpu()
    following = _following(acts.tokens.cpu(), mask, followed)
    found = read_states(model, lens, [acts[site][acts.mask.to(acts[site].device)] for site in chosen], chosen, following, k)
    own = model.provenance
    settings = own | {
        "lens": lens.kind, "sites": chosen, "k": k, "target": None if followed is None else model.token_strings[followed],
        "texts": inputs if isinstance(inputs, str) else None if isinstance(inputs, Batch) else list(inputs),
        "lens_settings": {name: value for name, value in lens.settings.items() if name not in own},
        "versions": versions(),
    }  # fmt: skip
    table, positions = _tables(found, chosen, acts.tokens.cpu(), mask, model)
    return LensView(table=table, settings=settings, positions=positions)


def sites_read(model: LanguageModel, layers: str | None, sites: str | Sequence[str] | None) -> list[str]:
    """The sites that a lens reads, each by its one name, in the order of the forward pass; the last state is the last of them.

    Raises:
        UnknownOption: if both are given.
        UnknownSite, LayerOutOfRange: if a site is none of the stream.
    """
    n = model.n_layers
    if sites is None:
        numbers = range(n + 1) if layers is None else [layer + 1 for layer in parse_layers(layers, n)]
        named = [state(number, n) for number in numbers]
    elif layers is not None:
        raise UnknownOption(f"layers={layers!r} and sites={sites!r}: sites say their own layers. Give one of the two.")
    else:
        named = [str(site) for site in parse_sites([sites] if isinstance(sites, str) else sites, n)]
    for site in named:
        if Site.parse(site, n).name not in STREAM:
            raise UnknownSite(f"A lens reads the stream: {', '.join(STREAM)}; {site} is none of these. Of what is added to it, "
                              "wb.lens_contributions says what it does to the logits.")  # fmt: skip
    once = dict.fromkeys([*(named_once(site, n) for site in named), state(n, n)])
    return sorted(once, key=lambda site: depth(Site.parse(site, n), n))


def layer_of(site: str) -> int:
    """As the column `layer` has it."""
    return -1 if site == "resid_pre.0" else int(site.rpartition(".")[2])


def _tables(
    found: Reading, sites: Sequence[str], tokens: Int[Tensor, "row pos"], mask: Bool[Tensor, "row pos"], model: LanguageModel
) -> tuple[pd.DataFrame, pd.DataFrame]:
    import pandas as pd

    strings = model.token_strings
    rows, columns = mask.nonzero(as_tuple=True)
    position = (mask.long().cumsum(1) - 1)[rows, columns]
    n, width = len(sites), found.top_ids.shape[-1]
    where = pd.DataFrame(
        {
            "row": rows.repeat_interleave(n).numpy(), "site": list(sites) * len(rows),
            "layer": [layer_of(site) for site in sites] * len(rows), "pos": position.repeat_interleave(n).numpy(),
        }
    )  # fmt: skip
    of_position = {"entropy_nats": found.entropy.flatten().numpy(), "kl_to_final_nats": found.kl.flatten().numpy()}
    target_ids = found.target_ids.repeat_interleave(n).tolist()
    positions = where.assign(
        token=[strings[i] for i in tokens[rows, columns].repeat_interleave(n).tolist()],
        **of_position,
        agrees=found.agrees.flatten().numpy(), final_rank=found.final_rank.flatten().numpy(),
        surprisal_nats=found.surprisal.flatten().numpy(), target_id=target_ids, target=[strings[i] for i in target_ids],
        target_rank=found.target_rank.flatten().numpy(),
        target_log_probability=found.target_log_probability.flatten().numpy(),
    )  # fmt: skip
    ids = found.top_ids.flatten().tolist()
    table = where.loc[where.index.repeat(width)].reset_index(drop=True)
    table = table.assign(
        rank=list(range(width)) * len(where), token_id=ids, token=[strings[i] for i in ids],
        logit=found.top_logits.flatten().numpy(), probability=found.top_probabilities.flatten().numpy(),
        **{name: values.repeat(width) for name, values in of_position.items()},
    )  # fmt: skip
    return table, positions


def _following(tokens: Tensor, mask: Tensor, followed: int | None) -> Tensor:
    """The target of every real token, `[token]`: the one after it, and -1 where there is none."""
    if followed is not None:
        return torch.full((int(mask.sum()),), followed)
    after = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -1)], 1)
    goes_on = torch.cat([mask[:, 1:], torch.zeros(len(mask), 1, dtype=torch.bool)], 1)
    return torch.where(goes_on, after, -1)[mask]
