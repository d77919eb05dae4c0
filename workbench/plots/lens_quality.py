"""The picture of lenses' quality: how near each layer's reading is to the output, and what stopping early would save."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.errors import require_one_of
from workbench.plots.text import plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.lens_quality import LensQuality

COLOURS = ("#7a7a7a", "#2a6fbb", "#c8702a", "#3a8f5c", "#8f3a6b", "#b3a02c")
PANELS = (
    ("kl_to_final_nats", "KL to output, nats"),
    ("agreement", "agreement with output"),
    ("bits_per_byte", "bits per byte of text"),
)


def plot_lens_quality(result: LensQuality, tokens: str) -> go.Figure:
    """A panel a measure, a line a lens with two standard errors of its KL, the null dashed; KL on a logarithmic axis (without
    the output's own, 0), bits cut at four times the null. The fourth panel: agreement against the mean number of blocks run,
    if all states were read.

    Raises:
        UnknownOption: for tokens that are neither `all` nor `ordinary`.
    """
    from plotly.subplots import make_subplots

    require_one_of("tokens", tokens, ("all", "ordinary"))
    table = result.table[result.table["tokens"] == tokens]
    null = result.null.set_index("tokens").loc[tokens]
    titles = [title for _, title in PANELS] + (["stopping early"] if result.exits is not None else [])
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles, horizontal_spacing=0.09, vertical_spacing=0.14)
    for name, colour in zip(result.settings["lenses"], COLOURS * 9, strict=False):
        own = table[table["lens"] == name]
        for place, (column, _) in enumerate(PANELS):
            error = {"type": "data", "array": 2 * own["kl_error"], "width": 0, "thickness": 1} if place == 0 else None
            drawn = own[column].where(own[column] > 0) if place == 0 else own[column]
            figure.add_scatter(
                x=own["layer"], y=drawn, name=name, legendgroup=name, showlegend=place == 0, mode="lines+markers",
                marker={"size": 4}, line={"color": colour}, error_y=error, row=1 + place // 2, col=1 + place % 2,
                hovertemplate=f"layer %{{x}}: %{{y:.3f}}<extra>{plain(name)}</extra>",
            )  # fmt: skip
        if result.exits is not None:
            curve = result.exits[result.exits["lens"] == name]
            figure.add_scatter(
                x=curve["blocks"], y=curve["agreement"], name=name, legendgroup=name, showlegend=False, mode="lines",
                line={"color": colour}, row=2, col=2, customdata=curve["threshold"],
                hovertemplate=f"%{{x:.1f}} blocks: %{{y:.1%}}, λ %{{customdata:.2f}}<extra>{plain(name)}</extra>",
            )  # fmt: skip
    for place, (column, _) in enumerate(PANELS):
        row, col = 1 + place // 2, 1 + place % 2
        figure.add_hline(y=null[column], line={"dash": "dash", "color": "#444444", "width": 1}, row=row, col=col)  # pyright: ignore[reportArgumentType]
        if column == "kl_to_final_nats":
            figure.update_yaxes(type="log", dtick=1, row=row, col=col)
        elif column == "bits_per_byte":
            figure.update_yaxes(range=[0, min(4 * null[column], table[column].max() * 1.05)], row=row, col=col)
        figure.update_xaxes(title_text="layer", row=row, col=col)
    figure.update_xaxes(title_text="mean number of blocks run", row=2, col=2)
    own = result.settings
    figure.update_layout(
        title=f"How near lenses of {plain(own['model'])} come to its output: {own['held_out_tokens']:,} held-out tokens of "
        f"{plain(own['corpus'])}, {tokens} (dashed: the mean output)",
        template="plotly_white", height=760, width=1180, legend={"orientation": "h", "y": -0.08},
    )  # fmt: skip
    return figure
