"""Where a gradient is: the length of each token's part, layers up and tokens across, a picture a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.errors import UnknownOption
from workbench.gradients.matrices import NAMES, WRITING
from workbench.plots.text import plain
from workbench.tokens import shown

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from workbench.analyses.backward_lens import BackwardLens

COLUMNS = 4
CELL_TEXT = 9
"""Letters of a word in a cell."""


def plot_backward_lens(view: BackwardLens, matrix: str | None, row: int) -> go.Figure:
    """Each matrix has its own scale of colours, that ends where the longest parts in fifty begin: a sink's would hide the rest.
    `customdata` holds layer and position of each cell.

    Raises:
        UnknownOption: for a text or a matrix that there is not.
    """
    from plotly.subplots import make_subplots

    own = view.vectors[view.vectors["row"] == row]
    there = [name for name in NAMES if name in set(own["matrix"])]
    if own.empty or (matrix is not None and matrix not in there):
        texts = view.vectors["row"].nunique()
        raise UnknownOption(f"row={row}, matrix={matrix!r}: there are {texts} texts and the matrices {', '.join(there)}.")
    drawn = there if matrix is None else [matrix]
    columns = min(COLUMNS, len(drawn))
    lines = -(-len(drawn) // columns)
    words = _words(view, row)
    figure = make_subplots(
        rows=lines, cols=columns, subplot_titles=drawn, horizontal_spacing=0.05, vertical_spacing=0.25 / lines
    )
    for i, name in enumerate(drawn):
        part = own[own["matrix"] == name]
        figure.add_trace(_heatmap(part, words, name, named=matrix is not None), row=i // columns + 1, col=i % columns + 1)
    tokens = own.drop_duplicates("pos").sort_values("pos")
    labels = [plain(shown(token)) for token in tokens["token"]]
    figure.update_xaxes(tickvals=list(tokens["pos"]), ticktext=labels, tickangle=-45)
    figure.update_yaxes(title_text="layer", col=1)
    n_layers, n_tokens = own["layer"].nunique(), len(tokens)
    height = max(180, (22 if matrix is not None else 8) * n_layers)
    figure.update_layout(
        title=f"Where the gradient is, in {plain(view.settings['model'])}: length of each token's part",
        template="plotly_white", height=160 + lines * (height + 110),
        width=max(640, 160 + 78 * n_tokens) if matrix is not None else 160 + columns * max(200, 26 * n_tokens),
    )  # fmt: skip
    return figure


def _words(view: BackwardLens, row: int) -> pd.DataFrame:
    """The words of a cell: of a derivative what a step writes and takes away, of an input its nearest."""
    table = view.table[(view.table["row"] == row)]
    table = table.assign(matrix=table["matrix"].str.split(), word=table["token"].map(shown)).explode("matrix")
    return table.sort_values("rank").groupby(["matrix", "layer", "pos", "end"])["word"].agg("  ".join).unstack("end")


def _heatmap(part: pd.DataFrame, words: pd.DataFrame, name: str, *, named: bool) -> Any:
    import numpy as np
    import plotly.graph_objects as go

    norms = part.assign(norm=part["norm"].where(~part["zero"])).pivot(index="layer", columns="pos", values="norm")
    there = norms.stack()
    highest = float(there.quantile(0.98)) if len(there) else 1.0  # a text of one token has no gradient of queries at all
    writes = name in WRITING
    first, second = ("down", "up") if writes else ("up", "down")
    kinds = ("a step writes", "and unwrites") if writes else ("nearest words", "farthest")
    told, best = [], []
    for layer in norms.index:
        cells = [words.loc[(name, layer, pos)] if (name, layer, pos) in words.index else None for pos in norms.columns]
        ends = [None if cell is None else (plain(cell[first]), plain(cell[second])) for cell in cells]
        best.append(["" if cell is None else plain(cell[first].split("  ")[0][:CELL_TEXT]) for cell in cells])
        told.append(["" if end is None else f"<br>{kinds[0]}: {end[0]}<br>{kinds[1]}: {end[1]}" for end in ends])
    places = np.array([[[layer, pos] for pos in norms.columns] for layer in norms.index])
    return go.Heatmap(  # pyright: ignore[reportAttributeAccessIssue]
        z=norms.to_numpy(), x=list(norms.columns), y=list(norms.index), customdata=places, hovertext=told, colorscale="Blues",
        zmin=0, zmax=highest, showscale=named, colorbar={"title": "|x| |δ|"},
        hoverongaps=False, hovertemplate="layer %{y}, position %{x}<br>length %{z:.3g}%{hovertext}<extra></extra>",
        **({"text": best, "texttemplate": "%{text}", "textfont": {"size": 9, "family": "monospace"}} if named else {}),
    )  # fmt: skip
