"""The picture of two neuron maps: by layer, how many neurons keep their words, beside the nulls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.neuron_map import COLOURS
from workbench.plots.text import plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.map_comparison import MapComparison

DASHES = {"": "solid", "rows_": "dashdot", "perturbed_": "dash", "shuffled_": "dot"}


def plot_map_comparison(comparison: MapComparison) -> go.Figure:
    """Share of neurons with the same top token by layer, above the mean overlap; a colour a side, nulls dashed."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08,
        subplot_titles=["share of neurons with the same top token", "mean rank-biased overlap of the top tokens"],
    )  # fmt: skip
    layers, named = comparison.by_layer(), comparison.compared()
    for side in comparison.settings["sides"]:
        own = layers[layers["side"] == side]
        for prefix, name in named.items():
            for row, measure, form in ((1, "same", ".1%"), (2, "rbo", ".3f")):
                figure.add_scatter(
                    x=own["layer"], y=own[f"{prefix}{measure}"], name=side if not prefix else f"{side}: {name}",
                    mode="lines" if prefix else "lines+markers", legendgroup=f"{side}{prefix}", showlegend=row == 1,
                    line={"color": COLOURS[side], "dash": DASHES[prefix], "width": 1 if prefix else 2}, marker={"size": 5},
                    hovertemplate=f"{side}, {name}, layer %{{x}}: %{{y:{form}}}<extra></extra>", row=row, col=1,
                )  # fmt: skip
    one, other = (f"{plain(own['model'])} ({own['dtype']})" for own in (comparison.settings["a"], comparison.settings["b"]))
    figure.update_xaxes(title_text="layer", row=2, col=1)
    figure.update_yaxes(range=[-0.03, 1.03])
    figure.update_yaxes(tickformat=".0%", row=1, col=1)
    figure.update_layout(title=f"Neurons that keep their words: {one} and {other}", template="plotly_white", height=760)
    return figure
