"""A result of shortcuts in plain words, made of its own numbers."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from workbench.analyses.shortcuts import Shortcuts

CHEAP_NATS = 0.1
"""What is called cheap, of a loss of a few nats."""
NULLS = {"mean": "its mean output", "zero": "nothing"}


def paragraph(result: Shortcuts) -> str:
    """What replacing the most blocks costs, by maps and by nulls, and from which block on maps are cheap."""
    own, first, n = result.settings, result.table["layer"].min(), int(result.fits["n"].min())
    where = "at all positions" if own["positions"] == "all" else "from the fifth position on"
    sentences = [
        f"{own['model']} loses {own['clean_loss']:.3f} nats a token on {own['held_out_tokens']:,} held-out tokens of "
        f"{own['corpus']!r} ({own['held_out_documents']} documents; maps are fitted on {n:,} tokens of others). Replaced in "
        f"all blocks from {first} on, {where}:"
    ]
    for mode in own["modes"]:
        rows = result.table[(result.table["mode"] == mode) & (result.table["layer"] == first)].set_index("way")
        costs = [f"{mode} by linear maps {_cost(rows.loc['map'])}"]
        costs += [f"by {null} {_cost(rows.loc[way])}" for way, null in NULLS.items() if way in rows.index]
        sentences.append(f"{', '.join(costs)}; the maps keep {rows.loc['map', 'agreement']:.0%} of the likeliest tokens.")
    cheap = [f"{mode} {_cheap_from(result.table, mode)}" for mode in own["modes"]]
    sentences.append(f"The first block from which on maps cost less than {CHEAP_NATS} nats: {', '.join(cheap)}.")
    if n < 20 * own["d_model"]:
        sentences.append(
            f"There are {n / own['d_model']:.1f} tokens of the fit for each of the {own['d_model']} numbers that a map reads, "
            "so more text may make maps cheaper (20 are advised)."
        )
    return " ".join(sentences)


def _cost(row: pd.Series) -> str:
    if not isfinite(row["change"]):
        return f"all (the stream of {row['overflowed']:.0%} of tokens overflows)"
    return f"{row['change']:+.3f} ± {row['change_error']:.3f}"


def _cheap_from(table: pd.DataFrame, mode: str) -> str:
    """The first layer from which on every measured one is cheap."""
    own = table[(table["mode"] == mode) & (table["way"] == "map")]
    dear = own.loc[own["change"] >= CHEAP_NATS, "layer"]
    cheap = own.loc[own["layer"] > (dear.max() if len(dear) else -1), "layer"]
    return str(cheap.min()) if len(cheap) else "none"
