"""The picture of neurons and their words: by layer, does a neuron fire where its word is, or before it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.neuron_map import COLOURS

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.word_activations import WordActivations

WHERE = {"current": "at one of its words", "next": "at the token before one"}


def plot_word_activations(result: WordActivations) -> go.Figure:
    """Median area under the ROC curve by layer (dotted: another neuron's words), above the share beyond the null."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2, cols=2, shared_xaxes=True, shared_yaxes=True, row_heights=[0.55, 0.45], vertical_spacing=0.06,
        horizontal_spacing=0.04, subplot_titles=list(WHERE.values()),
    )  # fmt: skip
    for column, target in enumerate(WHERE, 1):
        layers = result.by_layer(target)
        for side in result.settings["sides"]:
            own = layers[layers["side"] == side]
            line = {"color": COLOURS[side]}
            shared = {"x": own["layer"], "legendgroup": side, "col": column}
            figure.add_scatter(
                y=own["median_auc"], name=side, mode="lines+markers", line=line, showlegend=column == 1, row=1,
                customdata=own["neurons"], **shared,
                hovertemplate=side + " layer %{x}: %{y:.3f} (%{customdata:,} neurons)<extra></extra>",
            )  # fmt: skip
            figure.add_scatter(
                y=own["null_median_auc"], name=f"{side}, null", showlegend=False, mode="lines", row=1,
                line=line | {"dash": "dot"}, hovertemplate=side + " null, layer %{x}: %{y:.3f}<extra></extra>", **shared,
            )  # fmt: skip
            figure.add_scatter(
                y=own["above_fraction"], name=side, showlegend=False, mode="lines+markers", line=line, row=2,
                hovertemplate=side + " layer %{x}: %{y:.1%}<extra></extra>", **shared,
            )  # fmt: skip
        figure.add_hline(y=0.01, line_dash="dot", line_color="#777", row=2, col=column)
        figure.update_xaxes(title_text="layer", row=2, col=column)
    own = result.settings
    figure.update_yaxes(title_text="median AUC (dotted: another's words)", row=1, col=1)
    figure.update_yaxes(title_text="share above 99 % of those", row=2, col=1)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=2)
    figure.update_layout(
        title=f"Is a neuron active on the words it decodes to? {own['model']}, {own['tokens']:,} tokens of {own['corpus']}",
        template="plotly_white", height=640, legend={"title": "side"},
    )  # fmt: skip
    return figure
