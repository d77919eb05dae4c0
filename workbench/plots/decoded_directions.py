"""The picture of decoded directions: heads that write words, or both ends of each direction beside the null."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.text import plain
from workbench.tokens import shown

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.decoded_directions import DecodedDirections

DRAWN = 60
"""Directions drawn, those that stand out most first: a longer list cannot be read."""


def plot_decoded_directions(decoded: DecodedDirections) -> go.Figure:
    """Layers by heads, coloured by the share of rows beyond the null; of other directions a bar at each end, with its words."""
    return _heads(decoded) if "head" in decoded.labels else _bars(decoded)


def _heads(decoded: DecodedDirections) -> go.Figure:
    import plotly.graph_objects as go

    shares = decoded.shares()
    text = [
        f"head {row.layer}.{row.head}: {row.beyond:.0%} of its rows<br>row {row.row} stands out most, for "
        f"{plain(shown(row.word))} ({row.score:+.1f})"
        for row in shares.itertuples()
    ]
    grid = shares.assign(text=text).pivot(index="layer", columns="head", values=["beyond", "text"])
    figure = go.Figure()
    figure.add_heatmap(
        z=grid["beyond"].astype(float).to_numpy(), x=list(grid["beyond"].columns), y=list(grid.index),
        text=grid["text"].to_numpy(), hovertemplate="%{text}<extra></extra>", colorscale="Blues", zmin=0,
        colorbar={"tickformat": ".0%", "title": "share"},
    )  # fmt: skip
    figure.update_xaxes(title_text="head", dtick=max(1, grid["beyond"].shape[1] // 16))
    figure.update_yaxes(title_text="layer", dtick=max(1, len(grid) // 15))
    figure.update_layout(
        title=f"Heads that write words: {decoded.settings['model']}<br><sub>share of a head's output rows whose best word is "
        f"beyond that of {1 - decoded.summary()['null_share'].iloc[0]:.0%} of random directions</sub>",
        template="plotly_white", width=420 + 34 * grid["beyond"].shape[1], height=240 + 15 * max(12, len(grid)),
    )  # fmt: skip
    return figure


def _bars(decoded: DecodedDirections) -> go.Figure:
    import plotly.graph_objects as go

    drawn = decoded.specialised(DRAWN).sort_values("direction", ascending=False)
    names = [
        " ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row[decoded.labels] if value != "")
        for _, row in drawn.iterrows()
    ]
    figure = go.Figure()
    for end, colour in (("bottom_", "#c8702a"), ("", "#2a6fbb")):
        figure.add_bar(
            x=drawn[f"{end}score"], y=names, orientation="h", marker_color=colour, name=end.strip("_") or "top",
            text=[plain(shown(word)) for word in drawn[f"{end}word"]], textposition="outside", cliponaxis=False,
            customdata=[plain(tokens) for tokens in drawn[f"{end}tokens"]],
            hovertemplate="%{x:+.1f}<br>%{customdata}<extra></extra>",
        )  # fmt: skip
    for threshold in decoded.summary()["threshold"]:
        figure.add_vline(x=threshold, line_dash="dot", line_color="#777")
    figure.update_yaxes(title_text=", ".join(decoded.labels), type="category")
    figure.update_xaxes(title_text="score of the word that stands out most (dotted: 99 % of random directions lie within)")
    figure.update_layout(
        title=f"{decoded.settings['directions']}: {decoded.settings['model']}", template="plotly_white", barmode="overlay",
        height=200 + 24 * len(drawn), legend={"title": "end", "traceorder": "reversed"}, margin={"l": 40},
    )  # fmt: skip
    return figure
