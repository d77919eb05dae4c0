"""The picture of shortcuts: what replacing a kind of sub-module costs, by the first block that is replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.text import plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.shortcuts import Shortcuts

COLOURS = {"attention": "#2a6fbb", "mlp": "#c8702a", "norms": "#3a8f5c"}
DASHES = {"map": "solid", "mean": "dash", "zero": "dot"}
NAMES = {"map": "linear maps", "mean": "mean output (null)", "zero": "nothing (null)"}
LEAST = 1e-4


def plot_shortcuts(result: Shortcuts) -> go.Figure:
    """Left the change of loss with two standard errors, on a logarithmic axis, where what is less than 1e-4 (or a gain) is
    drawn at 1e-4, its number told under the cursor, and what is infinite is a cross at the top; right how often the likeliest
    token stays."""
    import numpy as np
    from plotly.subplots import make_subplots

    own, table = result.settings, result.table.sort_values("layer")
    finite = np.isfinite(table["change"])
    table = table.assign(drawn=table["change"].clip(lower=LEAST).where(finite), top=2 * table.loc[finite, "change"].max())
    figure = make_subplots(cols=2, subplot_titles=["loss", "likeliest token"], horizontal_spacing=0.09)
    for mode, way in dict.fromkeys(zip(result.table["mode"], result.table["way"], strict=True)):
        rows, name = table[(table["mode"] == mode) & (table["way"] == way)], f"{mode}: {NAMES[way]}"
        for column, shown, error in ((1, "drawn", "change"), (2, "agreement", "agreement")):
            figure.add_scatter(
                x=rows["layer"], y=rows[shown], name=name, legendgroup=name, showlegend=column == 1,
                mode="lines+markers", marker={"size": 4},
                line={"color": COLOURS[mode], "dash": DASHES[way], "width": 2 if way == "map" else 1.4},
                error_y={"type": "data", "array": 2 * rows[f"{error}_error"], "width": 0, "thickness": 1},
                customdata=rows[["change", "kl_nats", "agreement"]],
                hovertemplate="from block %{x} on: %{customdata[0]:+.4f} nats<br>KL %{customdata[1]:.4f} nats, likeliest token "
                f"kept %{{customdata[2]:.1%}}<extra>{name}</extra>",
                row=1, col=column,
            )  # fmt: skip
        beyond = rows[rows["drawn"].isna()]
        if len(beyond):
            figure.add_scatter(
                x=beyond["layer"], y=beyond["top"], name=name, legendgroup=name, showlegend=False,
                mode="markers", marker={"symbol": "x-thin-open", "size": 9, "color": COLOURS[mode]},
                customdata=beyond["overflowed"],
                hovertemplate="from block %{x} on: the stream of %{customdata:.0%} of tokens overflows"
                f"<extra>{name}</extra>",
                row=1, col=1,
            )  # fmt: skip
    figure.update_yaxes(type="log", dtick=1, exponentformat="none", title_text="nats a token more", row=1, col=1)
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%", title_text="kept", row=1, col=2)
    figure.update_xaxes(title_text="first block replaced (to the last)")
    where = "at all positions" if own["positions"] == "all" else "from the fifth position on"
    figure.update_layout(
        title=f"Sub-modules of {plain(own['model'])} replaced {where}: {own['fit']}, on {plain(own['corpus'])}",
        template="plotly_white", height=560, legend={"orientation": "h", "y": -0.18},
    )  # fmt: skip
    return figure
