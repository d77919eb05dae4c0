"""The picture of a unit over a corpus: how often it has which value, and on which tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.plots.text import plain
from workbench.unit_statistics import bin_edges

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from workbench.analyses.top_activations import TopActivations

LISTED = 6
"""Examples written below the picture."""
COUNTS, TOP, QUANTILE = "#9aa3ad", "#c8702a", "#2a6fbb"


def densities(counts: np.ndarray, lowest: float, highest: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a histogram, the bins that hold tokens, where they begin and end, and their share of tokens a unit of value."""
    edges = bin_edges()
    held = np.flatnonzero(counts)
    low, high = np.maximum(edges[held], lowest), np.minimum(edges[held + 1], highest)
    return held, low, high, counts[held] / np.maximum(high - low, 1e-12) / counts.sum()


def bars(counts: np.ndarray, lowest: float, highest: float) -> Any:
    """A histogram, its bins as high as they hold tokens a unit of value."""
    import plotly.graph_objects as go

    held, low, high, density = densities(counts, lowest, highest)
    return go.Bar(  # pyright: ignore[reportAttributeAccessIssue]
        x=(low + high) / 2, y=density, width=np.maximum(high - low, 1e-12), name="tokens",
        marker={"color": COUNTS, "line": {"width": 0}},
        customdata=np.stack([counts[held], counts[held] / counts.sum(), low, high], 1),
        hovertemplate="%{customdata[2]:.3g} to %{customdata[3]:.3g}: %{customdata[0]:,} tokens (%{customdata[1]:.2%})"
        "<extra></extra>",
    )  # fmt: skip


def plot_values(counts: np.ndarray, unit: pd.Series) -> go.Figure:
    """Tokens by the value of one neuron, on a logarithmic axis."""
    import plotly.graph_objects as go

    figure = go.Figure(bars(counts, float(unit["lowest"]), float(unit["highest"])))
    figure.update_layout(
        template="plotly_white", height=320, bargap=0, xaxis_title="activation", title=f"{unit['site']}: values on text",
        yaxis={"type": "log", "title": "share of tokens, a unit of activation"},
    )  # fmt: skip
    return figure


def plot_unit(result: TopActivations, unit: pd.Series, examples: pd.DataFrame, counts: np.ndarray) -> go.Figure:
    """Tokens by value (bins widen away from zero, so that they are drawn by their number a unit of value), with the examples
    as points: hover for the text around them."""
    import plotly.graph_objects as go

    from workbench.analyses.unit_examples import in_context

    figure = go.Figure(bars(counts, float(unit["lowest"]), float(unit["highest"])))
    density = figure.data[0]["y"]
    floor = density.min() if len(density) else 1.0
    for kind, colour, name in (("quantile", QUANTILE, "examples at quantiles"), ("top", TOP, "highest tokens")):
        own = examples[examples["kind"] == kind].to_dict("records")
        figure.add_scatter(
            x=[row["activation"] for row in own], y=[floor] * len(own), mode="markers", name=name,
            marker={"color": colour, "size": 10, "line": {"color": "white", "width": 1}},
            customdata=[[plain(in_context(row)), plain(row["document_id"])] for row in own],
            hovertemplate="%{x:.3g}  %{customdata[0]}<br>%{customdata[1]}<extra></extra>",
        )  # fmt: skip
    own = result.settings
    highest = examples[examples["kind"] == "top"].head(LISTED).to_dict("records")
    best = "<br>".join(f"{row['activation']:.3g}  {plain(in_context(row, 40))}" for row in highest)
    figure.update_layout(
        title={
            "text": f"{unit['site']} {unit['index']} over {own['tokens']:,} tokens of {plain(own['corpus'])}"
            f"<sup><br>mean {unit['mean']:.3g}, std {unit['std']:.3g}, above zero on {unit['firing_rate']:.1%}</sup>"
        },
        template="plotly_white", height=560, bargap=0, margin={"b": 190}, legend={"orientation": "h", "y": 1.02, "x": 0.6},
        xaxis_title="activation", yaxis={"type": "log", "title": "share of tokens, a unit of activation"},
        annotations=[
            {"text": best, "xref": "paper", "yref": "paper", "x": 0, "y": -0.22, "yanchor": "top",
             "align": "left", "showarrow": False, "font": {"family": "monospace", "size": 11}}
        ],
    )  # fmt: skip
    return figure
