"""The picture of a lens: layers up, tokens across, the likeliest token in each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.errors import UnknownOption
from workbench.plots.text import plain
from workbench.tokens import shown

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.lens import LensView

ROWS = 16
"""Layers that are drawn, if no stride is given."""


def plot_lens(view: LensView, row: int, stride: int | None) -> go.Figure:
    """Cells are coloured by the KL to the model's own output, white where they agree; under the cursor the best tokens. The
    last row is the model's output. `customdata` holds layer and position of each cell.

    Raises:
        UnknownOption: for a text that there is not, or a stride below 1.
    """
    import plotly.graph_objects as go

    positions = view.positions[view.positions["row"] == row]
    if positions.empty or (stride is not None and stride < 1):
        raise UnknownOption(
            f"row={row}, stride={stride}: there are {view.positions['row'].nunique()} texts; strides are 1 or more."
        )
    layers = sorted(positions["layer"].unique())
    every = stride or -(-len(layers) // ROWS)
    layers = layers[(len(layers) - 1) % every :: every]
    table = view.table[(view.table["row"] == row) & view.table["layer"].isin(layers)]
    told = table.assign(
        line=[f"{shown(token)} {share:.1%}" for token, share in zip(table["token"], table["probability"], strict=True)]
    )
    hover = told.groupby(["layer", "pos"])["line"].agg(lambda lines: plain("\n".join(lines)).replace("\n", "<br>")).unstack()
    best = table[table["rank"] == 0].pivot(index="layer", columns="pos", values="token")
    divergence = table[table["rank"] == 0].pivot(index="layer", columns="pos", values="kl_to_final_nats")
    tokens = positions[positions["layer"] == layers[-1]].sort_values("pos")["token"]
    highest = float(divergence.stack().quantile(0.9)) or 1.0  # embeddings may be far away from all others
    places = [[[layer, pos] for pos in best.columns] for layer in best.index]
    figure = go.Figure(
        go.Heatmap(  # pyright: ignore[reportAttributeAccessIssue]
            z=divergence.to_numpy(), x=list(best.columns), y=[str(layer) for layer in best.index],
            text=[[plain(shown(token)) for token in line] for line in best.to_numpy()], texttemplate="%{text}",
            textfont={"size": 10, "family": "monospace"}, hovertext=hover.to_numpy(), customdata=places,
            hovertemplate="layer %{y}, %{x}<br>KL %{z:.3f}<br>%{hovertext}<extra></extra>",
            colorscale="Blues", zmin=0, zmax=highest, colorbar={"title": "KL to<br>output"},
        )
    )  # fmt: skip
    named = {-1: "embedding", layers[-1]: f"{layers[-1]}, output"}
    figure.update_yaxes(
        title_text="layer", type="category", tickvals=[str(layer) for layer in layers],
        ticktext=[named.get(layer, str(layer)) for layer in layers],
    )  # fmt: skip
    figure.update_xaxes(
        tickvals=list(best.columns), ticktext=[plain(shown(token)) for token in tokens], tickangle=-45, side="top"
    )
    figure.update_layout(
        title={"text": f"What each layer predicts: {view.settings['lens']} lens of {plain(view.settings['model'])}", "y": 0.98},
        template="plotly_white", height=170 + 26 * len(layers), width=max(620, 170 + 84 * len(best.columns)), margin={"t": 130},
    )  # fmt: skip
    return figure
