"""The picture of linearity: by layer, the published score and what is left of it, and what replacing a block costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.analyses.linearity_text import NAMED
from workbench.plots.text import plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.linearity import Linearity

LINES = (
    ("all", True, "in_sample", "as published: all tokens, residual, in sample", "#9a9a9a", "dot"),
    ("ordinary", True, "in_sample", "ordinary tokens, residual, in sample", "#7fb0de", "dot"),
    ("ordinary", True, "held_out", "… held out", "#2a6fbb", "solid"),
    ("ordinary", True, "unrelated_held_out", "… if what is added were unrelated", "#2a6fbb", "dash"),
    ("ordinary", False, "in_sample", "what is added, in sample", "#e0a878", "dot"),
    ("ordinary", False, "held_out", "… held out", "#c8702a", "solid"),
    ("ordinary", False, "null_held_out", "… of another document (null)", "#c8702a", "dash"),
)
"""Strata, residual, column, name, colour, dash."""
WAYS = {"removed": "#444444", "replaced": "#8f3a6b", "replaced_later": "#3a8f5c"}
TITLES = {"block": "blocks", "attn": "attention", "mlp": "MLPs"}


def plot_linearity(result: Linearity) -> go.Figure:
    """A panel a part, scores below -0.2 cut off; and one of the change of loss, with two standard errors, if measured:
    on a logarithmic axis, where what is less than 1e-4 (or a gain) is drawn at 1e-4; its number is told under the cursor."""
    from plotly.subplots import make_subplots

    parts = list(dict.fromkeys(result.table["part"]))
    damage, own = result.damage, result.settings
    titles = [TITLES[part] for part in parts] + ([] if damage is None else ["loss, one block changed"])
    places = [(1 + i // 2, 1 + i % 2) for i in range(len(titles))]
    figure = make_subplots(
        rows=places[-1][0], cols=min(2, len(titles)), subplot_titles=titles, horizontal_spacing=0.08, vertical_spacing=0.12
    )
    for (line, column), part in zip(places, parts, strict=False):
        table = result.table[result.table["part"] == part]
        for strata, residual, score, name, colour, dash in LINES:
            if score not in table:
                continue
            drawn = table[(table["strata"] == strata) & (table["residual"] == residual)]
            figure.add_scatter(
                x=drawn["layer"], y=drawn[score], name=name, legendgroup=f"{strata}{residual}{score}",
                showlegend=part == parts[0],
                mode="lines", line={"color": colour, "dash": dash, "width": 2 if dash == "solid" else 1.4},
                hovertemplate=f"layer %{{x}}: %{{y:.4f}}<extra>{name}</extra>", row=line, col=column,
            )  # fmt: skip
        figure.update_yaxes(range=[-0.2, 1.02], row=line, col=column)
    figure.update_yaxes(title_text="share of variance explained (R²)", col=1)
    if damage is not None:
        for way, colour in WAYS.items():
            figure.add_scatter(
                x=damage["layer"], y=damage[way].clip(lower=1e-4), name=NAMED[way],
                mode="lines+markers", marker={"size": 4}, line={"color": colour, "width": 1.4},
                error_y={"type": "data", "array": 2 * damage[f"{way}_error"], "width": 0, "thickness": 1},
                customdata=damage[way], hovertemplate="layer %{x}: %{customdata:+.4f} nats<extra>" + way + "</extra>",
                row=places[-1][0], col=places[-1][1],
            )  # fmt: skip
        figure.update_yaxes(type="log", title_text="nats a token more", row=places[-1][0], col=places[-1][1])
    figure.update_xaxes(title_text="layer")
    figure.update_layout(
        title=f"How linear is {plain(own['model'])}? {own['fit']}, on {plain(own['corpus'])}",
        template="plotly_white", height=140 + 380 * places[-1][0], legend={"orientation": "h", "y": -0.28 / places[-1][0]},
    )  # fmt: skip
    return figure
