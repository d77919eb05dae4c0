"""Which parts of the model write a logit: every head's, neuron's and source token's share of it, which sum to it exactly.

Direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the split by source token
is the direct feature attribution of Kissane et al. 2024, arXiv 2406.17759). The stream is a sum of what the parts added, and
with the final norm frozen at this token's statistics a logit is linear in it. We differ from common code where it loses
something: constant terms (biases, the final norm's, a soft cap) are rows of their own, post-norms and multipliers are
followed through, and the sum is held against the model's own logit. What a part does by way of later parts is not in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch

from workbench.analyses.contributions import By, Contributions, Goal, Parts
from workbench.errors import UnknownOption, require_one_of
from workbench.model import Batch, LanguageModel
from workbench.results import Result, versions

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Result):
    """What each part adds to a logit, or to a difference of logits. `table` has one row a part.

    Columns: part (embed, attn, mlp, mixer, head, neuron, source, rest, constant; edit inside
    `wb.intervene`), layer, index (of the head or neuron),
    source_pos and source_token (the token that a head read), name (to print) and contribution, in logits. What does not
    apply is missing. Contributions have either sign, so shares of their sum would mislead and are not given.
    """

    logit: float
    """The model's own, that of `versus` or the vocabulary's mean subtracted."""
    tokens: list[str]
    """The prompt's, up to the position whose logit it is."""

    @property
    def error(self) -> float:
        """How far the sum is from the model's own logit, relative to the largest contribution."""
        contributions = self.table["contribution"]
        return abs(float(contributions.sum()) - self.logit) / max(float(contributions.abs().max()), 1e-30)

    def top(self, n: int = 20) -> pd.DataFrame:
        """The n largest contributions of either sign."""
        return self.table.loc[self.table["contribution"].abs().nlargest(n).index]

    def by_layer(self) -> pd.DataFrame:
        """Sums over each layer's rows of one kind: columns layer (missing for what has none), part, contribution."""
        groups = self.table.groupby(["layer", "part"], dropna=False, sort=False)
        return groups["contribution"].sum().reset_index()

    def by_source(self) -> pd.DataFrame:
        """What all heads together took from each token: columns source_pos, source_token, contribution.

        Raises:
            UnknownOption: if the heads were not split by source.
        """
        if self.settings["by"] != "source":
            raise UnknownOption(f"by={self.settings['by']!r} does not tell sources apart. Make it with by='source'.")
        own = self.table[self.table["part"] == "source"]
        return own.groupby(["source_pos", "source_token"], sort=False)["contribution"].sum().reset_index()

    def plot(self, n: int = 20) -> go.Figure:
        """The n largest contributions, every layer's parts or heads, and the source tokens if they were told apart."""
        from workbench.plots.logit_attribution import plot_logit_attribution

        return plot_logit_attribution(self, n)

    @property
    def question(self) -> str:
        """What was taken apart, in words: `logit of ' Paris' - ' Rome'`."""
        versus = "the mean" if self.settings["centred"] else self.settings["versus"] and repr(self.settings["versus"])
        return f"logit of {self.settings['target']!r}" + (f" - {versus}" if versus else "")

    @property
    def end_of_prompt(self) -> str:
        """The last tokens of the prompt, in quotes."""
        return "…" * (len(self.tokens) > 12) + repr("".join(self.tokens[-12:]))

    def __str__(self) -> str:
        lines = [
            f"Attribution of {self.settings['model']}: {self.question} after {self.end_of_prompt}, by {self.settings['by']}",
            f"  {self.logit:+.4f} = sum of {len(self.table):,} contributions (error {self.error:.0e} of the largest)",
        ]
        top = self.top(10)
        lines += [f"  {value:+9.4f}  {name}" for name, value in zip(top["name"], top["contribution"], strict=True)]
        return "\n".join([*lines, "  .table .top(20) .by_layer() .plot()"])


def logit_attribution(
    model: LanguageModel,
    prompt: str | Batch,
    target: str | int | None = None,
    *,
    versus: str | int | None = None,
    centred: bool = False,
    by: By = "component",
    position: int = -1,
) -> Attribution:
    """Take a token's logit apart into what the model's parts wrote.

    Contributions sum to the model's own logit: in float32 to some 1e-6 of the largest; in bfloat16 to some 1e-2 (SmolLM2:
    5e-3), as the model then rounds the stream after every addition. Each is a part's own direct one, at this position.

    Args:
        prompt: A text, or a batch of one row.
        target: A token, by its string (a leading space is a part of it) or id; the model's own top prediction, if None.
        versus: Another token, whose logit is subtracted: constants that both share then cancel.
        centred: Subtract the mean logit of the vocabulary, so that what raises all tokens alike counts for nothing.
        by: `component`: embedding, each layer's attention and MLP; `head`: attention by head; `source`: each head by the
            token that it reads, its pattern times its values there; `neuron`: MLPs by neuron (a mixture of experts stays one
            row, as its tokens have neurons of different experts).
        position: Whose next token is predicted; negative from the end. Later tokens cannot matter and are not run.
    Raises:
        UnknownToken: if a target is no single token.
        UnknownOption: if there is no such position, the batch has several rows, or both `versus` and `centred` are given.
        UnknownNorm: if a norm on the way is neither LayerNorm nor RMS norm.
        UnknownSite: for `source`, in a family whose pattern cannot be seen (Falcon with position biases).
        UnreadableWeight: if W_U, or what `by` needs of W_O or W_out, is quantised or under an adapter that is not merged.
    """
    require_one_of("by", by, get_args(By))
    if versus is not None and centred:
        raise UnknownOption("Both versus and centred were given, but one thing is subtracted. Leave one of them out.")
    asked = [None if token is None else model.token_id(token) for token in (target, versus)]
    batch = _up_to(model, prompt, position)
    started = time.perf_counter()
    parts = Parts(model, batch, by)
    top = int(parts.logits.argmax()) if asked[0] is None else asked[0]
    goal = Goal(top, asked[1], centred)
    strings = model.token_strings
    tokens = [strings[i] for i in batch.tokens[0].tolist()]
    return Attribution(
        table=_table(list(parts.contributions(goal)), tokens),
        settings=model.provenance
        | {
            "prompt": "".join(tokens), "token_ids": batch.tokens[0].tolist(), "position": len(tokens) - 1,
            "target": strings[top], "target_id": top,
            "versus": None if asked[1] is None else strings[asked[1]], "versus_id": asked[1], "centred": centred, "by": by,
            "versions": versions(), "seconds": round(time.perf_counter() - started, 2),
        },
        logit=float(goal.of(parts.logits)),
        tokens=tokens,
    )  # fmt: skip


def _up_to(model: LanguageModel, prompt: str | Batch, position: int) -> Batch:
    """The prompt's tokens up to a position, as a batch without padding."""
    batch = prompt if isinstance(prompt, Batch) else model.tokenize(prompt)
    if len(batch.tokens) != 1:
        raise UnknownOption(f"One prompt is taken apart at a time; {len(batch.tokens)} were given. Call it for each.")
    tokens = batch.tokens[batch.mask]
    if not -len(tokens) <= position < len(tokens):
        raise UnknownOption(
            f"position={position} is not in the prompt of {len(tokens)} tokens: 0 to {len(tokens) - 1}, or negative from "
            "its end."
        )
    tokens = tokens[None, : position % len(tokens) + 1]
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))


def _table(rows: list[Contributions], tokens: list[str]) -> pd.DataFrame:
    import pandas as pd

    frames = []
    for row in rows:
        index = None if row.index is None else row.index.tolist()
        source = None if row.source is None else row.source.tolist()
        frames.append(
            pd.DataFrame(
                {
                    "part": row.part, "layer": row.layer, "index": index, "source_pos": source,
                    "source_token": None if source is None else [tokens[pos] for pos in source],
                    "name": _names(row, index, source, tokens), "contribution": row.values.double().cpu().numpy(),
                }
            ).astype({"layer": "Int64", "index": "Int64", "source_pos": "Int64", "source_token": "object"})
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def _names(row: Contributions, index: list[int] | None, source: list[int] | None, tokens: list[str]) -> list[str]:
    if index is None:
        return [row.name]
    if source is None:
        return [f"{row.name}.{i}" + " rest" * (row.part == "rest") for i in index]
    return [f"{row.name}.{i} <- {pos} {tokens[pos]!r}" for i, pos in zip(index, source, strict=True)]
