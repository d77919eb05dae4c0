"""The picture of two neuron maps: by layer, how many neurons keep their top token, beside the nulls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workbench.plots.neuron_map import COLOURS
from workbench.plots.text import plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.map_comparison import MapComparison

DASHES = {"": "solid", "rows_": "dashdot", "perturbed_": "dash", "shuffled_": "dot"}
TICKS = np.array([0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])


def plot_map_comparison(comparison: MapComparison) -> go.Figure:
    """Share of neurons with the same top token by layer, a panel a side, with 95 % intervals; nulls dashed.

    The axis is that of log-odds, on which 97 % and 99 % are as far apart as 3 % and 1 %: nulls lie at either end. A share of 0
    or 1 is drawn half a neuron away from it.
    """
    from plotly.subplots import make_subplots

    own, layers = comparison.settings, comparison.by_layer()
    figure = make_subplots(
        rows=1, cols=len(own["sides"]), shared_yaxes=True, subplot_titles=own["sides"], horizontal_spacing=0.02
    )
    for column, side in enumerate(own["sides"], 1):
        drawn = layers[layers["side"] == side]
        for prefix, name in comparison.compared().items():
            share, low, high = (drawn[f"{prefix}{end}"].to_numpy() for end in ("same", "same_low", "same_high"))
            height = _log_odds(share, drawn["neurons"].to_numpy())
            figure.add_scatter(
                x=drawn["layer"], y=height, name=name, legendgroup=prefix, showlegend=column == 1,
                mode="lines" if prefix else "lines+markers", marker={"size": 5},
                line={"color": COLOURS[side], "dash": DASHES[prefix], "width": 1.3 if prefix else 2},
                error_y=None if prefix else _bars(height, low, high),
                customdata=np.stack([share, low, high], 1),
                hovertemplate=f"{name}, layer %{{x}}: %{{customdata[0]:.2%}} (%{{customdata[1]:.2%}} to "
                "%{customdata[2]:.2%})<extra></extra>",
                row=1, col=column,
            )  # fmt: skip
    a, b = (f"{plain(own[which]['model'])} ({own[which]['dtype']})" for which in ("a", "b"))
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(tickvals=np.log(TICKS / (1 - TICKS)), ticktext=[f"{tick:.4g}" for tick in 100 * TICKS])
    figure.update_yaxes(title_text="neurons with the same top token (%)", col=1)
    figure.update_layout(
        title=f"Neurons that keep their top token: {a} and {b}", template="plotly_white", height=560,
        legend={"orientation": "h", "y": -0.16},
    )  # fmt: skip
    return figure


def _log_odds(share: np.ndarray, n: np.ndarray) -> np.ndarray:
    inside = (share * n + 0.5) / (n + 1)
    return np.log(inside / (1 - inside))


def _bars(height: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, object]:
    """Error bars that end where an interval does; one that reaches 0 or 1 ends at the outermost tick."""
    ends = (np.log(end / (1 - end)) for end in (low.clip(TICKS[0]), high.clip(max=TICKS[-1])))
    below, above = ((end - height) * sign for end, sign in zip(ends, (-1, 1), strict=True))
    return {
        "type": "data", "symmetric": False, "array": above.clip(0), "arrayminus": below.clip(0), "width": 0, "thickness": 1,
    }  # fmt: skip
