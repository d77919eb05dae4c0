"""What editing a fact does, by layer: a row a measure, a column a strength, a colour a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.text import plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.fact_edits import FactEdits

COLOURS = {"shift": "#c8702a", "step": "#2a6fbb", "random": "#9a9a9a"}
NAMES = {"shift": "forward-pass shift", "step": "gradient step", "random": "random direction"}


def plot_fact_edits(edits: FactEdits) -> go.Figure:
    """Shares with their standard errors over facts."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from workbench.analyses.fact_edits import MEASURES

    table, strengths = edits.by_setting(), edits.settings["strengths"]
    figure = make_subplots(
        rows=len(MEASURES), cols=len(strengths), shared_xaxes=True, shared_yaxes=True, row_titles=list(MEASURES),
        column_titles=[f"written / stream = {strength:g}" for strength in strengths], horizontal_spacing=0.03,
        vertical_spacing=0.05,
    )  # fmt: skip
    for column, strength in enumerate(strengths, 1):
        for line, measure in enumerate(MEASURES, 1):
            for method in edits.settings["methods"]:
                own = table[(table["strength"] == strength) & (table["method"] == method)].sort_values("layer")
                figure.add_trace(
                    go.Scatter(  # pyright: ignore[reportAttributeAccessIssue]
                        x=own["layer"], y=own[measure], error_y={"array": own[f"{measure}_error"], "thickness": 1},
                        name=NAMES[method], legendgroup=method, showlegend=line == column == 1,
                        line={"color": COLOURS[method]}, mode="lines+markers",
                        hovertemplate=f"{NAMES[method]}, layer %{{x}}: %{{y:.1%}}<extra></extra>",
                    ),
                    row=line, col=column,
                )  # fmt: skip
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    figure.update_xaxes(title_text="layer edited", row=len(MEASURES))
    figure.update_layout(
        title=f"Editing {edits.settings['edited']} facts that {plain(edits.settings['model'])} knows, in W_out of one layer",
        template="plotly_white", width=300 + 260 * len(strengths), height=720, legend={"orientation": "h", "y": -0.1},
    )  # fmt: skip
    return figure
