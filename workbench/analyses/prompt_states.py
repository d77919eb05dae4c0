"""What one prompt does inside: how long its states are, and which tokens each head of a layer looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsIndex

from workbench.activations import Activations
from workbench.capturing import capture
from workbench.errors import UnknownOption
from workbench.model import LanguageModel
from workbench.results import Result, versions
from workbench.sites import Site, parse_sites

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PATTERN_TOKENS = 256
"""Longest prompt whose pairs of tokens are listed: their number grows with its square."""
STATES = ("resid_pre.0", "resid_post")


@dataclass(frozen=True, eq=False, repr=False)
class StateNorms(Result):
    """`table` has a row a token and state: columns as `Activations.to_dataframe`, of which `massive` says that a state is over
    10 times as long as the layer's median."""

    acts: Activations

    def plot(self) -> go.Figure:
        """The length of every state, layers up and tokens across."""
        return self.acts.plot_norms()

    def __str__(self) -> str:
        own = self.acts.norms()[["site", "tokens", "median", "maximum", "massive", "at"]]
        return f"Lengths of the states of {self.settings['model']}\n{own.to_string(index=False)}"


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPatterns(Result):
    """`table` has a row a head and pair of tokens of which the second is not masked: head, query, key (positions),
    query_token, key_token, weight (all of a query's sum to 1, but for attention sinks)."""

    acts: Activations

    def plot(self) -> go.Figure:
        """A picture a head: a row a query token, a column a key token."""
        return self.acts.plot_pattern(self.settings["layer"])

    def __str__(self) -> str:
        own = self.table[self.table["key"] > 0].sort_values("weight", ascending=False).head(20)
        head = f"Layer {self.settings['layer']} of {self.settings['model']}: the largest weights beyond the first token"
        return f"{head}\n{own.to_string(index=False)}"


def state_norms(model: LanguageModel, prompt: str) -> StateNorms:
    """
    Raises:
        TextTooLong, WorkbenchError: as `capture`.
    """
    acts = capture(model, prompt, STATES)
    return StateNorms(acts.to_dataframe(), model.provenance | {"prompt": prompt, "versions": versions()}, acts)


def attention_patterns(model: LanguageModel, prompt: str, layer: SupportsIndex) -> AttentionPatterns:
    """Attention weights of all heads of a layer. HF's eager attention computes them (`Activations`).

    Args:
        layer: Negative ones count from the end.
    Raises:
        UnknownOption: for a prompt of more than 256 tokens.
        LayerOutOfRange, UnknownSite, TextTooLong, WorkbenchError: as `capture`.
    """
    n = int(model.tokenize(prompt).mask.sum())
    if n > PATTERN_TOKENS:
        raise UnknownOption(f"The prompt has {n:,} tokens; pairs of up to {PATTERN_TOKENS} are listed. wb.capture takes more.")
    site = str(parse_sites([f"pattern.{layer:d}"], model.n_layers)[0])
    acts = capture(model, prompt, site)
    number = Site.parse(site, model.n_layers).layer
    settings = model.provenance | {"prompt": prompt, "layer": number, "versions": versions()}
    return AttentionPatterns(_pairs(acts, site), settings, acts)


def _pairs(acts: Activations, site: str) -> pd.DataFrame:
    import pandas as pd

    pattern = acts[site][0].float().cpu()
    tokens = [acts.model.token_strings[one] for one in acts.tokens[0].tolist()]
    n_heads, n, _ = pattern.shape
    pairs = [(head, query, key) for head in range(n_heads) for query in range(n) for key in range(query + 1)]
    head, query, key = zip(*pairs, strict=True)
    return pd.DataFrame(
        {
            "head": head, "query": query, "key": key, "query_token": [tokens[one] for one in query],
            "key_token": [tokens[one] for one in key], "weight": pattern[list(head), list(query), list(key)].tolist(),
        }
    )  # fmt: skip
