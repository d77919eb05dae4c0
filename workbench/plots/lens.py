"""The picture of a lens: layers up, tokens across, the likeliest token in each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.analyses.lens import layer_of
from workbench.corpus.corpus import EARLY_UNTIL
from workbench.errors import NotComparable, UnknownOption, require_one_of
from workbench.plots.text import plain
from workbench.tokens import shown

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.lens import LensView

ROWS = 16
"""Layers that are drawn, if no stride is given."""
MEASURES = {
    "kl_to_final_nats": "KL to output, nats", "entropy_nats": "entropy, nats", "surprisal_nats": "surprisal, nats",
    "target_rank": "rank of target", "target_log_probability": "log-probability of target",
}  # fmt: skip


def _row(site: str) -> str:
    """A state by its layer, another site by its name."""
    return str(layer_of(site)) if site == "resid_pre.0" or site.startswith("resid_post") else site


def plot_lens(view: LensView, row: int, stride: int | None) -> go.Figure:
    """Cells are coloured by the KL to the model's own output, white where they agree; under the cursor the best tokens. The
    last row is the model's output. `customdata` holds layer and position of each cell.

    Raises:
        UnknownOption: for a text that there is not, or a stride below 1.
    """
    import plotly.graph_objects as go

    positions = view.positions[view.positions["row"] == row]
    if positions.empty or (stride is not None and stride < 1):
        raise UnknownOption(
            f"row={row}, stride={stride}: there are {view.positions['row'].nunique()} texts; strides are 1 or more."
        )
    sites = view.settings["sites"]
    every = stride or -(-len(sites) // ROWS)
    sites = sites[(len(sites) - 1) % every :: every]
    table = view.table[(view.table["row"] == row) & view.table["site"].isin(sites)]
    told: dict[tuple[str, int], list[str]] = {}
    columns = (table[name].tolist() for name in ("site", "pos", "token", "probability"))
    for site, pos, token, share in zip(*columns, strict=True):
        told.setdefault((site, pos), []).append(plain(f"{shown(token)} {share:.1%}"))
    best = table[table["rank"] == 0].pivot(index="site", columns="pos", values="token").loc[sites]
    divergence = table[table["rank"] == 0].pivot(index="site", columns="pos", values="kl_to_final_nats").loc[sites]
    tokens = positions[positions["site"] == sites[-1]].sort_values("pos")["token"]
    highest = float(divergence.stack().quantile(0.9)) or 1.0  # embeddings may be far away from all others
    names = [_row(site) for site in sites]
    hover = [["<br>".join(told[site, pos]) for pos in best.columns] for site in sites]
    places = [[[layer_of(site), pos] for pos in best.columns] for site in sites]
    figure = go.Figure(
        go.Heatmap(  # pyright: ignore[reportAttributeAccessIssue]
            z=divergence.to_numpy(), x=list(best.columns), y=names,
            text=[[plain(shown(token)) for token in line] for line in best.to_numpy()], texttemplate="%{text}",
            textfont={"size": 10, "family": "monospace"}, hovertext=hover, customdata=places,
            hovertemplate="layer %{y}, %{x}<br>KL %{z:.3f}<br>%{hovertext}<extra></extra>",
            colorscale="Blues", zmin=0, zmax=highest, colorbar={"title": "KL to<br>output"},
        )
    )  # fmt: skip
    named = {"-1": "embedding", names[-1]: f"{names[-1]}, output"}
    figure.update_yaxes(title_text="layer", type="category", tickvals=names, ticktext=[named.get(name, name) for name in names])
    figure.update_xaxes(
        tickvals=list(best.columns), ticktext=[plain(shown(token)) for token in tokens], tickangle=-45, side="top"
    )
    figure.update_layout(
        title={"text": f"What each layer predicts: {view.settings['lens']} lens of {plain(view.settings['model'])}", "y": 0.98},
        template="plotly_white", height=170 + 26 * len(sites), width=max(620, 170 + 84 * len(best.columns)), margin={"t": 130},
    )  # fmt: skip
    return figure


def plot_trajectories(view: LensView, measure: str, row: int) -> go.Figure:
    """A line a token over layers; the first positions, where attention rests, are thin. Ranks are drawn from 1, on a
    logarithmic axis.

    Raises:
        UnknownOption: for a text or a measure that there is not.
    """
    import plotly.graph_objects as go
    from plotly.colors import sample_colorscale

    require_one_of("measure", measure, tuple(MEASURES))
    own = view.positions[view.positions["row"] == row]
    if own.empty:
        raise UnknownOption(f"row={row}: there are {view.positions['row'].nunique()} texts.")
    figure = go.Figure()
    places = sorted(own["pos"].unique())
    for pos in places:
        line = own[own["pos"] == pos]
        shade = sample_colorscale("Viridis", [0.9 * pos / max(places[-1], 1)])[0]
        token, target = shown(line["token"].iloc[0]), shown(line["target"].iloc[0])
        figure.add_scatter(
            x=[_row(site) for site in line["site"]], y=line[measure] + (measure == "target_rank"), name=plain(f"{pos} {token}"),
            mode="lines", line={"color": shade, "width": 1 if pos < EARLY_UNTIL else 2},
            hovertemplate=f"layer %{{x}}: %{{y:.3f}}<extra>after {plain(token)}, target {plain(target)}</extra>",
        )  # fmt: skip
    figure.update_yaxes(title_text=MEASURES[measure], type="log" if measure == "target_rank" else "linear")
    figure.update_xaxes(title_text="layer", type="category", nticks=20)
    figure.update_layout(
        title=f"{MEASURES[measure]} by layer: {view.settings['lens']} lens of {plain(view.settings['model'])}",
        template="plotly_white", legend={"title": "token", "font": {"family": "monospace"}}, height=460, width=900,
    )  # fmt: skip
    return figure


def plot_difference(view: LensView, other: LensView, measure: str, row: int, other_row: int) -> go.Figure:
    """The first less the second, in colours centred at zero; cells hold the likeliest token, or both where they differ.

    Raises:
        UnknownOption: for a text or a measure that there is not.
        NotComparable: if the texts have other numbers of tokens, or other sites were read.
    """
    import numpy as np
    import plotly.graph_objects as go

    require_one_of("measure", measure, tuple(MEASURES))
    sides = []
    for one, index in ((view, row), (other, other_row)):
        own = one.positions[one.positions["row"] == index].pivot(index="site", columns="pos", values=measure)
        best = one.table[(one.table["row"] == index) & (one.table["rank"] == 0)]
        tokens = one.positions[one.positions["row"] == index].drop_duplicates("pos").sort_values("pos")["token"]
        best = best.pivot(index="site", columns="pos", values="token")
        sides.append((own.reindex(one.settings["sites"]), best.reindex(one.settings["sites"]), tokens.tolist()))
    (a, best_a, tokens_a), (b, best_b, tokens_b) = sides
    if a.shape != b.shape or view.settings["sites"] != other.settings["sites"]:
        raise NotComparable(
            f"The first text has {a.shape[1]} tokens at {a.shape[0]} sites, the second {b.shape[1]} at {b.shape[0]}: cells "
            "cannot be laid over each other. Take texts of equally many tokens, and the same layers."
        )
    difference = (a - b).to_numpy()
    pairs = zip(best_a.to_numpy().flatten(), best_b.to_numpy().flatten(), strict=True)
    text = [plain(shown(x) if x == y else f"{shown(x)} | {shown(y)}") for x, y in pairs]
    across = [plain(shown(x) if x == y else f"{shown(x)} | {shown(y)}") for x, y in zip(tokens_a, tokens_b, strict=True)]
    widest = float(np.quantile(np.abs(difference), 0.98)) or 1.0
    figure = go.Figure(
        go.Heatmap(  # pyright: ignore[reportAttributeAccessIssue]
            z=difference, x=list(a.columns), y=[_row(site) for site in a.index], text=np.reshape(text, a.shape),
            texttemplate="%{text}", textfont={"size": 10, "family": "monospace"}, colorscale="RdBu", reversescale=True,
            zmid=0, zmin=-widest, zmax=widest, colorbar={"title": "first less<br>second"},
            hovertemplate="layer %{y}, %{x}<br>%{z:.3f}<br>%{text}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_yaxes(title_text="layer", type="category")
    figure.update_xaxes(tickvals=list(a.columns), ticktext=across, tickangle=-45, side="top")
    lenses = [one.settings["lens"] for one in (view, other)]
    named = lenses[0] if lenses[0] == lenses[1] else f"{lenses[0]} less {lenses[1]}"
    figure.update_layout(
        title={"text": f"{MEASURES[measure]}: {named}, {plain(view.settings['model'])}", "y": 0.98}, template="plotly_white",
        height=170 + 22 * len(a), width=max(620, 170 + 100 * a.shape[1]), margin={"t": 140},
    )  # fmt: skip
    return figure
