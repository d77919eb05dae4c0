"""The page of a neuron: tables, coloured tokens and small drawings, in one file that needs no script and no network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.analyses.neuron_card_text import SIGNS, VALUES, number
from workbench.analyses.word_statistics import LEAST
from workbench.plots.neuron_effect import OTHERS, THIS
from workbench.plots.neuron_map import COLOURS
from workbench.plots.top_activations import densities
from workbench.tokens import shown

if TYPE_CHECKING:
    import pandas as pd

    from workbench.analyses.neuron_card import NeuronCard
    from workbench.analyses.neuron_text import NeuronText

ABOVE, BELOW = (200, 112, 42), (42, 111, 187)
"""What raises or is above zero, and what lowers or is below, as red, green and blue."""

NARROW, NUMBER = ' style="width:auto"', ' class="number"'
STYLE = """
/* Twice the class where tables are laid out: notebooks' own rules for tables are stronger than one. */
.neuron-card { color: #222; background: #fff; font: 14px/1.45 system-ui, sans-serif; max-width: 1240px; margin: 0 auto;
  padding: 16px; box-sizing: border-box }
.neuron-card * { box-sizing: border-box }
.neuron-card h1 { font-size: 22px; margin: 0 }
.neuron-card h2 { font-size: 16px; margin: 26px 0 4px; border-top: 1px solid #ddd; padding-top: 12px }
.neuron-card h3 { font-size: 14px; margin: 10px 0 4px }
.neuron-card p { margin: 2px 0 8px; color: #666; max-width: 80ch }
.neuron-card .columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 4px 24px }
.neuron-card.neuron-card table { border-collapse: collapse; width: 100%; background: none; color: inherit; font-size: 13px;
  table-layout: auto; margin: 0 }
.neuron-card.neuron-card tr { background: none }
.neuron-card.neuron-card td, .neuron-card.neuron-card th { text-align: left; padding: 2px 10px 2px 0; vertical-align: top;
  background: none; border: 0; white-space: normal; overflow-wrap: anywhere; max-width: none }
.neuron-card.neuron-card th { color: #666; font-weight: 500; white-space: nowrap }
.neuron-card.neuron-card td.number { white-space: nowrap; font-variant-numeric: tabular-nums }
.neuron-card .token { display: inline-block; padding: 0 5px; margin: 1px 2px 1px 0; border-radius: 3px; white-space: pre-wrap;
  font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere }
.neuron-card .example { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.neuron-card .example b { outline: 1px solid #222 }
.neuron-card .quiet { color: #777 }
.neuron-card .token .quiet { color: inherit; opacity: 0.75 }
.neuron-card svg { display: block; max-width: 100% }
.neuron-card .wide { overflow-x: auto }
"""


def card_page(card: NeuronCard) -> str:
    """A whole page."""
    title = escape(f"Neuron {card.name} of {card.settings['model']}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"></head>\n<body>{card_html(card)}</body></html>\n'
    )


def card_html(card: NeuronCard) -> str:
    """What stands on it, for a page or a notebook."""
    own = card.settings
    parts = [
        f"<h1>Neuron {card.name}</h1>",
        f"<p>{escape(own['model'])}: {escape(own['family'])}, {own['n_layers']} layers, {own['layer_neurons']:,} neurons in "
        "this one</p>",
        _words(card),
        _nearest(card),
    ]
    if card.text is not None:
        parts += [_values(card.text), _examples(card.text), _areas(card.text)]
    if card.logits is not None:
        parts.append(_logits(card.logits))
    if card.clamp is not None:
        parts.append(_clamp(card.clamp, own["n_random"]))
    return f'<div class="neuron-card"><style>{STYLE}</style>\n' + "\n".join(parts) + "</div>"


def _words(card: NeuronCard) -> str:
    scores, columns = card.scores.set_index(["side", "end"]), []
    for side in card.sides.to_dict("records"):
        own = card.table[card.table["side"] == side["side"]]
        largest = float(own["logit"].abs().max()) or 1.0  # a row of zeros speaks for nothing
        cells = ""
        for end in SIGNS:
            best, rows = scores.loc[(side["side"], end)], own[own["end"] == end].to_dict("records")
            chips = "".join(
                _chip(row["token"], row["logit"] / largest, f"logit {row['logit']:.3f}, probability {row['probability']:.2g}")
                for row in rows
            )
            null = number(best["null_score"], "+.1f")
            cells += f"<div>{chips}</div><p>most of all {_token(best['word'])}: {best['score']:+.1f} (null {null})</p>"
        columns.append(
            f"<div>{_side(side['side'])}<p>norm {side['norm']:.2f}, longer than {side['longer_fraction']:.0%} of its layer's"
            f"</p>{cells}</div>"
        )
    rows = [
        (f"{row['side']} and {row['other']}", f"{row['cosine']:+.2f}", _Raw(_band(row["cosine"], row["layer_low"],
         row["layer_median"], row["layer_high"], (-1.0, 1.0))))
        for row in card.cosines.to_dict("records")
    ]  # fmt: skip
    among = "the model's" if (card.scores["among"] == "model").any() else "its layer's"
    return (
        "<h2>Its words</h2><p>Tokens of the highest and lowest logits of what it reads (up, gate) and writes (down), decoder "
        f"{escape(card.settings['decoder'])}. Most of all: the word that sets it apart, by standard deviations among "
        f"{among} neurons; 99 % of random directions stay within the null.</p>"
        f'<div class="columns">{"".join(columns)}</div>'
        "<h3>Does it write what it reads?</h3><p>Cosines of its sides; grey: the middle 98 % of its layer's neurons, with "
        f"their median.</p>{_table([], rows, narrow=True)}"
    )


def _nearest(card: NeuronCard) -> str:
    nulls, columns = card.sides.set_index("side"), []
    for side, own in card.nearest.groupby("side", sort=False):
        null = nulls.loc[side]
        rows = []
        for row in own.to_dict("records"):
            cosine = _Raw(_shaded(f"{row['cosine']:+.2f}", row["cosine"], "", "span"))
            words = row["tokens"] if abs(row["cosine"]) > null["null_nearest"] else _Raw(_quiet(row["tokens"]))
            rows.append((cosine, f"{row['layer']}.{row['neuron']}", words))
        columns.append(
            f"<div>{_side(str(side))}<p>a random direction reaches {null['null_nearest_median']:.2f} in size, 99 % of them "
            f"less than {null['null_nearest']:.2f}</p>{_table(['cosine', 'neuron', 'top words'], rows)}</div>"
        )
    return (
        "<h2>The neurons most like it, and most opposite</h2>"
        "<p>By cosine, among those of all layers. Grey words: no nearer than 99 % of random directions are to one of them.</p>"
        f'<div class="columns">{"".join(columns)}</div>'
    )


def _values(text: NeuronText) -> str:
    unit = text.statistics.set_index("side").loc["down"]
    drawn = _histogram(text.histogram, float(unit["lowest"]), float(unit["highest"]))
    listed = _table(list(VALUES.values()), [tuple(f"{unit[column]:.3g}" for column in VALUES)], narrow=True)
    return (
        f"<h2>Its values on {text.settings['tokens']:,} tokens of {escape(text.settings['corpus'])}</h2>"
        f"<p>Above zero on {unit['firing_rate']:.1%}. Shares of tokens a unit of value, on a logarithmic scale.</p>"
        f"{drawn}{listed}"
    )


def _examples(text: NeuronText) -> str:
    largest = max(abs(value) for values in text.examples["values"] for value in values) or 1.0
    columns = []
    for end, own in text.examples.groupby("end", sort=False):
        rows = []
        for row in own.to_dict("records"):
            shaded = "".join(
                _shaded(token, value / largest, f"{value:.3g}", "b" if i == row["at"] else "span")
                for i, (token, value) in enumerate(zip(row["tokens"], row["values"], strict=True))
            )
            rows.append((f"{row['activation']:.3g}", _Raw(f'<div class="example">{shaded}</div>')))
        columns.append(f"<div><h3>Where it is {end}</h3>{_table([], rows)}</div>")
    return (
        "<h2>Examples</h2><p>Tokens are shaded by the neuron's own value, orange above zero and blue below; hover for the "
        f'number.</p><div class="columns">{"".join(columns)}</div>'
    )


def _areas(text: NeuronText) -> str:
    rows: list[tuple[Any, ...]] = []
    for row in text.words.to_dict("records"):
        name = f"{row['side']}, {row['end']} words", {"current": "at a word", "next": "before one"}[row["target"]]
        if row["present"] < LEAST:
            rows.append((*name, f"{row['present']:,}", _Raw(_quiet("too few")), "", ""))
        else:
            drawn = _band(row["auc"], row["null_low"], row["null_median"], row["null_high"], (0.0, 1.0))
            rows.append((*name, f"{row['present']:,}", f"{row['auc']:.3f}", _Raw(drawn), f"{row['null_neurons']}"))
    return (
        "<h2>Does it fire on its words?</h2><p>How well its own number (of the side) tells these tokens from all others: area "
        f"under the ROC curve, where 0.5 is chance. Grey: the middle 90 % with the words of other neurons of its layer, those "
        f"of {text.settings['null_neurons']} that were seen {LEAST} times.</p>"
        f"{_table(['words', 'where', 'seen', 'AUC', '0 to 1', 'others'], rows, narrow=True)}"
    )


def _logits(logits: pd.DataFrame) -> str:
    largest = float(logits["logit"].abs().max()) or 1.0
    lines = "".join(
        "<div>"
        + "".join(
            _chip(row["token"], row["logit"] / largest, f"{row['logit']:+.3g} a unit", f" {row['logit']:+.2g}")
            for row in logits[logits["end"] == end].to_dict("records")
        )
        + "</div>"
        for end in SIGNS
    )
    return (
        "<h2>What it adds to the logits directly</h2><p>One unit of the neuron, above the mean of all tokens: through its "
        "write direction and the final norm, whose scale is held at its mean over the text. What later layers make of it is "
        f"left out.</p>{lines}"
    )


def _clamp(clamp: pd.DataFrame, n_random: int) -> str:
    ends = clamp[["change", "direct", "null_low", "null_high"]].to_numpy()
    span = (min(0.0, float(ends.min())), max(0.0, float(ends.max())))
    parts = []
    for value, own in clamp.groupby("value", sort=False):
        chips = "".join(_chip(word, 0.35 if value >= 0 else -0.35, "") for word in own["words"].iloc[0])
        rows = [
            (
                row["prompt"],
                f"{row['change']:+.2f}",
                f"{row['direct']:+.2f}",
                _Raw(_band(row["change"], row["null_low"], row["null_median"], row["null_high"], span)),
                f"{row['p']:.3f}",
                _Raw(_quiet(repr(row["text_before"])[1:-1])),
                repr(row["text_after"])[1:-1],
            )
            for row in own.to_dict("records")
        ]
        columns = ["prompt", "change", "direct", f"{span[0]:+.1f} to {span[1]:+.1f} nats", "p", "goes on, as it is", "clamped"]
        parts.append(f'<h3>To {value:.3g}</h3><div>{chips}</div><div class="wide">{_table(columns, rows)}</div>')
    return (
        "<h2>Clamped at every token</h2><p>To its highest and lowest value on the text, unless another was asked for: the mean "
        "change of these words' log-probability as the next token, in nats, and how much of it is direct. Grey: the middle "
        f"90 % of {n_random} random neurons of its layer under the same clamp.</p>{''.join(parts)}"
    )


class _Raw(str):
    """HTML already, in a table of texts."""


def _table(columns: list[str], rows: Iterable[tuple[Any, ...]], *, narrow: bool = False) -> str:
    head = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in columns)}</tr>" if columns else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table{NARROW if narrow else ''}>{head}{body}</table>"


def _cell(cell: str) -> str:
    if isinstance(cell, _Raw):
        return f"<td>{cell}</td>"
    is_number = cell[:1] in "+-0123456789" and cell.strip("+-0123456789.,e") == ""
    return f"<td{NUMBER if is_number else ''}>{escape(cell)}</td>"


def _side(side: str) -> str:
    return f'<h3 style="color:{COLOURS[side]}">{side}</h3>'


def _token(token: str) -> str:
    return f'<span class="token" style="background:#eee">{escape(shown(token))}</span>'


def _chip(token: str, strength: float, title: str, after: str = "") -> str:
    style = f'style="background:{_colour(strength)}" title="{escape(title)}"'
    return f'<span class="token" {style}>{escape(shown(token))}{_quiet(after)}</span>'


def _quiet(text: str) -> str:
    return f'<span class="quiet">{escape(text)}</span>'


def _shaded(token: str, strength: float, title: str, tag: str) -> str:
    return f'<{tag} style="background:{_colour(strength)}" title="{escape(title)}">{escape(token)}</{tag}>'


def _colour(strength: float) -> str:
    """From white, at 0, to a colour that text can still be read on, at 1 or -1."""
    red, green, blue = ABOVE if strength >= 0 else BELOW
    return f"rgba({red},{green},{blue},{min(abs(strength), 1.0) * 0.6:.2f})"


def _band(value: float, low: float, median: float, high: float, span: tuple[float, float], width: int = 220) -> str:
    """A value as a mark beside the span of its null."""
    first, last = span
    scale = (width - 10) / max(last - first, 1e-12)
    x = [
        f"{5 + (min(max(one, first), last) - first) * scale:.1f}" if one == one else "" for one in (value, low, median, high, 0)
    ]
    null = ""
    if x[1]:
        null = (
            f'<line x1="{x[1]}" x2="{x[3]}" y1="9" y2="9" stroke="{OTHERS}" stroke-width="8" opacity="0.55"/>'
            f'<line x1="{x[2]}" x2="{x[2]}" y1="4" y2="14" stroke="#555"/>'
        )
    return (
        f'<svg width="{width}" height="18" viewBox="0 0 {width} 18"><line x1="5" x2="{width - 5}" y1="9" y2="9" stroke="#ddd"/>'
        f'{null}<circle cx="{x[0]}" cy="9" r="4.5" fill="{THIS}"/></svg>'
    )


def _histogram(counts: np.ndarray, lowest: float, highest: float, width: int = 900, height: int = 150) -> str:
    """Bars from the least share to the largest, by their logarithm."""
    held, low, high, density = densities(counts, lowest, highest)
    scale = width / max(highest - lowest, 1e-12)
    logs = np.log(density)
    tall = 6 + (logs - logs.min()) / max(float(np.ptp(logs)), 1e-12) * (height - 8)
    bars = "".join(
        f'<rect x="{(a - lowest) * scale:.1f}" y="{height - t:.1f}" width="{max((b - a) * scale, 0.5):.1f}" height="{t:.1f}" '
        f'fill="{OTHERS}"><title>{a:.3g} to {b:.3g}: {counts[i]:,} tokens</title></rect>'
        for i, a, b, t in zip(held.tolist(), low.tolist(), high.tolist(), tall.tolist(), strict=True)
    )
    zero = f"{min(max(-lowest * scale, 0), width):.1f}"
    return (
        f'<svg width="100%" viewBox="0 0 {width} {height + 18}" style="max-width:{width}px">{bars}'
        f'<line x1="{zero}" x2="{zero}" y1="0" y2="{height}" stroke="#222" stroke-dasharray="3 3"/>'
        f'<text x="0" y="{height + 14}" font-size="12">{lowest:.3g}</text>'
        f'<text x="{width}" y="{height + 14}" font-size="12" text-anchor="end">{highest:.3g}</text></svg>'
    )
