"""Pictures of transport: which pairs of states, over how many ranks, how far, and which directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.text import plain

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from workbench.analyses.transport_scores import TransportScores

KINDS = {"principal": "#2a6fbb", "unembedding": "#c8702a", "neurons": "#3a8f5c", "random": "#9a9a9a"}
OTHER = "#8f3a6b"
SYMBOLS = {"carried": "circle", "mixed": "diamond", "made": "x", "constant": "line-ns"}
METRICS = {"frobenius": "variance", "whitened": "whitened", "fisher": "output (Fisher)", "readers": "next block reads"}
HOVERED = ("held_out", "null", "efficiency", "size", "fisher", "readers")


def plot_matrix(result: TransportScores, column: str) -> go.Figure:
    """Sources down, targets across; `customdata` holds the pair as `4>8`, then the scores of `HOVERED` that there are."""
    import numpy as np
    import plotly.graph_objects as go

    square = result.matrix(column)
    others = {name: result.matrix(name) for name in HOVERED if name in result.table}
    pairs = np.array([[f"{source}>{target}" for target in square.columns] for source in square.index], dtype=object)
    told = np.dstack([pairs, *(values.to_numpy().astype(object) for values in others.values())])
    lines = "<br>".join(f"{name} %{{customdata[{i}]:.3f}}" for i, name in enumerate(others, 1))
    named = column.replace("_", " ")
    share = bool(np.nanmax(square.to_numpy()) <= 1.0)
    figure = go.Figure(
        go.Heatmap(  # pyright: ignore[reportAttributeAccessIssue]
            z=square.to_numpy(), x=square.columns, y=square.index, customdata=told, colorscale="Viridis",
            zmin=0 if share else None, zmax=1 if share else None, colorbar={"title": "R²" if column == "held_out" else named},
            hovertemplate=f"%{{customdata[0]}}<br>{lines}<extra></extra>", hoverongaps=False,
        )
    )  # fmt: skip
    figure.update_layout(
        title=f"What is carried between the states of {plain(result.settings['model'])}? {named}",
        template="plotly_white", width=760, height=680, xaxis={"title": "to state", "constrain": "domain"},
        yaxis={"title": "from state", "scaleanchor": "x", "autorange": "reversed", "constrain": "domain"},
    )  # fmt: skip
    return figure


def plot_curves(result: TransportScores, curves: pd.DataFrame) -> go.Figure:
    """A row a metric, a column a pair (the first six); R² below -0.5 is cut off."""
    from plotly.subplots import make_subplots

    drawn = curves[curves["strata"] == result.settings["strata"][0]]
    pairs = list(dict.fromkeys(drawn[["source", "target"]].itertuples(index=False, name=None)))[:6]
    metrics = list(dict.fromkeys(drawn["metric"]))
    titles = [_named(drawn, *pair) for pair in pairs]
    figure = make_subplots(
        rows=len(metrics), cols=len(pairs), shared_xaxes=True, shared_yaxes=True, column_titles=titles,
        row_titles=[METRICS.get(name, name) for name in metrics], horizontal_spacing=0.03, vertical_spacing=0.05,
    )  # fmt: skip
    lines = (
        ("best", "held_out", "best truncation, held out", "#2a6fbb", "solid"),
        ("published", "held_out", "published truncation, held out", "#c8702a", "solid"),
        ("best", "null", "shuffled documents", "#9a9a9a", "dash"),
        ("best", "ceiling", "ceiling on other documents, best slopes", "#3a8f5c", "dash"),
        ("best", "ceiling_in_sample", "ceiling as published, in sample", "#3a8f5c", "dot"),
    )
    shown: set[str] = set()
    for line, metric in enumerate(metrics, 1):
        for column, (source, target) in enumerate(pairs, 1):
            own = drawn[(drawn["metric"] == metric) & (drawn["source"] == source) & (drawn["target"] == target)]
            for truncation, score, name, colour, dash in lines:
                if score not in own or own[score].isna().all():
                    continue
                one = own[own["truncation"] == truncation]
                figure.add_scatter(
                    x=one["rank"], y=one[score], name=name, legendgroup=name, showlegend=name not in shown, mode="lines",
                    line={"color": colour, "dash": dash, "width": 2 if dash == "solid" else 1.4},
                    hovertemplate=f"rank %{{x}}: %{{y:.3f}}<extra>{name}</extra>", row=line, col=column,
                )  # fmt: skip
                shown.add(name)
    figure.update_yaxes(range=[-0.5, 1.02])
    figure.update_xaxes(title_text="rank", row=len(metrics))
    figure.update_yaxes(title_text="R²", col=1)
    figure.update_layout(
        title=f"How many dimensions carry it? {plain(result.settings['model'])}", template="plotly_white",
        height=190 + 210 * len(metrics), margin={"t": 160}, legend={"orientation": "h", "y": 1.05, "yanchor": "bottom"},
    )  # fmt: skip
    return figure


def plot_decay(result: TransportScores) -> go.Figure:
    """Held-out R² by distance: a thin line a source, coloured by its state, and the median; the null dashed."""
    import plotly.graph_objects as go
    from plotly.colors import sample_colorscale

    table = result.table[result.table["strata"] == result.settings["strata"][0]].sort_values("distance")
    figure, middle, last = go.Figure(), result.decay(), max(1, int(table["from"].max()))
    for source, own in table.groupby("from"):
        figure.add_scatter(
            x=own["distance"], y=own["held_out"], mode="lines+markers", marker={"size": 3}, name=f"from {source}",
            showlegend=False, line={"width": 1, "color": sample_colorscale("Viridis", [float(source) / last])[0]}, opacity=0.6,
            hovertemplate=f"{source}>%{{customdata}}: %{{y:.3f}}<extra></extra>", customdata=own["to"],
        )  # fmt: skip
    for name, label, dash in (("held_out", "median, held out", "solid"), ("null", "shuffled documents", "dash")):
        if name in middle:
            figure.add_scatter(
                x=middle["distance"], y=middle[name], name=label, mode="lines",
                line={"color": "#222222", "width": 2.5, "dash": dash},
            )  # fmt: skip
    figure.update_layout(
        title=f"How far is it carried? {plain(result.settings['model'])}: a line a source, dark ones early states",
        template="plotly_white", height=460, xaxis_title="distance, in blocks", yaxis_title="variance explained (R²)",
    )  # fmt: skip
    return figure


def plot_directions(result: TransportScores, directions: pd.DataFrame) -> go.Figure:
    """A panel a pair (the first six): a direction's share of the target's variance across, its R² up, both thresholds as lines;
    the verdict is the shape."""
    from plotly.subplots import make_subplots

    pairs = list(dict.fromkeys(directions[["source", "target"]].itertuples(index=False, name=None)))[:6]
    titles = [_named(directions, *pair) for pair in pairs]
    figure = make_subplots(rows=1, cols=len(pairs), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    for column, (source, target) in enumerate(pairs, 1):
        own = directions[(directions["source"] == source) & (directions["target"] == target)]
        for kind, some in own.groupby("kind", sort=False):
            verdicts = some["verdict"] if "verdict" in some else ["mixed"] * len(some)
            figure.add_scatter(
                x=some["variance_share"], y=some["r2"], mode="markers", name=str(kind), legendgroup=str(kind),
                showlegend=column == 1,
                error_y={
                    "type": "data", "symmetric": False, "array": some["high"] - some["r2"],
                    "arrayminus": some["r2"] - some["low"], "width": 0, "thickness": 0.6,
                },
                marker={
                    "color": KINDS.get(str(kind).partition("@")[0], OTHER), "size": 7, "opacity": 0.8,
                    "symbol": [SYMBOLS[one] for one in verdicts],
                },
                customdata=list(zip(some["name"], verdicts, some["active_r2"], some["active_n"], strict=True)),
                hovertemplate="%{customdata[0]}: %{y:.3f}, %{customdata[1]}<br>where active %{customdata[2]:.3f} "
                "(%{customdata[3]} tokens)<extra></extra>",
                row=1, col=column,
            )  # fmt: skip
        for name, dash in (("made_below", "dot"), ("carried_above", "dash")):
            if name in own:
                line = {"dash": dash, "color": "#666666", "width": 1}
                figure.add_hline(y=own[name].iloc[0], line=line, row=1, col=column)  # pyright: ignore[reportArgumentType]
    figure.update_xaxes(type="log", title_text="share of the variance")
    figure.update_yaxes(title_text="R², held out", col=1)
    figure.update_layout(
        title="Which directions are carried? ● carried (above dashes), ◆ mixed, × made (below dots)", template="plotly_white",
        height=520, legend={"orientation": "h", "y": -0.2},
    )  # fmt: skip
    return figure


def _named(table: pd.DataFrame, source: str, target: str) -> str:
    """A pair by its states, if it is of any."""
    one = table[(table["source"] == source) & (table["target"] == target)].iloc[0]
    return (
        f"{source} > {target}" if one["from"] is None or one["from"] != one["from"] else f"{one['from']:.0f} > {one['to']:.0f}"
    )
