"""A result of linearity in plain words, made of its own numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from workbench.analyses.linearity import Linearity

NAMED = {"removed": "removed", "replaced": "replaced", "replaced_later": "replaced from the fifth position on"}
NAMES = {"block": "blocks", "attn": "attention layers", "mlp": "MLPs"}


def paragraph(result: Linearity) -> str:
    """What was measured on the blocks (or, without them, on the first part measured), step by step from the published number to
    what is left of it, and what replacing costs."""
    own, part = result.settings, result.table["part"].iloc[0]
    table = result.table[result.table["part"] == part]
    published, ordinary, added = _rows(table, "all", True), _rows(table, "ordinary", True), _rows(table, "ordinary", False)
    n, d = int(published["n"].iloc[0]), own["d_model"]
    special = 1 - int(ordinary["n"].iloc[0]) / n
    sentences = [
        f"{len(published)} {NAMES[part]} of {own['model']} on {n:,} tokens of {own['corpus']!r}; every number is the median "
        "over them, with the least and the greatest.",
        f"As published (all tokens, residual included, scored on the tokens of the fit), a linear map explains "
        f"{_middle(published['in_sample'])} of the variance of the stream after them.",
        f"Sinks: first positions, special and massive tokens are {special:.1%} of all and make "
        f"{_middle(published['sinks'], percent=True)} of that variance. Without them the score is "
        f"{_middle(ordinary['in_sample'])}, and on documents that the map was not fitted on {_middle(ordinary['held_out'])}.",
    ]
    if "unrelated_held_out" in ordinary:
        sentences.append(
            "Residual: the stream after contains the stream before. Were what is added taken from other documents, the score "
            f"would still be {_middle(ordinary['unrelated_held_out'])}."
        )
    null = ""
    if "null_in_sample" in added:
        null = (
            f" Chance: for what is added in other documents these are {_middle(added['null_in_sample'])} and "
            f"{_middle(added['null_held_out'])}."
        )
    sentences.append(
        f"What is left: of what they add, a map explains {_middle(added['in_sample'])} in sample and "
        f"{_middle(added['held_out'])} held out.{null}"
    )
    if n < 20 * d:
        sentences.append(
            f"There are {n / d:.1f} tokens for each of the {d} numbers of a state, too few to take in-sample scores at their "
            "word (20 are advised)."
        )
    return " ".join(sentences + (_damage(result) if result.damage is not None else []))


def _damage(result: Linearity) -> list[str]:
    own, damage = result.settings, result.damage
    assert damage is not None
    sentences = [
        f"Does the model need what a map misses? Its loss on {own['held_out_tokens']:,} held-out tokens is "
        f"{own['clean_loss']:.3f} nats a token. One block removed adds "
        f"{_middle(damage['removed'], signed=True)}; replaced by its map at all tokens "
        f"{_middle(damage['replaced'], signed=True)}, from the fifth position on "
        f"{_middle(damage['replaced_later'], signed=True)}."
    ]
    sinks = damage.loc[(damage["replaced"] - damage["replaced_later"]).idxmax()]
    if sinks["replaced"] - sinks["replaced_later"] > 2 * (sinks["replaced_error"] + sinks["replaced_later_error"]):
        sentences.append(
            f"Block {int(sinks['layer'])} does at the sinks what its map does not: {sinks['replaced']:+.3f} at all tokens, "
            f"{sinks['replaced_later']:+.3f} from the fifth position on."
        )
    if len(damage) >= 4:
        ranks = result.agreement().set_index(["score", "strata", "residual"])
        first, last = ranks.loc["in_sample", "all", True], ranks.loc["held_out", "ordinary", False]
        sentences.append(
            "Does a score tell what a block is worth? The rank correlation of 1 - score with the cost of removing it is "
            f"{_rank(first, 'removed')} by the published score and {_rank(last, 'removed')} by the held-out score of what it "
            f"adds; with the cost of replacing it there {_rank(first, 'replaced_later')} and "
            f"{_rank(last, 'replaced_later')}."
        )
    if result.together is not None:
        ways = [
            f"{NAMED[row.way]}{' (fitted on policy)' if row.on_policy else ''} {row.change:+.3f}"
            for row in result.together.itertuples()
        ]
        sentences.append(f"Blocks {', '.join(map(str, own['blocks_together']))} at once: {', '.join(ways)}.")
    return sentences


def _rows(table: pd.DataFrame, strata: str, residual: bool) -> pd.DataFrame:
    return table[(table["strata"] == strata) & (table["residual"] == residual)]


def _middle(values: pd.Series, *, signed: bool = False, percent: bool = False) -> str:
    """Median and range."""
    form = "+.3f" if signed else ".1%" if percent else ".4f" if values.median() > 0.99 else ".3f"
    return f"{values.median():{form}} ({values.min():{form}} to {values.max():{form}})"


def _rank(row: pd.Series, way: str) -> str:
    return f"{row[way]:+.2f} (p {row[f'{way}_p']:.1g})"
