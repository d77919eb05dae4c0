"""The picture of activation patching: what each activation brings back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.text import plain
from workbench.tokens import shown

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.activation_patching import Patching


def plot_patching(patching: Patching) -> go.Figure:
    """A heatmap a kind of site: layers by positions or heads; 1 where a patch brings the clean logit difference back."""
    from plotly.subplots import make_subplots

    table, own = patching.table, patching.settings
    kinds = list(dict.fromkeys(table["site"]))
    figure = make_subplots(rows=1, cols=len(kinds), subplot_titles=kinds, shared_yaxes=True, horizontal_spacing=0.03)
    bound = max(1.0, table["restored"].abs().max())
    for column, kind in enumerate(kinds, start=1):
        part = table[table["site"] == kind]
        by_head = part["pos"].isna().all()
        grid = part.pivot_table(index="layer", columns="head" if by_head else "pos", values="restored")
        labels = [f"head {i}" if by_head else _label(own, int(i)) for i in grid.columns]
        figure.add_heatmap(
            z=grid.to_numpy(), x=labels, y=list(grid.index), zmin=-bound, zmax=bound, colorscale="RdBu_r",
            showscale=column == 1, colorbar={"title": "restored"},
            hovertemplate=f"{kind} layer %{{y}}, %{{x}}<br>restored %{{z:.3f}}<extra></extra>", row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(type="category", tickangle=-60)
    figure.update_yaxes(title_text="layer", row=1, col=1)
    figure.update_yaxes(dtick=1 if table["layer"].nunique() <= 12 else 5)
    answers = f"logit({plain(shown(own['target']))}) - logit({plain(shown(own['versus']))})"
    figure.update_layout(
        title=f"What brings {answers} back, {own['model']}<br><sup>corrupted {own['corrupted_difference']:+.2f}, clean "
        f"{own['clean_difference']:+.2f}; tokens: corrupted, and clean where it differs</sup>",
        template="plotly_white", height=max(380, 220 + 16 * table["layer"].nunique()), margin={"t": 110},
    )  # fmt: skip
    return figure


def _label(settings: dict, position: int) -> str:
    here, clean = settings["tokens"][position], settings["clean_tokens"][position]
    other = "" if here == clean else f" ({plain(shown(clean))})"
    return f"{position} {plain(shown(here))}{other}"
