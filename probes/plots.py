"""Pictures of a sweep: the score by layer with its controls, confusion, leading directions, and places on a map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import UnknownOption
from workbench.plots.text import plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from probes.probe_sweep import ProbeSweep

COLOURS = ("#2a6fbb", "#c8702a", "#3a8f5c", "#8f3a6b", "#b3a02c", "#5a5a5a", "#4aa3a3", "#a34a4a")
NULLS = (
    ("seen", "of words seen elsewhere", "#2a6fbb", "dot"),
    ("control", "random label of each word", "#8f3a6b", "dot"),
    ("untrained", "untrained model", "#c8702a", "solid"),
    ("shuffled", "shuffled labels", "#7a7a7a", "dash"),
)
TOOK = {"commonest class": "#b0b0b0", "mean": "#b0b0b0", "token embeddings": "#3a8f5c", "bag of embeddings": "#8fc7a3"}


def plot_sweep(result: ProbeSweep, what: str, site: str | None) -> go.Figure:
    """As `ProbeSweep.plot`.

    Raises:
        UnknownOption: if there is no such picture of this result.
    """
    numbers = result.settings["labels_are"] == "numbers"
    known: dict[str, Any] = {"layers": plot_layers}
    if numbers and result.settings["targets"] == ["latitude", "longitude"]:
        known["map"] = plot_map
    if not numbers:
        known |= {"confusion": plot_confusion, "directions": plot_directions}
    if what not in known:
        raise UnknownOption(f"There is no picture {what!r} of this sweep. Use one of {', '.join(map(repr, known))}.")
    return known[what](result) if what in ("layers", "directions") else known[what](result, site)


def plot_layers(result: ProbeSweep) -> go.Figure:
    """Above, the score with 95 % of resampled groups, its controls, and as lines what is to be had without the model's work;
    below, the compression (or the bits saved) of the online code, on a logarithmic axis."""
    from plotly.subplots import make_subplots

    m, own = result.measure, result.settings
    code = "compression" if m == "accuracy" else "bits_saved"
    titles = {"accuracy": "accuracy", "r2": "R²"}[m]
    below = {"compression": "compression of the labels", "bits_saved": "bits saved an example and target"}[code]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.68, 0.32], vertical_spacing=0.06)
    table, x = result.table, result.table["site"]
    _band(figure, table, m, "the model", COLOURS[0])
    for column, name, colour, dash in NULLS:
        if f"{column}_{m}" not in table:
            continue
        if f"{column}_{m}_low" in table:
            _band(figure, table, f"{column}_{m}", name, colour)
        else:
            figure.add_scatter(
                x=x,
                y=table[f"{column}_{m}"],
                name=name,
                mode="lines",
                line={"color": colour, "dash": dash, "width": 1.4},
                hovertemplate=f"%{{x}}: %{{y:.3f}}<extra>{name}</extra>",
                row=1,
                col=1,
            )
    for row in result.references.to_dict("records"):
        figure.add_scatter(
            x=[x.iloc[0], x.iloc[-1]],
            y=[row[m]] * 2,
            name=row["site"],
            mode="lines",
            line={"color": TOOK[row["site"]], "dash": "longdash", "width": 1.4},
            hovertemplate=f"{row[m]:.3f}<extra>{row['site']}</extra>",
            row=1,
            col=1,
        )
    for column, name, colour, dash in (
        (code, "the model", COLOURS[0], "solid"), (f"untrained_{code}", "untrained", "#c8702a", "solid"),
        (f"shuffled_{code}", "shuffled", "#7a7a7a", "dash"),
    ):  # fmt: skip
        if column in table:
            figure.add_scatter(
                x=x,
                y=table[column],
                name=name,
                mode="lines+markers",
                marker={"size": 4},
                showlegend=False,
                line={"color": colour, "dash": dash},
                hovertemplate=f"%{{x}}: %{{y:.2f}}<extra>{name}</extra>",
                row=2,
                col=1,
            )
    if code == "compression":
        figure.update_yaxes(type="log", tickvals=[1, 2, 5, 10, 20, 50, 100, 200], row=2, col=1)
    low = min(0.0, float(table[m].min())) if m == "r2" else None
    figure.update_yaxes(title_text=titles, row=1, col=1, **({} if low is None else {"range": [max(low, -0.5) - 0.03, 1.03]}))
    figure.update_yaxes(title_text=below, row=2, col=1)
    figure.update_xaxes(tickangle=-60, row=2, col=1)
    figure.update_layout(
        title=f"{plain(own['dataset'])} in {plain(own['model'])}: {own['probe']}, {own['examples']:,} examples, "
        f"{own['groups'][0]:,} groups",
        template="plotly_white", height=760, width=1180, legend={"orientation": "v", "x": 1.01, "y": 1}, hovermode="x unified",
    )  # fmt: skip
    return figure


def _band(figure: go.Figure, table: Any, column: str, name: str, colour: str) -> None:
    """A line with its interval."""
    x, low, high = table["site"], table[f"{column}_low"], table[f"{column}_high"]
    figure.add_scatter(
        x=[*x, *x[::-1]],
        y=[*high, *low[::-1]],
        fill="toself",
        fillcolor=colour,
        opacity=0.18,
        mode="none",
        hoverinfo="skip",
        showlegend=False,
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=x,
        y=table[column],
        name=name,
        mode="lines+markers",
        marker={"size": 5},
        line={"color": colour},
        customdata=np.stack([low, high], 1),
        row=1,
        col=1,
        hovertemplate="%{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})" + f"<extra>{name}</extra>",
    )


def plot_confusion(result: ProbeSweep, site: str | None) -> go.Figure:
    """The share of each class that is taken for each, in percent."""
    import plotly.graph_objects as go

    site = site or str(result.best()["site"])
    table = result.confusion(site)
    names = [plain(str(name)) for name in table.index]
    figure = go.Figure()
    figure.add_heatmap(
        z=100 * table.to_numpy(),
        x=[plain(str(name)) for name in table.columns],
        y=names,
        colorscale="Blues",
        zmin=0,
        zmax=100,
        texttemplate="%{z:.0f}",
        hovertemplate="%{y} taken for %{x}: %{z:.1f} %<extra></extra>",
        colorbar={"title": "% of the class"},
    )
    own = result.settings
    figure.update_layout(
        title=f"{plain(own['dataset'])} at {site} of {plain(own['model'])}: which class is taken for which, held out",
        template="plotly_white", width=260 + 70 * max(len(names), 5), height=220 + 50 * max(len(names), 4),
        xaxis={"title": "taken for", "side": "bottom", "type": "category"},
        yaxis={"title": "is", "autorange": "reversed", "type": "category"},
    )  # fmt: skip
    return figure


def plot_directions(result: ProbeSweep) -> go.Figure:
    """Examples along the two leading directions, which were fitted on other groups.

    Raises:
        UnknownOption: if there are none: rows of one column.
    """
    import plotly.graph_objects as go

    table = result.directions
    if table is None:
        raise UnknownOption("There are no leading directions of this sweep.")
    figure = go.Figure()
    for i, (label, some) in enumerate(table.groupby("label", sort=True)):
        figure.add_scattergl(
            x=some["first"],
            y=some["second"],
            name=plain(str(label)),
            mode="markers",
            text=some["group"].map(plain),
            marker={"size": 4, "opacity": 0.6, "color": COLOURS[i % len(COLOURS)]},
            hovertemplate=f"%{{text}}<extra>{plain(str(label))}</extra>",
        )
    own = result.settings
    figure.update_layout(
        title=f"{plain(own['dataset'])} at {result.best()['site']} of {plain(own['model'])}: half of the groups along two "
        "directions fitted on the other half",
        template="plotly_white", width=900, height=700, xaxis_title="first direction", yaxis_title="second direction",
    )  # fmt: skip
    return figure


def plot_map(result: ProbeSweep, site: str | None) -> go.Figure:
    """Where places lie, and where a probe that did not see their country puts them; a place has one colour in both, its
    longitude as the hue and its latitude as the lightness."""
    from plotly.subplots import make_subplots

    site = site or str(result.best()["site"])
    table = result.at(site)
    row = result.table[result.table["site"] == site].iloc[0]
    away = f", median {row['median_km']:,.0f} km away" if "median_km" in row else ""
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=["where they lie", f"where the probe puts them: R² {row['r2']:.2f}{away}"],
        horizontal_spacing=0.05,
    )
    hue, light = (table["longitude"] + 180) % 360, 35 + 30 * (table["latitude"] + 60) / 130
    colours = [f"hsl({h:.0f},70%,{min(max(one, 20), 75):.0f}%)" for h, one in zip(hue, light, strict=True)]
    for col, end in ((1, ""), (2, "_predicted")):
        figure.add_scattergl(
            x=table[f"longitude{end}"],
            y=table[f"latitude{end}"],
            mode="markers",
            text=table["group"].map(plain),
            marker={"size": 4, "color": colours},
            showlegend=False,
            row=1,
            col=col,
            hovertemplate="%{text}: %{y:.0f}, %{x:.0f}<extra></extra>",
        )
    for axis, end, most in (("longitude", 180, 60), ("latitude", 85, 30)):
        drawn = table[[axis, f"{axis}_predicted"]].abs().max().max()
        update = figure.update_xaxes if axis == "longitude" else figure.update_yaxes
        update(range=[-max(end, drawn), max(end, drawn)], title_text=axis, dtick=most)
    own = result.settings
    figure.update_layout(
        title=f"{plain(own['dataset'])} at {site} of {plain(own['model'])}: {own['groups'][0]} groups, each held out",
        template="plotly_white", width=1400, height=560,
    )  # fmt: skip
    return figure
