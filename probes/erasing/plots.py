"""Pictures of erasing: what is left, what the model misses, what comes back, and where steering leads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.plots import COLOURS
from workbench.errors import UnknownOption
from workbench.plots.text import plain
from workbench.sites import depth, parse_sites

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from probes.erasing.erasure import Erasure
    from probes.erasing.following import Followed
    from probes.erasing.scrubbing import Scrubbing
    from probes.erasing.steering import Steering

BLUE, ORANGE, GREEN = COLOURS[:3]
GREY, PALE, DARK = "#8c8c8c", "#f0f0f0", "#3d3d3d"
Z95 = 1.96
LOOKED = {
    "linear": ("linear probe", BLUE, "circle"),
    "linear_fresh": ("linear, of rows the eraser did not see", BLUE, "circle-open"),
    "mlp": ("network", ORANGE, "square"),
    "mlp_fresh": ("network, of rows the eraser did not see", ORANGE, "square-open"),
    "neighbours": ("5 nearest neighbours", GREEN, "diamond"),
}
"""Ways of looking: colour says by what, open marks that it learnt from rows which the eraser was not fitted to."""
NULLS = ("random", "shuffled")
RANKS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
"""Ticks of an axis of ranks."""


def plot_erasure(result: Erasure, what: str) -> go.Figure:
    """As `Erasure.plot`.

    Raises:
        UnknownOption: if there is no such picture, or nothing to draw in it.
    """
    known = {"leaks": _leaks, "curve": _erasure_curve, "scatter": _scatter}
    empty = {}
    if not len(result.curve):
        empty["curve"] = "inlp was not among the erasers"
    if not len(result.points):
        empty["scatter"] = "it holds no rows"
    return _chosen("erasure", what, known, empty)(result)


def plot_scrubbing(result: Scrubbing, what: str) -> go.Figure:
    """As `Scrubbing.plot`.

    Raises:
        UnknownOption: if there is no such picture, or nothing to draw in it.
    """
    known = {"bars": _bars, "curve": _scrubbing_curve, "profile": _profile}
    empty = {}
    if not len(result.curve):
        empty["curve"] = "it was made without curve=True, or without an INLP of two directions or more"
    if not _kinds(result):
        empty["profile"] = "no eraser was tried at several single sites"
    return _chosen("scrubbing", what, known, empty)(result)


def plot_followed(result: Followed) -> go.Figure:
    """Accuracy at the source and after it: untouched, erased, a random subspace erased, and what a linear map foretells."""
    own, table, figure = result.settings, result.table, _figure(1, 1)
    _band(figure, table["site"], table["erased_low"], table["erased_high"], BLUE)
    kinds = {
        "untouched": ("untouched", DARK, "solid"),
        "random": ("random subspace erased", GREY, "solid"),
        "predicted": ("foretold by a linear map", ORANGE, "dash"),
        "erased": ("erased", BLUE, "solid"),
    }
    for kind, (name, colour, dash) in kinds.items():
        more = "<br>R² of the foretold change %{customdata[2]:.3f}" if kind == "predicted" else ""
        figure.add_scatter(
            x=table["site"], y=table[kind], name=name, mode="lines+markers", marker={"size": 5},
            line={"color": colour, "dash": dash}, customdata=table[[f"{kind}_low", f"{kind}_high", "change_r2"]],
            hovertemplate=f"{name}: %{{y:.3f}} (%{{customdata[0]:.3f}} to %{{customdata[1]:.3f}}){more}<extra></extra>",
        )  # fmt: skip
    _chance(figure, own["chance"])
    figure.update_yaxes(title_text="accuracy of a linear probe")
    figure.update_xaxes(tickangle=-60, type="category")
    return _laid_out(
        figure,
        f"{plain(own['dataset'])} erased at {own['source']} of {plain(own['model'])} ({own['eraser']}, rank {own['rank']})",
        height=560, hovermode="x unified",
    )  # fmt: skip


def plot_steering(result: Steering) -> go.Figure:
    """Log odds of the second answer, and the change of loss on ordinary text, by factor."""
    own = result.settings
    second, first = (plain(repr(word)) for word in reversed(list(own["answers"].values())))
    figure = _figure(1, 2, [f"log odds of {second} against {first}", "loss on ordinary text"])
    for name, shown, colour in (("random", "random direction, as long", GREY), ("probe", "the probe's pattern", BLUE)):
        rows = result.table[result.table["direction"] == name].sort_values("factor")
        for col, column, hover in (
            (1, "odds", f"%{{y:+.2f}} nats, {second} first after %{{customdata:.0%}}"),
            (2, "loss", "%{y:+.4f} nats a token"),
        ):
            error = Z95 * rows["loss_error"] if column == "loss" else None
            figure.add_scatter(
                x=rows["factor"], y=rows[column], name=shown, legendgroup=name, showlegend=col == 1, mode="lines+markers",
                line={"color": colour}, marker={"size": 6}, customdata=rows["answers"], error_y=_error(error, colour),
                hovertemplate=f"factor %{{x:+g}}: {hover}<extra>{shown}</extra>", row=1, col=col,
            )  # fmt: skip
    figure.add_hline(y=0, line={"color": GREY, "width": 1, "dash": "dot"})
    figure.update_xaxes(title_text=f"factor (1 is a length of {own['length']:.3g})")
    figure.update_yaxes(title_text="nats", col=1)
    figure.update_yaxes(title_text="nats a token more", col=2)
    title = f"{plain(own['model'])} steered at {own['site']} along {plain(own['dataset'])}"
    return _laid_out(figure, title, height=520)


# ---- What is left in rows


def _leaks(result: Erasure) -> go.Figure:
    """A panel a site: accuracy by eraser and way of looking, with 95 %; nulls on grey."""
    own, sites = result.settings, list(dict.fromkeys(result.table["site"]))
    looked = [column for column in LOOKED if column in result.table]
    figure = _figure(len(sites), 1, sites if len(sites) > 1 else None, vertical_spacing=0.28 / len(sites))
    for at, site in enumerate(sites, 1):
        rows = result.table[result.table["site"] == site].reset_index(drop=True)
        for i, column in enumerate(looked):
            name, colour, symbol = LOOKED[column]
            low, high = rows[f"{column}_low"], rows[f"{column}_high"]
            figure.add_scatter(
                x=rows.index + 0.13 * (i - (len(looked) - 1) / 2), y=rows[column], name=name, legendgroup=column,
                showlegend=at == 1, mode="markers",
                marker={"size": 9, "color": colour, "symbol": symbol, "line": {"width": 1.5, "color": colour}},
                error_y=_error(high - rows[column], colour, rows[column] - low),
                customdata=np.stack([rows["eraser"], low, high, rows["edit"]], 1),
                hovertemplate="%{customdata[0]}: %{y:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f})<br>"
                f"%{{customdata[3]:.2%}} of the variance changed<extra>{name}</extra>", row=at, col=1,
            )  # fmt: skip
        for i in rows.index[rows["eraser"].isin(NULLS)]:
            figure.add_vrect(x0=i - 0.5, x1=i + 0.5, fillcolor=PALE, line_width=0, layer="below", row=at, col=1)
        names = [
            "untouched" if one.eraser == "none" else f"{_null(one.eraser)}<br>rank {one.rank:.4g}" for one in rows.itertuples()
        ]
        figure.update_xaxes(
            tickvals=rows.index, ticktext=names, range=[-0.5, len(rows) - 0.5], showgrid=False, zeroline=False, row=at, col=1
        )
        figure.update_yaxes(title_text="accuracy", row=at, col=1)
    _chance(figure, own["chance"])
    ends = result.table[[f"{column}_{end}" for column in looked for end in ("low", "high")]]
    figure.update_yaxes(range=[min(ends.min().min(), own["chance"]) - 0.04, min(ends.max().max() + 0.04, 1.03)])
    title = f"What is left of {plain(own['dataset'])} in {plain(own['model'])}{_at(sites)}"
    return _laid_out(figure, title, height=560 if len(sites) == 1 else 140 + 310 * len(sites))


def _erasure_curve(result: Erasure) -> go.Figure:
    """A panel a site: accuracy of a linear probe against the number of directions removed."""
    own, sites = result.settings, list(dict.fromkeys(result.curve["site"]))
    columns = min(len(sites), 3)
    rows = -(-len(sites) // columns)
    figure = _figure(rows, columns, sites if len(sites) > 1 else None, shared_yaxes=True)
    for i, site in enumerate(sites):
        for kind in ("random", "inlp"):
            some = result.curve[(result.curve["site"] == site) & (result.curve["eraser"] == kind)]
            _by_rank(figure, some, "linear", kind, ".3f", first=i == 0, row=i // columns + 1, col=i % columns + 1)
    _chance(figure, own["chance"])
    _rank_axes(figure, result.curve["rank"])
    figure.update_yaxes(title_text="accuracy of a linear probe", col=1)
    title = f"{plain(own['dataset'])} in {plain(own['model'])}{_at(sites)}: linear probe by directions removed"
    return _laid_out(figure, title, height=180 + 360 * rows)


def _scatter(result: Erasure) -> go.Figure:
    """Rows that no eraser saw, before and after, on axes of one scale; a cross at each class's mean."""
    own, table = result.settings, result.points
    kinds, labels = list(dict.fromkeys(table["eraser"])), sorted(set(table["label"]))
    columns = min(len(kinds), 3)
    titles = ["untouched" if kind == "none" else f"after {_null(kind)}" for kind in kinds]
    rows = -(-len(kinds) // columns)
    figure = _figure(
        rows, columns, titles, shared_xaxes="all", shared_yaxes="all", vertical_spacing=0.1, horizontal_spacing=0.03
    )
    for i, kind in enumerate(kinds):
        at = {"row": i // columns + 1, "col": i % columns + 1}
        for j, label in enumerate(labels):
            some = table[(table["eraser"] == kind) & (table["label"] == label)]
            name, colour = plain(str(label)), COLOURS[j % len(COLOURS)]
            figure.add_scattergl(
                x=some["first"], y=some["second"], name=name, legendgroup=name, showlegend=i == 0, mode="markers",
                marker={"size": 5, "opacity": 0.55, "color": colour}, text=[plain(str(one)) for one in some["group"]],
                hovertemplate=f"%{{text}}<extra>{name}</extra>", **at,
            )  # fmt: skip
        for j, label in enumerate(labels):
            some = table[(table["eraser"] == kind) & (table["label"] == label)]
            name, colour = plain(str(label)), COLOURS[j % len(COLOURS)]
            figure.add_scatter(
                x=[some["first"].mean()], y=[some["second"].mean()], mode="markers", showlegend=False, legendgroup=name,
                marker={"size": 13, "symbol": "x", "color": colour, "line": {"width": 1.5, "color": "white"}},
                hovertemplate=f"mean of {name}<extra></extra>", **at,
            )  # fmt: skip
    between = " and ".join(plain(str(one)) for one in own["classes"][:2])
    for i in range(len(kinds)):
        row, col = i // columns + 1, i % columns + 1
        if i + columns >= len(kinds):  # the lowest of its column
            figure.update_xaxes(showticklabels=True, title_text=f"between the means of {between}", row=row, col=col)
        if col == 1:
            figure.update_yaxes(title_text="where rows vary most across it", row=row, col=col)
    figure.update_xaxes(title_font_size=12)
    figure.update_yaxes(title_font_size=12)
    sites = list(dict.fromkeys(result.table["site"]))
    title = f"{plain(own['dataset'])} in {plain(own['model'])}{_at(sites[:1])}: rows that no eraser was fitted to"
    return _laid_out(figure, title, height=140 + 300 * rows)


# ---- What the model misses


def _bars(result: Scrubbing) -> go.Figure:
    """Loss on ordinary text and on the set's own, and the task, by way of erasing, with 95 %."""
    own, table = result.settings, result.table[::-1]
    panels = _measures(result)
    figure = _figure(1, len(panels), [title for _, title, _ in panels], shared_yaxes=True, horizontal_spacing=0.04)
    names = [_named(row) for row in table.to_dict("records")]
    colours = [GREY if str(one).startswith("random") else DARK if one == "none" else BLUE for one in table["erased"]]
    for col, (column, _, _) in enumerate(panels, 1):
        task = column == "task_accuracy"
        low, high = _interval(table, column)
        shown = [f"{value:.0%}" if task else f"{value:+.3f}" for value in table[column]]
        form, unit = (".1%", "") if task else ("+.4f", " nats a token")
        figure.add_bar(
            x=table[column], y=names, orientation="h", marker={"color": colours, "opacity": 0.85}, width=0.6, showlegend=False,
            error_x=_error(high - table[column], DARK, table[column] - low),
            customdata=np.stack([table["rank"], low, high, table["kl"], table["agreement"]], 1),
            hovertemplate=f"%{{y}}<br>%{{x:{form}}}{unit} (%{{customdata[1]:{form}}} to %{{customdata[2]:{form}}})<br>"
            "KL %{customdata[3]:.4f} nats, likeliest token kept %{customdata[4]:.1%}<extra></extra>", row=1, col=col,
        )  # fmt: skip
        ends = np.maximum(high, 0)
        most = max(float(ends.max()), 1e-3)
        figure.add_scatter(
            x=ends + 0.02 * most, y=names, text=shown, mode="text", textposition="middle right", showlegend=False,
            textfont={"size": 11, "color": DARK}, hoverinfo="skip", cliponaxis=False, row=1, col=col,
        )  # fmt: skip
        least = min(float(np.minimum(low, 0).min()), 0.0)
        figure.update_xaxes(range=[1.08 * least, most * 1.25], row=1, col=col)
        if task:
            figure.update_xaxes(tickformat=".0%", range=[0, 1.2], tickvals=[0, 0.25, 0.5, 0.75, 1], row=1, col=col)
            _chance(figure, 1 / len(own["answers"]), "a guess", vertical=True, row=1, col=col)
        else:
            figure.update_xaxes(title_text="nats a token more", row=1, col=col)
    figure.update_yaxes(ticklabelstandoff=8)
    return _laid_out(figure, _scrubbed(result), height=170 + 44 * len(table), legend=False)


def _scrubbing_curve(result: Scrubbing) -> go.Figure:
    """The same against the number of directions, of INLP's first ones and of as many random ones."""
    panels = [one for one in _measures(result) if one[0] in result.curve]
    figure = _figure(1, len(panels), [title for _, title, _ in panels], horizontal_spacing=0.08)
    for col, (column, _, form) in enumerate(panels, 1):
        for kind in ("random", "inlp"):
            some = result.curve[result.curve["erased"] == kind]
            _by_rank(figure, some, column, kind, form, first=col == 1, row=1, col=col)
        _frame(figure, result, column, 1, col)
    _rank_axes(figure, result.curve["rank"])
    return _laid_out(figure, f"{_scrubbed(result)}, direction by direction", height=520)


def _profile(result: Scrubbing) -> go.Figure:
    """The same by layer, of erasers that act at one site at a time, and of random subspaces of their sizes."""
    kinds, panels = _kinds(result), _measures(result)
    random = result.table[result.table["erased"].str.startswith("random,")].set_index(["sites", "rank"])
    figure = _figure(1, len(panels), [title for _, title, _ in panels], horizontal_spacing=0.08)
    beside: dict[tuple[Any, ...], list[str]] = {}
    for kind, rows in kinds.items():
        sizes = tuple(one for one in zip(rows["sites"], rows["rank"], strict=True) if one in random.index)
        beside.setdefault(sizes, []).append(kind)
    for col, (column, _, form) in enumerate(panels, 1):
        lines = [
            (f"random, as large as {', '.join(names)}", GREY, random.loc[list(sizes)].reset_index())
            for sizes, names in beside.items() if sizes
        ] + [(kind, COLOURS[i % len(COLOURS)], rows) for i, (kind, rows) in enumerate(kinds.items())]  # fmt: skip
        for name, colour, rows in lines:
            low, high = _interval(rows, column)
            if colour != GREY:
                _band(figure, rows["sites"], low, high, colour, row=1, col=col)
            figure.add_scatter(
                x=rows["sites"], y=rows[column], name=plain(name), legendgroup=name, showlegend=col == 1, mode="lines+markers",
                line={"color": colour}, marker={"size": 5}, customdata=np.stack([rows["rank"], low, high], 1),
                hovertemplate=f"%{{x}}, rank %{{customdata[0]}}: %{{y:{form}}} (%{{customdata[1]:{form}}} to "
                f"%{{customdata[2]:{form}}})<extra>{plain(name)}</extra>", row=1, col=col,
            )  # fmt: skip
        _frame(figure, result, column, 1, col)
    order = list(dict.fromkeys(site for rows in kinds.values() for site in rows["sites"]))
    places = _by_depth(order, result.settings)
    figure.update_xaxes(tickangle=-60, type="category", categoryorder="array", categoryarray=places)
    return _laid_out(figure, f"{_scrubbed(result)}, one site at a time", height=540)


def _kinds(result: Scrubbing) -> dict[str, pd.DataFrame]:
    """Rows of erasers at one site each, by what their names have in common, where there are several sites; by depth."""
    table = result.table
    own = table[(table["sites"] != "") & ~table["sites"].str.contains(",") & ~table["erased"].str.startswith("random,")]
    kinds: dict[str, list[int]] = {}
    for at, name, site in zip(own.index, own["erased"], own["sites"], strict=True):
        shared = re.sub(r"(^|\s+)(at)?[\s\W]*\d*$", "", str(name).replace(site, "").rstrip())
        kinds.setdefault(shared or "erased", []).append(at)
    found = {}
    for kind, rows in kinds.items():
        some = own.loc[rows].drop_duplicates("sites").set_index("sites", drop=False)
        if len(some) > 1:
            found[kind] = some.loc[_by_depth(list(some["sites"]), result.settings)].reset_index(drop=True)
    return found


def _by_depth(sites: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    n = settings["n_layers"]
    return sorted(sites, key=lambda site: depth(parse_sites([site], n)[0], n))


def _measures(result: Scrubbing) -> list[tuple[str, str, str]]:
    """Column, title, and how its numbers are written."""
    found = [("loss", "loss, ordinary text", "+.4f"), ("concept_loss", "loss, the set's texts", "+.4f")]
    if "task_accuracy" not in result.table:
        return found
    return [*found, ("task_accuracy", f"right answer (untouched {_untouched(result):.0%})", ".1%")]


def _untouched(result: Scrubbing) -> float:
    return float(result.table.set_index("erased").loc["none", "task_accuracy"])


def _frame(figure: go.Figure, result: Scrubbing, column: str, row: int, col: int) -> None:
    """The axis of one measure, and what it is of the untouched model."""
    at: dict[str, Any] = {"row": row, "col": col}
    if column != "task_accuracy":
        figure.add_hline(y=0, line={"color": GREY, "width": 1, "dash": "dot"}, **at)
        figure.update_yaxes(title_text="nats a token more" if col == 1 else None, **at)
        return
    figure.add_hline(y=_untouched(result), line={"color": DARK, "width": 1.2, "dash": "dot"}, **at)
    _chance(figure, 1 / len(result.settings["answers"]), "a guess", **at)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.08], **at)


def _scrubbed(result: Scrubbing) -> str:
    own = result.settings
    return f"{plain(own['dataset'])} erased while {plain(own['model'])} runs"


def _named(row: Mapping[str, Any]) -> str:
    if row["erased"] == "none":
        return "untouched"
    name = str(row["erased"])
    return plain(name) if "rank" in name else f"{plain(name)} (rank {row['rank']:,})"


# ---- Parts


def _chosen(
    of: str, what: str, known: Mapping[str, Callable[[Any], go.Figure]], empty: Mapping[str, str]
) -> Callable[[Any], go.Figure]:
    """
    Raises:
        UnknownOption: naming what there is.
    """
    if what not in known or what in empty:
        why = f": {empty[what]}" if what in empty else ""
        there = ", ".join(repr(name) for name in known if name not in empty)
        raise UnknownOption(f"There is no picture {what!r} of this {of}{why}. Use one of {there}.")
    return known[what]


def _figure(rows: int, cols: int, titles: Sequence[str] | None = None, **options: Any) -> go.Figure:
    from plotly.subplots import make_subplots

    figure: Any = make_subplots(rows=rows, cols=cols, subplot_titles=list(titles) if titles else None, **options)
    figure.update_annotations(font_size=14)
    return figure


def _laid_out(figure: go.Figure, title: str, *, height: int, legend: bool = True, **more: Any) -> go.Figure:
    """Legend below the title, where no picture is as wide or as high as another."""
    figure.update_layout(
        title={"text": title, "x": 0.02, "y": 1 - 14 / height, "yanchor": "top", "font": {"size": 17}},
        template="plotly_white", height=height, width=1180, showlegend=legend,
        margin={"l": 70, "r": 90, "t": 110 if legend else 90, "b": 60},
        legend={"orientation": "h", "x": 0, "y": 1 - 40 / height, "yref": "container", "yanchor": "top"}, **more,
    )  # fmt: skip
    return figure


def _chance(figure: go.Figure, chance: float, said: str = "chance", *, vertical: bool = False, **at: Any) -> None:
    note = {"text": f"{said} {chance:.2f}", "font": {"size": 11, "color": GREY}}
    line = {"color": GREY, "width": 1.4, "dash": "dash"}
    if vertical:  # below the ticks: bars lie over all that is within
        figure.add_vline(
            x=chance, line=line, annotation=note | {"y": 0, "yanchor": "top", "xanchor": "center", "yshift": -20}, **at
        )
    else:
        figure.add_hline(y=chance, line=line, annotation=note, annotation_position="right", **at)


def _band(figure: go.Figure, x: Any, low: Any, high: Any, colour: str, **at: Any) -> None:
    figure.add_scatter(
        x=[*x, *list(x)[::-1]], y=[*high, *list(low)[::-1]], fill="toself", fillcolor=colour, opacity=0.18, mode="none",
        hoverinfo="skip", showlegend=False, **at,
    )  # fmt: skip


def _by_rank(
    figure: go.Figure, rows: pd.DataFrame, column: str, kind: str, form: str, *, first: bool, row: int, col: int
) -> None:
    """A line against the rank, with its interval where there is one."""
    x, colour = np.log2(1 + rows["rank"]), GREY if kind == "random" else BLUE
    name = "random subspace" if kind == "random" else "INLP's first directions"
    if {f"{column}_error", f"{column}_low"} & set(rows):
        _band(figure, x, *_interval(rows, column), colour, row=row, col=col)
    figure.add_scatter(
        x=x, y=rows[column], name=name, legendgroup=kind, showlegend=first, mode="lines+markers", marker={"size": 6},
        line={"color": colour}, customdata=rows["rank"], row=row, col=col,
        hovertemplate=f"rank %{{customdata}}: %{{y:{form}}}<extra>{name}</extra>",
    )  # fmt: skip


def _rank_axes(figure: go.Figure, ranks: Any) -> None:
    """Logarithmic, and yet with a place for 0."""
    most = max(ranks)
    ticks = [rank for rank in RANKS if 1 + rank < 0.8 * (1 + most)] + [most]
    figure.update_xaxes(
        tickvals=np.log2(1 + np.array(ticks)), ticktext=[f"{rank:,}" for rank in ticks], title_text="directions removed",
        zeroline=False,
    )  # fmt: skip


def _interval(table: pd.DataFrame, column: str) -> tuple[Any, Any]:
    """95 %."""
    if f"{column}_low" in table:
        return table[f"{column}_low"], table[f"{column}_high"]
    error = Z95 * table[f"{column}_error"].fillna(0)
    return table[column] - error, table[column] + error


def _error(up: Any, colour: str, down: Any = None) -> dict[str, Any] | None:
    if up is None:
        return None
    both = {} if down is None else {"arrayminus": down, "symmetric": False}
    return {"type": "data", "array": up, "color": colour, "thickness": 1.3, "width": 0} | both


def _null(name: str) -> str:
    return {"random": "random subspace", "shuffled": "shuffled labels"}.get(name, name)


def _at(sites: Sequence[str]) -> str:
    return f" at {sites[0]}" if len(sites) == 1 else ""
