"""Pictures of what was captured: lengths of states, and attention patterns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.text import plain
from workbench.tokens import shown

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.activations import Activations

TOKENS_SHOWN = 64
"""Tokens of a text whose names fit along an axis."""


def plot_norms(acts: Activations) -> go.Figure:
    """Length of the tensor at every token and site (logarithmic colour), a picture for each text."""
    import numpy as np
    from plotly.subplots import make_subplots

    table = acts.to_dataframe()
    rows = sorted(table["row"].unique())
    figure = make_subplots(
        rows=len(rows), cols=1, subplot_titles=[f"text {row}" for row in rows], vertical_spacing=0.25 / len(rows)
    )
    logs = np.log10(table["norm"].clip(lower=1e-12))
    for i, row in enumerate(rows, start=1):
        own = table[table["row"] == row]
        grid = own.pivot_table(index="site", columns="pos", values="norm", sort=False)
        names = own.drop_duplicates("pos").set_index("pos")["token"].reindex(grid.columns)
        labels = [f"{pos} {plain(shown(token))}" for pos, token in names.items()]
        figure.add_heatmap(
            z=np.log10(grid.clip(lower=1e-12).to_numpy()), x=labels, y=list(grid.index), customdata=grid.to_numpy(),
            zmin=logs.min(), zmax=logs.max(), colorscale="Viridis", colorbar={"title": "log10 norm"}, showscale=i == 1,
            hovertemplate="%{y}, token %{x}<br>norm %{customdata:.4g}<extra></extra>", row=i, col=1,
        )  # fmt: skip
        figure.update_xaxes(type="category", tickangle=-60, showticklabels=len(labels) <= TOKENS_SHOWN, row=i, col=1)
        figure.update_yaxes(type="category", row=i, col=1)
    figure.update_layout(
        title=f"Lengths of activations, {acts.model.name}", template="plotly_white",
        height=140 + len(rows) * (120 + 14 * min(len(acts), 60)),
    )  # fmt: skip
    return figure


def plot_pattern(acts: Activations, layer: int, row: int, heads: list[int]) -> go.Figure:
    """Attention weights of some heads: a row a query token, a column a key token."""
    from plotly.subplots import make_subplots

    real = acts.mask[row]
    pattern = acts[f"pattern.{layer}"][row].float()
    if acts.positions is None:
        pattern = pattern[:, real]
    pattern = pattern[..., real].cpu().numpy()
    strings = acts.model.token_strings
    keys = [f"{i} {plain(shown(strings[token]))}" for i, token in enumerate(acts.tokens[row][real].tolist())]
    queries = keys if acts.positions is None else [str(column) for column in acts.positions[row].tolist()]
    across = min(4, len(heads))
    down = -(-len(heads) // across)
    figure = make_subplots(
        rows=down, cols=across, subplot_titles=[f"head {layer}.{head}" for head in heads],
        horizontal_spacing=0.3 / (across + 2), vertical_spacing=0.35 / (down + 1),
    )  # fmt: skip
    for i, head in enumerate(heads):
        figure.add_heatmap(
            z=pattern[head], x=keys, y=queries, zmin=0, zmax=1, colorscale="Blues", showscale=i == 0,
            hovertemplate=f"head {layer}.{head}<br>%{{y}} looks at %{{x}}<br>%{{z:.3f}}<extra></extra>",
            row=i // across + 1, col=i % across + 1,
        )  # fmt: skip
    named = {"type": "category", "tickfont": {"size": 9}, "showticklabels": len(keys) <= TOKENS_SHOWN // 2}
    figure.update_xaxes(tickangle=-60, **named)
    figure.update_yaxes(autorange="reversed", **named)
    figure.update_layout(
        title=f"Attention of layer {layer}, {acts.model.name}", template="plotly_white", height=160 + 330 * down,
        width=140 + 330 * across,
    )  # fmt: skip
    return figure
