"""The picture of head scores: layers by heads, one for each score."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.head_scores import HeadScores

TITLES = {
    "previous_token": "previous token",
    "induction": "induction",
    "duplicate_token": "duplicate token",
    "first_token": "first token (sink)",
    "entropy_nats": "entropy (nats)",
}


def plot_head_scores(scores: HeadScores) -> go.Figure:
    """A heatmap of layers by heads for each score; hover: the score and its null."""
    import numpy as np
    from plotly.subplots import make_subplots

    table = scores.table
    across, gap = len(TITLES), 0.06
    width = (1 - gap * (across - 1)) / across
    figure = make_subplots(rows=1, cols=across, subplot_titles=list(TITLES.values()), horizontal_spacing=gap)
    for i, score in enumerate(TITLES):
        grid, null = (table.pivot(index="layer", columns="head", values=column) for column in (score, f"{score}_null"))
        figure.add_heatmap(
            z=grid.to_numpy(), x=list(grid.columns), y=list(grid.index), customdata=null.to_numpy(),
            zmin=0, zmax=None if score == "entropy_nats" else 1, colorscale="Viridis" if score == "entropy_nats" else "Blues",
            colorbar={"x": i * (width + gap) + width, "xanchor": "left", "thickness": 8, "tickfont": {"size": 9}},
            hovertemplate=f"head %{{y}}.%{{x}}<br>{TITLES[score]} %{{z:.3f}}<br>null %{{customdata:.3f}}<extra></extra>",
            row=1, col=i + 1,
        )  # fmt: skip
        # Layers without a pattern stay as gaps: the axis counts, it does not list.
        figure.update_xaxes(title_text="head", dtick=max(1, len(grid.columns) // 8), row=1, col=i + 1)
        figure.update_yaxes(title_text="layer" if i == 0 else "", dtick=max(1, int(np.ceil(len(grid) / 15))), row=1, col=i + 1)
    figure.update_layout(
        title=f"Where heads look, {scores.settings['model']}", template="plotly_white",
        height=260 + 14 * max(12, len(set(table["layer"]))), width=260 * across,
    )  # fmt: skip
    return figure
