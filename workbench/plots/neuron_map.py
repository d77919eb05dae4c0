"""The picture of a neuron map: where in the model neurons speak for single words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.text import plain
from workbench.tokens import shown

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.neuron_map import NeuronMap

COLOURS = {"up": "#2a6fbb", "gate": "#c8702a", "down": "#3a8f5c"}
POINTS = 3000
"""Neurons drawn a side, best scores first: the rest would be a solid band below the null's line."""
CLEARLY = 2.0
"""Standard deviations above the null's line from which the best word of a layer is written beside its point."""


def plot_neuron_map(neurons: NeuronMap) -> go.Figure:
    """Score of each neuron's best word by layer (hover: all top tokens), above the share of neurons beyond the null."""
    from plotly.subplots import make_subplots

    sides = neurons.settings["sides"]
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.72, 0.28], vertical_spacing=0.06,
        subplot_titles=[f"the best word of a neuron (the best {POINTS:,} neurons of each side are drawn)",
                        "share of a layer's neurons above 99 % of random directions"],
    )  # fmt: skip
    summary, shares = neurons.summary().set_index("side"), neurons.shares()
    for i, side in enumerate(sides):
        own = neurons.best(side=side)
        threshold = summary.loc[side, "threshold"]
        drawn = own.nlargest(POINTS, "score")
        named = neurons.specialised(len(neurons.settings["layers"]), side=side, per_layer=1)
        named = named[named["score"] > threshold + CLEARLY]
        labelled = set(named[["layer", "neuron"]].itertuples(index=False, name=None))
        words = [
            plain(shown(token).strip("·")) if (layer, neuron) in labelled else ""
            for layer, neuron, token in drawn[["layer", "neuron", "token"]].itertuples(index=False, name=None)
        ]
        offset = (i - (len(sides) - 1) / 2) * 0.28
        figure.add_scatter(
            x=drawn["layer"] + offset, y=drawn["score"], text=words,
            customdata=drawn[["layer", "neuron"]].assign(tokens=[plain(t) for t in neurons.top_tokens_of(drawn)]),
            mode="markers+text", textposition="middle right", textfont={"size": 9, "color": COLOURS[side]},
            marker={"size": 4, "opacity": 0.55, "color": COLOURS[side]}, name=side, legendgroup=side,
            hovertemplate=f"<b>{side} %{{customdata[0]}}.%{{customdata[1]}}</b> score %{{y:.1f}}<br>%{{customdata[2]}}"
            "<extra></extra>",
            row=1, col=1,
        )  # fmt: skip
        share = shares[shares["side"] == side]
        figure.add_scatter(
            x=share["layer"], y=share["above_fraction"], mode="lines+markers", line={"color": COLOURS[side]},
            marker={"size": 5}, name=side,
            legendgroup=side, showlegend=False, hovertemplate=side + " layer %{x}: %{y:.1%}<extra></extra>", row=2, col=1,
        )  # fmt: skip
    figure.add_hline(
        y=summary["threshold"].max(), line_dash="dot", line_color="#777", row=1, col=1,
        annotation_text="99 % of random directions lie below", annotation_font_size=10, annotation_position="bottom right",
    )  # fmt: skip
    figure.add_hline(y=summary["null_fraction"].iloc[0], line_dash="dot", line_color="#777", row=2, col=1)
    figure.update_yaxes(title_text="score (standard deviations)", row=1, col=1)
    figure.update_yaxes(title_text="share", tickformat=".0%", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="layer", row=2, col=1)
    figure.update_layout(
        title=f"Neurons that speak for one word: {neurons.settings['model']}, {neurons.settings['neurons']:,} neurons",
        template="plotly_white", height=860, legend={"title": "side", "itemsizing": "constant"},
    )  # fmt: skip
    return figure
