"""Two neuron maps side by side: are they of the same neurons, words and way of decoding, and which lists belong together?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from workbench.analyses.neuron_map import SIDES, NeuronMap, Side
from workbench.analyses.rank_overlap import rank_biased_overlap
from workbench.errors import NotComparable
from workbench.sites import parse_layers, ranges
from workbench.tokens import fold

if TYPE_CHECKING:
    import pandas as pd

ALIKE = ("part", "reading", "decoder")
MOST_OTHER = 0.01
"""Share of token ids that may stand for other strings: chat models name a few reserved tokens anew."""


MEASURES = ("same", "same_folded", "rbo", "rbo_bottom")


@dataclass(frozen=True, eq=False)
class Lists:
    """Best and worst tokens, a row a neuron."""

    top: Int[np.ndarray, "neuron k"]
    bottom: Int[np.ndarray, "neuron k"]
    folded: Int[np.ndarray, " d_vocab"]
    """A number for every token id, the same for tokens that are one word, in both maps."""

    def of(self, rows: Int[np.ndarray, " rows"]) -> Lists:
        """Those of some neurons."""
        return Lists(self.top[rows], self.bottom[rows], self.folded)


def agreement(prefix: str, a: Lists, b: Lists) -> dict[str, np.ndarray]:
    """How alike each row of two lists is, a column a measure: same, same_folded, rbo and rbo_bottom."""
    one, other = a.top[:, 0], b.top[:, 0]
    same = one == other
    found = (
        same, same | (a.folded[one] == b.folded[other]),
        rank_biased_overlap(a.top, b.top), rank_biased_overlap(a.bottom, b.bottom),
    )  # fmt: skip
    return {f"{prefix}{name}": values for name, values in zip(MEASURES, found, strict=True)}


def common(a: NeuronMap, b: NeuronMap, side: Side | None, layers: str | None) -> tuple[list[Side], list[int], int]:
    """Sides and layers that both maps have, or those asked for, and how many tokens a neuron.

    Raises:
        NotComparable: if the maps were made in different ways, or are of models of other depth or vocabulary; if their layers
            are not the same and none were asked for, or no side is common.
        LayerOutOfRange: if the models have no such layer.
    """
    one, other = a.settings, b.settings
    for name in ALIKE:
        if one[name] != other[name]:
            raise NotComparable(
                f"The maps were made with {name}={one[name]!r} and {name}={other[name]!r}, so their tokens say different "
                f"things. Map both models with the same {name}."
            )
    if one["n_layers"] != other["n_layers"]:
        raise NotComparable(
            f"The models have {one['n_layers']} and {other['n_layers']} layers: no neuron of one is a neuron of the other. "
            "Compare copies of one model."
        )
    if (share := other_tokens(a, b) / min(len(a.tokens), len(b.tokens))) > MOST_OTHER:
        raise NotComparable(
            f"{share:.1%} of the token ids stand for other tokens in the second map (vocabularies of {len(a.tokens):,} and "
            f"{len(b.tokens):,}), so tokens cannot be matched. Compare models with the same tokenizer."
        )
    sides = [each for each in one["sides"] if each in other["sides"] and side in (None, each)]
    if not sides:
        missing = "No side is" if side is None else f"Side {side!r} is not"
        raise NotComparable(
            f"{missing} in both maps: the first has {', '.join(one['sides'])}, the second {', '.join(other['sides'])}. "
            "Map a side of both models."
        )
    shared = [layer for layer in one["layers"] if layer in other["layers"]]
    asked = one["layers"] if layers is None else parse_layers(layers, one["n_layers"])
    if (layers is None and one["layers"] != other["layers"]) or not set(asked) <= set(shared):
        both = f"Ask for some of those that both have: layers='{ranges(shared)}'." if shared else "They have none in common."
        raise NotComparable(
            f"The first map has layers {ranges(one['layers'])}, the second {ranges(other['layers'])}"
            f"{'' if layers is None else f', and {layers!r} was asked for'}. {both}"
        )
    return sides, asked, min(one["k"], other["k"])


def other_tokens(a: NeuronMap, b: NeuronMap) -> int:
    """How many of the ids that both vocabularies have stand for other strings."""
    return sum(one != other for one, other in zip(a.tokens, b.tokens, strict=False))


def aligned(
    a: NeuronMap, b: NeuronMap, sides: list[Side], layers: list[int], k: int
) -> tuple[pd.DataFrame, pd.DataFrame, Lists, Lists]:
    """The rows of both maps' top tokens, and their lists, neuron by neuron.

    Raises:
        NotComparable: if the maps are not of the same neurons.
    """
    import pandas as pd

    numbers = pd.factorize(np.array([fold(token) for token in [*a.tokens, *b.tokens]], dtype=object))[0]
    tops, lists = [], []
    for neurons, folded in ((a, numbers[: len(a.tokens)]), (b, numbers[len(a.tokens) :])):
        best, worst = (
            table[table["side"].isin(sides) & table["layer"].isin(layers) & (table["rank"] < k)]
            for table in (neurons.table, neurons.bottom)
        )
        top, bottom = (table["token_id"].to_numpy().reshape(-1, k) for table in (best, worst))
        tops.append(best.iloc[::k].reset_index(drop=True))
        lists.append(Lists(top, bottom, folded))
    keys = ["side", "layer", "neuron"]
    if not tops[0][keys].astype({"side": "str"}).equals(tops[1][keys].astype({"side": "str"})):
        counts = " and ".join(f"{len(top):,}" for top in tops)
        raise NotComparable(f"The maps are of {counts} neurons, which are not the same ones. Compare copies of one model.")
    return tops[0], tops[1], lists[0], lists[1]


def groups(neurons: pd.DataFrame) -> dict[tuple[Side, int], np.ndarray]:
    """Places of the rows of each side and layer."""
    return neurons.groupby(["side", "layer"], observed=True, sort=False).indices  # pyright: ignore[reportReturnType]


def generator(seed: int, what: str, side: Side, layer: int) -> np.random.Generator:
    """Of a null's random numbers: a layer's are the same whichever others are compared with it."""
    return np.random.default_rng([seed, *what.encode(), SIDES.index(side), layer])
