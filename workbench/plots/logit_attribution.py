"""The picture of a logit's attribution: its largest contributions, every layer's parts or heads, and the tokens read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.activations import TOKENS_SHOWN
from workbench.plots.text import plain
from workbench.tokens import shown

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from workbench.analyses.logit_attribution import Attribution

COLOURS = {"up": "#2a6fbb", "down": "#c0392b"}
"""What raises the logit, and what lowers it."""


def plot_logit_attribution(attribution: Attribution, n: int) -> go.Figure:
    """Bars of the n largest contributions beside a heatmap of layers; below them bars of source tokens, if told apart."""
    from plotly.subplots import make_subplots

    by_source = attribution.settings["by"] == "source"
    specs: list[list[dict[str, int] | None]] = [[{}, {}]]
    heights, titles = [1.0], [f"the {n} largest", "sums by layer"]
    if by_source:
        specs.append([{"colspan": 2}, None])
        heights, titles = [0.62, 0.38], [*titles, "what all heads took from each token"]
    figure = make_subplots(
        rows=len(specs), cols=2, specs=specs, row_heights=heights, column_widths=[0.45, 0.55], subplot_titles=titles,
        horizontal_spacing=0.1, vertical_spacing=0.16,
    )  # fmt: skip
    top = attribution.top(n)[::-1]
    figure.add_bar(
        x=top["contribution"], y=[plain(name) for name in top["name"]], orientation="h",
        marker_color=_colours(top["contribution"]), hovertemplate="%{y}<br>%{x:+.4f}<extra></extra>", row=1, col=1,
    )  # fmt: skip
    grid = _by_layer(attribution.table)
    largest = float(grid.abs().max().max())
    figure.add_heatmap(
        z=grid.to_numpy(), x=[str(column) for column in grid.columns], y=list(grid.index), colorscale="RdBu",
        zmin=-largest, zmax=largest, colorbar={"title": "logit", "len": heights[0], "y": 1, "yanchor": "top"},
        hovertemplate="layer %{y}, %{x}<br>%{z:+.4f}<extra></extra>", row=1, col=2,
    )  # fmt: skip
    heads = attribution.settings["by"] in ("head", "source")
    figure.update_xaxes(type="category", title_text="head, and the rest of the layer" if heads else "", row=1, col=2)
    figure.update_yaxes(title_text="layer", row=1, col=2)
    figure.update_xaxes(title_text="contribution to the logit", row=1, col=1)
    if by_source:
        tokens = attribution.by_source()
        labels = zip(tokens["source_pos"], tokens["source_token"], strict=True)
        figure.add_bar(
            x=[f"{pos} {plain(shown(token))}" for pos, token in labels], y=tokens["contribution"],
            marker_color=_colours(tokens["contribution"]), hovertemplate="%{x}<br>%{y:+.4f}<extra></extra>", row=2, col=1,
        )  # fmt: skip
        figure.update_xaxes(type="category", tickangle=-60, showticklabels=len(tokens) <= TOKENS_SHOWN, row=2, col=1)
        figure.update_yaxes(title_text="contribution", row=2, col=1)
    figure.update_layout(
        title=f"What writes the {plain(attribution.question)} = {attribution.logit:+.2f}, {attribution.settings['model']}"
        f"<br><sup>after {plain(attribution.end_of_prompt)}</sup>",
        template="plotly_white", showlegend=False, height=200 + max(24 * n, 14 * len(grid)) + 300 * by_source,
    )  # fmt: skip
    return figure


def _by_layer(table: pd.DataFrame) -> pd.DataFrame:
    """Layers by heads, where they are told apart, and parts."""
    own = table[table["layer"].notna()]
    is_head = own["part"].isin(["head", "source", "rest"])
    column = own["part"].where(~is_head, own["index"].astype("str"))
    grid = own.assign(column=column).pivot_table(index="layer", columns="column", values="contribution", aggfunc="sum")
    heads = sorted((name for name in grid.columns if name.isdigit()), key=int)
    return grid[heads + [name for name in ("mixer", "attn", "mlp", "neuron", "constant") if name in grid.columns]]


def _colours(values: pd.Series) -> list[str]:
    return [COLOURS["up" if value >= 0 else "down"] for value in values]
