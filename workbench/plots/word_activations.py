"""The picture of neurons and their words: by layer, does a neuron fire where its word is?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.neuron_map import COLOURS

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.word_activations import WordActivations


def plot_word_activations(result: WordActivations, target: str) -> go.Figure:
    """Median area under the ROC curve by layer (dotted: another neuron's words), above the share beyond the null."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.08,
        subplot_titles=["median area under the ROC curve (dotted: with another neuron's words)",
                        "share of neurons above 99 % of those"],
    )  # fmt: skip
    layers = result.by_layer(target)
    for side in result.settings["sides"]:
        own = layers[layers["side"] == side]
        line = {"color": COLOURS[side]}
        figure.add_scatter(
            x=own["layer"], y=own["median_auc"], name=side, legendgroup=side, mode="lines+markers", line=line,
            customdata=own["neurons"], hovertemplate=side + " layer %{x}: %{y:.3f} (%{customdata:,} neurons)<extra></extra>",
            row=1, col=1,
        )  # fmt: skip
        figure.add_scatter(
            x=own["layer"], y=own["null_median_auc"], name=f"{side}, null", legendgroup=side, showlegend=False, mode="lines",
            line=line | {"dash": "dot"}, hovertemplate=side + " null, layer %{x}: %{y:.3f}<extra></extra>", row=1, col=1,
        )  # fmt: skip
        figure.add_scatter(
            x=own["layer"], y=own["above_fraction"], name=side, legendgroup=side, showlegend=False, mode="lines+markers",
            line=line, hovertemplate=side + " layer %{x}: %{y:.1%}<extra></extra>", row=2, col=1,
        )  # fmt: skip
    figure.add_hline(y=0.01, line_dash="dot", line_color="#777", row=2, col=1)
    own = result.settings
    where = "at one of its words" if target == "current" else "at the token before one of its words"
    figure.update_xaxes(title_text="layer", row=2, col=1)
    figure.update_yaxes(title_text="AUC", row=1, col=1)
    figure.update_yaxes(title_text="share", tickformat=".0%", rangemode="tozero", row=2, col=1)
    figure.update_layout(
        title=f"Is a neuron active {where}? {own['model']}, {own['tokens']:,} tokens of {own['corpus']}",
        template="plotly_white", height=700,
    )  # fmt: skip
    return figure
