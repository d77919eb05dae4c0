"""One prompt at a glance: what the model predicts, where that forms, which parts write it, and which tokens they read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from workbench.analyses.logit_attribution import logit_attribution
from workbench.capturing import capture
from workbench.errors import UnknownOption, UnknownSite
from workbench.model import LanguageModel
from workbench.results import Result, versions
from workbench.tokens import shortened, shown

if TYPE_CHECKING:
    import pandas as pd

PARTS = 8
"""Parts that are named."""
SOURCES_UP_TO = 512
"""Tokens of a prompt whose sources are told apart: every head's pattern grows with the square of them."""


@dataclass(frozen=True, eq=False, repr=False)
class Scan(Result):
    """`table` has the likeliest next tokens: columns rank, token_id, token, logit, probability. The other tables are about the
    first of them, or the token that was asked for."""

    forms: pd.DataFrame
    """The logit lens at the last token, a row a state: columns layer (-1: the embedding), top (the likeliest token there),
    probability and rank (from 0) of the target."""
    parts: pd.DataFrame
    """What writes the target's logit directly, centred: heads and MLPs, as `wb.logit_attribution(by="head", centred=True)`
    has them."""
    sources: pd.DataFrame | None
    """What all heads took from each token (columns source_pos, source_token, contribution); None where a family's pattern
    cannot be seen, or the prompt is longer than 512 tokens."""

    @property
    def formed(self) -> int | None:
        """The first layer from which on the target stays the likeliest token; None if it is not at the end."""
        first = None
        for layer, rank in zip(self.forms["layer"][::-1], self.forms["rank"][::-1], strict=True):
            if rank > 0:
                break
            first = int(layer)
        return first

    def to_json(self) -> dict[str, Any]:
        """All tables, as plain values."""
        return {
            "settings": self.settings,
            "formed": self.formed,
            "predictions": self.table.to_dict("records"),
            "forms": self.forms.to_dict("records"),
            "parts": self.parts.astype(object).to_dict("records"),
            "sources": None if self.sources is None else self.sources.to_dict("records"),
        }

    def __str__(self) -> str:
        own = self.settings
        token = shown(own["target"])
        lines = [f"{own['model']} after {shortened(own['prompt'])}", "", "What comes next"]
        lines += [
            f"  {row.probability:7.1%}  {_bar(row.probability, self.table['probability'].max())}  {shown(str(row.token))}"
            for row in self.table.itertuples()
        ]
        when = "is not the likeliest at the end" if self.formed is None else f"is the likeliest from layer {self.formed} on"
        lines += ["", f"Where {token} forms: it {when} (logit lens)", "  layer       rank  probability  likeliest there"]
        for row in _strided(self.forms).itertuples():
            layer = "embedding" if row.layer < 0 else f"{row.layer}"
            lines.append(
                f"  {layer:<10}{row.rank:6}  {row.probability:10.2%}   {_bar(row.probability, 1.0, 10)}  {shown(str(row.top))}"
            )
        parts = self.parts.loc[self.parts["contribution"].abs().nlargest(PARTS).index]
        largest = parts["contribution"].abs().max()
        lines += ["", f"Which parts write {token} (logit above the vocabulary's mean, of {own['logit']:+.2f})"]
        lines += [
            f"  {row.contribution:+7.2f}  {_bar(abs(row.contribution), largest)}  {row.name}" for row in parts.itertuples()
        ]
        if self.sources is not None:
            sources = self.sources.loc[self.sources["contribution"].abs().nlargest(PARTS).index].sort_values("source_pos")
            largest = sources["contribution"].abs().max()
            lines += ["", f"From which tokens the heads take it (what they write of {token} from there)"]
            for row in sources.to_dict("records"):
                lines.append(_line(row["contribution"], largest, f"{row['source_pos']} {shown(row['source_token'])}"))
        return "\n".join(lines)


def scan(model: LanguageModel, prompt: str, target: str | int | None = None, *, k: int = 5) -> Scan:
    """An overview of what a model does at the end of a prompt.

    Args:
        target: The token that is followed; the likeliest next one, if None.
        k: How many of the likeliest tokens are listed.
    Raises:
        UnknownToken: if the target is no single token.
        TextTooLong, WorkbenchError: if the prompt does not fit the context, or is empty.
    """
    import pandas as pd

    if k < 1:
        raise UnknownOption(f"k={k} tokens were asked for. Ask for one or more.")
    started = time.perf_counter()
    followed = None if target is None else model.token_id(target)
    sites = ["resid_pre.0", "resid_post"]
    acts = capture(model, prompt, sites, positions="last")
    vocabulary = model.vocabulary
    states = torch.cat([value[:, 0].to(vocabulary.W_U.device) for value in acts.values()])
    strings = model.token_strings
    ending = vocabulary.project(states[-1:], decoder="norm", k=k)
    best = ending.top_ids[0].tolist()
    followed = best[0] if followed is None else followed
    lens = vocabulary.project(states, decoder="norm", k=1, targets=torch.tensor([followed], device=states.device))
    ranks = lens.target_ranks
    assert ranks is not None
    forms = pd.DataFrame(
        {
            "layer": range(-1, model.n_layers),
            "top": [strings[i] for i in lens.top_ids[:, 0].tolist()],
            "probability": lens.target_log_probabilities[:, 0].exp().tolist(),
            "rank": ranks[:, 0].tolist(),
        }
    )
    table = pd.DataFrame(
        {
            "rank": range(len(best)), "token_id": best, "token": [strings[i] for i in best],
            "logit": ending.top_logits[0].tolist(), "probability": ending.top_probabilities[0].tolist(),
        }
    )  # fmt: skip
    try:
        if acts.tokens.shape[1] > SOURCES_UP_TO:
            raise UnknownSite("too long to tell sources apart")
        written = logit_attribution(model, acts.batch, followed, centred=True, by="source")
        parts, sources = _heads_whole(written.table), written.by_source()
    except UnknownSite:  # too long, or this family's pattern cannot be seen
        written = logit_attribution(model, acts.batch, followed, centred=True, by="head")
        parts, sources = written.table, None
    settings = model.provenance | {
        "prompt": prompt, "target": strings[followed], "target_id": followed, "logit": written.logit, "versions": versions(),
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip
    return Scan(table, settings, forms, parts[["part", "layer", "index", "name", "contribution"]], sources)


def _heads_whole(table: pd.DataFrame) -> pd.DataFrame:
    """The contributions with all sources of a head in one row."""
    import pandas as pd

    split = table["part"].isin(["source", "rest"])
    heads = table[split].groupby(["layer", "index"], sort=False)["contribution"].sum().reset_index()
    heads = heads.assign(
        part="head", name=[f"head {layer}.{i}" for layer, i in zip(heads["layer"], heads["index"], strict=True)]
    )
    return pd.concat([table[~split], heads], ignore_index=True)


def _strided(forms: pd.DataFrame, shown_rows: int = 12) -> pd.DataFrame:
    """At most so many rows, the last one always among them."""
    stride = -(-len(forms) // shown_rows)
    return forms.iloc[(len(forms) - 1) % stride :: stride]


def _line(contribution: float, largest: float, name: str) -> str:
    return f"  {contribution:+7.2f}  {_bar(abs(contribution), largest)}  {name}"


def _bar(value: float, largest: float, width: int = 20) -> str:
    return ("█" * round(width * value / max(largest, 1e-30))).ljust(width)
