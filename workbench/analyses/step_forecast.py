"""What a step of gradient descent on some texts would do to others, foretold from the factors, and what it does.

Foretold to first order: the step is followed through the whole model by one forward pass that carries derivatives. Measured:
the model run again with the step taken. By how much the loss of another target falls follows from both texts' factors alone
(Katz et al. 2024, arXiv 2402.12865, name such similarities as future work; `⟨G₁, G₂⟩ = sum((X₁ X₂ᵀ) ⊙ (D₁ D₂ᵀ))`): the same
number by another way, which stands beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.artifacts import read_tables, write_tables
from workbench.errors import MissingWeight, UnknownOption
from workbench.gradients.collect import Gradients, collect_gradients
from workbench.gradients.matrices import NAMES, matrices_of
from workbench.gradients.targets import Target, Targets, with_targets
from workbench.results import Result, versions
from workbench.tokens import shown
from workbench.weight_edits import WeightEdit, edit_weights, first_order

if TYPE_CHECKING:
    import plotly.graph_objects as go

log = logging.getLogger("workbench")

KIND = "step_forecast"
Asked = Sequence[tuple[str, Target]]
"""Prompts with the target that is followed there."""


@dataclass(frozen=True, eq=False, repr=False)
class StepForecast(Result):
    """`table` has a row a text: group, prompt, target, log_probability (of the first target token before the step), foretold
    (its change, by the logits foretold) and measured, influence (the change of the log-probability of the whole target to
    first order, from the factors of both texts alone), top (likeliest token before), top_foretold, top_measured, correlation
    and error (of the changes of all logits, foretold against measured, both less their mean over the vocabulary: Pearson, and
    the difference's length relative to what was measured)."""

    def plot(self) -> go.Figure:
        """Changes of the targets' log-probabilities, foretold against measured."""
        from workbench.plots.step_forecast import plot_step_forecast

        return plot_step_forecast(self)

    def save(self, folder: str | Path) -> Path:
        """Write step_forecast.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return write_tables(folder, KIND, self.settings, {KIND: self.table})

    @classmethod
    def load(cls, folder: str | Path) -> StepForecast:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        table, _, settings = read_tables(folder, KIND, "wb.forecast_step", ())
        return cls(table=table, settings=settings)

    def __str__(self) -> str:
        own = self.settings
        head = f"A step of {own['step']:g} on {own['model']}: {own['matrices_moved']} matrices, length {own['step_norm']:.3g}"
        lines = [head, "  change of log p: foretold  measured  logits' correlation  top: before > foretold > measured"]
        for group, rows in self.table.groupby("group", sort=False):
            lines.append(str(group))
            lines += [
                f"  {one['foretold']:+24.3f}  {one['measured']:+8.3f}  {one['correlation']:19.3f}  {shown(one['top'])} > "
                f"{shown(one['top_foretold'])} > {shown(one['top_measured'])}  ({one['prompt'][-40:]} | {shown(one['target'])})"
                for one in rows.to_dict("records")
            ]
        return "\n".join([*lines, "  .table .plot() .save(folder)"])


def forecast_step(
    gradients: Gradients,
    texts: Asked | Mapping[str, Asked],
    *,
    step: float,
    layers: str | None = None,
    matrices: Sequence[str] | None = None,
) -> StepForecast:
    """Take one step of plain gradient descent, `W - step · gradient`, for a while, and compare what it does with what was to be
    expected.

    Args:
        gradients: Of the loss that is stepped on, as `wb.backward_lens(…).gradients` holds them.
        texts: Prompts and the targets followed there; groups of these by name (prompt, paraphrases, neighbours).
        step: The learning rate. First order holds for small ones: the error says how small.
        layers, matrices: What is changed; if None all matrices of blocks whose gradients are there, but routers.
    Raises:
        UnknownOption: if no text is given, or the step is 0.
        MissingWeight, LayerOutOfRange, UnknownToken, TextTooLong: as `matrices_of` and `with_targets`.
    """
    import pandas as pd

    model = gradients.model
    groups = dict(texts) if isinstance(texts, Mapping) else {"texts": texts}
    asked = [(group, *one) for group, some in groups.items() for one in some]
    if not asked or step == 0:
        raise UnknownOption(f"step={step:g} and {len(asked)} texts: give a step that is not 0, and at least one text.")
    wide = [one for one in matrices_of(model, layers, matrices) if one.name in gradients.matrices]
    chosen = [one.name for one in wide if one.kind != "W_router"]  # which chooses its experts inside its module
    if not chosen:
        raise MissingWeight(
            f"layers={layers!r}, matrices={matrices}: the gradients here are of {', '.join(list(gradients)[:6])}, …"
        )
    edits = [WeightEdit.step(gradients[name], step) for name in chosen]
    wanted = with_targets(model, [prompt for _, prompt, _ in asked], [target for _, _, target in asked])
    at = wanted.first()
    before, foretold = (wanted.logits(own)[at] for own in first_order(model, wanted.batch, wanted.columns, edits))
    with torch.no_grad(), edit_weights(model, *edits):
        after = wanted.logits(model.forward(wanted.batch, wanted.columns))[at]
    if model.dtype.itemsize == 2:
        log.warning(
            "The model computes in %s: what is measured is also its rounding, which a small step does not exceed. Load it in "
            "float32.", str(model.dtype).removeprefix("torch."),
        )  # fmt: skip
    influence = _influence(gradients, wanted, chosen, step)
    token, strings = wanted.token[at], model.token_strings
    moved, centred = after - before, foretold - foretold.mean(1, keepdim=True)
    moved = moved - moved.mean(1, keepdim=True)
    table = pd.DataFrame(
        {
            "group": [group for group, _, _ in asked], "prompt": [prompt for _, prompt, _ in asked],
            "target": [strings[i] for i in token.tolist()], "log_probability": _log_p(before, token).tolist(),
            "foretold": (_log_p(before + foretold, token) - _log_p(before, token)).tolist(),
            "measured": (_log_p(after, token) - _log_p(before, token)).tolist(),
            "influence": influence.tolist(), "top": _top(before, strings), "top_foretold": _top(before + foretold, strings),
            "top_measured": _top(after, strings),
            "correlation": torch.cosine_similarity(centred, moved).tolist(),
            "error": ((centred - moved).norm(dim=1) / moved.norm(dim=1)).tolist(),
        }
    )  # fmt: skip
    settings = model.provenance | {
        "step": step, "step_norm": sum(edit.norm() ** 2 for edit in edits) ** 0.5, "matrices_moved": len(edits),
        "layers": layers, "matrices": None if matrices is None else list(matrices), "loss": gradients.loss,
        "versions": versions(),
    }  # fmt: skip
    return StepForecast(table=table, settings=settings)


def _influence(gradients: Gradients, wanted: Targets, chosen: Sequence[str], step: float) -> Tensor:
    """By how much the step changes the log-probability of each text's whole target, from factors alone, `[text]`."""
    model, kinds = gradients.model, sorted({gradients.matrices[name].kind for name in chosen})
    named = None if set(kinds) - set(NAMES) else kinds  # of modules that no row names, all are collected
    layers = ",".join(str(layer) for layer in sorted({gradients.matrices[name].layer for name in chosen}))
    others = collect_gradients(model, wanted.batch, wanted.loss, columns=wanted.columns, layers=layers, matrices=named)
    found = torch.zeros(len(wanted.batch.mask), dtype=torch.float64)
    for name in chosen:
        own, other = gradients[name], others[name]
        found += torch.tensor([own.inner(other.of_row(row)) for row in range(len(found))])
    return step * found


def _log_p(logits: Tensor, token: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, token[:, None])[:, 0]


def _top(logits: Tensor, strings: list[str]) -> list[str]:
    return [strings[i] for i in logits.argmax(-1).tolist()]
