"""The picture of a clamped neuron among random ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots.text import plain
from workbench.tokens import shortened, shown

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.analyses.neuron_effect import NeuronEffect

THIS, OTHERS = "#c8702a", "#9aa3ad"


def plot_neuron_effect(effect: NeuronEffect) -> go.Figure:
    """A line a prompt: the mean change of the words' log-probability under each clamp."""
    import plotly.graph_objects as go

    own = effect.settings
    changes = effect.table.groupby(["prompt", "random", "neuron"], sort=False)["change"].mean().reset_index()
    texts = effect.generations.dropna(subset="neuron")[["prompt", "neuron", "text"]]
    changes = changes.merge(texts, on=["prompt", "neuron"])
    prompts = list(dict.fromkeys(changes["prompt"]))
    figure = go.Figure()
    for random, name, colour, size in ((True, "random neurons", OTHERS, 9), (False, "this neuron", THIS, 15)):
        drawn = changes[changes["random"] == random]
        figure.add_scatter(
            x=drawn["change"], y=[plain(shortened(prompt, 40)) for prompt in drawn["prompt"]], mode="markers", name=name,
            marker={"size": size, "color": colour, "opacity": 0.8, "symbol": "circle" if random else "diamond"},
            customdata=[(f"{own['layer']}.{row['neuron']}", plain(row["text"])) for row in drawn.to_dict("records")],
            hovertemplate="neuron %{customdata[0]}: %{x:+.3f} nats<br>… %{customdata[1]}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=0, line_color="#777", line_width=1)
    words = ", ".join(plain(shown(word)) for word in own["words"])
    figure.update_layout(
        title=f"Neuron {own['layer']}.{own['neuron']} ({own['side']}) clamped to {own['value']:g}: its words {words}",
        template="plotly_white", height=220 + 60 * len(prompts), legend={"orientation": "h", "y": 1, "yanchor": "bottom"},
        xaxis_title="mean change of its words' log-probability as the next token (nats)",
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure
