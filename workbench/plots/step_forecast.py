"""What a step was foretold to do, against what it did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.plots.text import plain
from workbench.tokens import shown

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.step_forecast import StepForecast


def plot_step_forecast(forecast: StepForecast) -> go.Figure:
    """A point a text, a colour a group; the line is where both agree."""
    import plotly.graph_objects as go

    table = forecast.table
    ends = [float(table[["foretold", "measured"]].min().min()), float(table[["foretold", "measured"]].max().max())]
    figure = go.Figure(go.Scatter(x=ends, y=ends, mode="lines", line={"color": "#9a9a9a", "dash": "dot"}, name="as foretold"))  # pyright: ignore[reportAttributeAccessIssue]
    for group, own in table.groupby("group", sort=False):
        told = [_told(one) for one in own.to_dict("records")]
        figure.add_trace(
            go.Scatter(  # pyright: ignore[reportAttributeAccessIssue]
                x=own["foretold"], y=own["measured"], mode="markers", name=str(group), hovertext=told, marker={"size": 9},
                hovertemplate="%{hovertext}<br>foretold %{x:.3f}, measured %{y:.3f}<extra></extra>",
            )
        )  # fmt: skip
    figure.update_layout(
        title=f"A step of {forecast.settings['step']:g} on {plain(forecast.settings['model'])}: change of log p, nats",
        template="plotly_white", width=760, height=560, xaxis_title="foretold, first order", yaxis_title="measured",
    )  # fmt: skip
    return figure


def _told(one: dict[str, Any]) -> str:
    top, after = plain(shown(one["top"])), plain(shown(one["top_measured"]))
    return f"{plain(one['prompt'])} | {plain(shown(one['target']))}<br>{top} > {after}"
