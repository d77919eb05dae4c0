"""Does an edit of one matrix change a fact, its other wordings, and nothing beside it?

Facts that the model knows are edited to a wrong object, one at a time, in `W_out` of one layer, in three ways of equal length
(Frobenius): the forward-pass shift of Katz et al. 2024 (arXiv 2402.12865), one step of gradient descent, and the null of the
shift, which writes a random direction at the same inputs. As in the paper's table, what counts is the likeliest token: efficacy
(after the prompt it is the new object's first), paraphrase (after its other wordings), neighbourhood (after prompts about other
subjects it is still the right one). Unlike there, only facts and neighbours count that the model knew before: else an edit is
praised for leaving broken what was broken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from workbench.analyses.edited_texts import EditedTexts, first_tokens
from workbench.analyses.forward_shift import random_like, shift_of
from workbench.analyses.known_facts import KnownFact, known_facts
from workbench.artifacts import read_tables, write_tables
from workbench.capturing import capture
from workbench.errors import TooFewFacts, UnknownOption
from workbench.facts import Fact
from workbench.gradients.collect import collect_gradients
from workbench.gradients.matrices import matrices_of
from workbench.gradients.targets import with_targets
from workbench.model import LanguageModel
from workbench.results import Result, versions
from workbench.sites import parse_layers
from workbench.weight_edits import WeightEdit

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "fact_edits"
METHODS = ("shift", "step", "random")
MEASURES = ("efficacy", "paraphrase", "neighbourhood")
STRENGTHS = (0.3, 1.0, 3.0)
FACTS_AT_ONCE = {"cpu": 16, "cuda": 64}


@dataclass(frozen=True, eq=False, repr=False)
class FactEdits(Result):
    """`table` has a row a fact, layer, strength and method: fact, relation, layer, strength (length of what the shift writes
    at the prompt's last token, relative to the stream there), method (`shift`, `step`, `random`), norm (Frobenius, the same
    for all three), step (the η that comes to it; None for `random`), efficacy, paraphrase, neighbourhood (shares of prompts, 0
    to 1; the last None where no neighbour is known), target_log_probability (after the prompt), kl_neighbours_nats
    (KL(untouched || edited) after the neighbours' prompts)."""

    def by_setting(self) -> pd.DataFrame:
        """Means over facts, with standard errors: layer, strength, method, facts, and of each measure its mean and error; score
        (harmonic mean of efficacy, paraphrase and neighbourhood)."""
        return summarised(self.table)

    def best(self) -> pd.DataFrame:
        """Of each method but the null, layer and strength of the highest score on every other fact, and what it and the null
        score there on the rest."""
        import pandas as pd

        order = {name: i for i, name in enumerate(dict.fromkeys(self.table["fact"]))}
        second = self.table["fact"].map(order) % 2 == 1
        chosen, rest = summarised(self.table[~second]), summarised(self.table[second])
        found = []
        for method in self.settings["methods"]:
            if method == "random" and len(self.settings["methods"]) > 1:
                continue
            top = chosen[chosen["method"] == method].nlargest(1, "score")
            there = rest.merge(top[["layer", "strength"]])
            found.append(there[there["method"].isin([method, "random"])].assign(chosen_for=method))
        return pd.concat(found, ignore_index=True)

    def plot(self) -> go.Figure:
        """The three measures by layer, a column a strength, a colour a method."""
        from workbench.plots.fact_edits import plot_fact_edits

        return plot_fact_edits(self)

    def save(self, folder: str | Path) -> Path:
        """Write fact_edits.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return write_tables(folder, KIND, self.settings, {KIND: self.table})

    @classmethod
    def load(cls, folder: str | Path) -> FactEdits:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        table, _, settings = read_tables(folder, KIND, "workbench edit-facts", ())
        return cls(table=table, settings=settings)

    def __str__(self) -> str:
        own, best = self.settings, self.best()
        lines = [
            f"{own['model']} knows {own['known']:,} of {own['asked']:,} facts; {own['edited']} were edited in W_out",
            "Layer and strength chosen on every other fact, measured on the rest:",
            "  method  layer  strength   efficacy       paraphrase     neighbourhood   KL at neighbours",
        ]
        for one in best.to_dict("records"):
            shares = "  ".join(_share(one[name], one[f"{name}_error"]) for name in MEASURES)
            lines.append(
                f"  {one['method']:6}  {one['layer']:5}  {one['strength']:8g}  {shares}  {one['kl_neighbours_nats']:8.3f} nats"
            )
        return "\n".join([*lines, "  .table .by_setting() .best() .plot() .save(folder)"])


def edit_facts(
    model: LanguageModel,
    facts: Sequence[Fact],
    *,
    layers: str | None = None,
    strengths: Sequence[float] = STRENGTHS,
    methods: Sequence[str] = METHODS,
    n: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FactEdits:
    """Edit each fact that the model knows, at every layer and strength asked for, and see what follows.

    Args:
        facts: As `workbench.facts.shipped_facts` gives them, in the order in which they are taken.
        layers: As `parse_layers` reads them; every fifth and the last, if None.
        strengths: Lengths of what the shift writes at the prompt's last token, relative to the stream there; the other ways are
            as long as the shift.
        n: Edit so many of the known facts; all, if None.
        seed: Of the random directions.
    Raises:
        TooFewFacts: if the model knows fewer than two of them (whose object and false object begin otherwise).
        UnknownOption: for a method that there is not, or a strength that is not above 0.
        MissingWeight, NoGradient, LayerOutOfRange: as `forward_shift` and `collect_gradients`.
    """
    import pandas as pd

    if not set(methods) <= set(METHODS) or not methods or not strengths or not all(0 < one < inf for one in strengths):
        raise UnknownOption(
            f"methods={methods}, strengths={strengths}: methods are {', '.join(METHODS)}; strengths are above 0."
        )
    every_fifth = sorted({*range(0, model.n_layers, 5), model.n_layers - 1})
    chosen = every_fifth if layers is None else parse_layers(layers, model.n_layers)
    if n is not None and n < 2:
        raise UnknownOption(f"n={n}: at least two facts are edited, as settings are chosen on some and measured on others.")
    matrices_of(model, ",".join(map(str, chosen)), ["W_out"])  # refuses layers of experts before any work
    known = known_facts(model, facts, progress=progress)
    said = first_tokens(model, [(one.fact.prompt, one.fact.object) for one in known])
    new = first_tokens(model, [(one.fact.prompt, one.fact.false_object) for one in known])
    told_apart = [(one, b) for one, a, b in zip(known, said, new, strict=True) if a != b][:n]
    if len(told_apart) < 2:
        raise TooFewFacts(f"{model.name!r} knows {len(told_apart)} of {len(facts)} facts. Give more, or easier ones.")
    rows: list[dict[str, Any]] = []
    total = len(told_apart) * len(chosen) * len(strengths) * len(methods)
    with tqdm(total=total, desc="editing facts", unit="edit", disable=not progress) as bar:
        at_once = FACTS_AT_ONCE.get(model.device.type, FACTS_AT_ONCE["cpu"])
        for start in range(0, len(told_apart), at_once):
            some, targets = zip(*told_apart[start : start + at_once], strict=True)
            texts = EditedTexts(model, some, targets)
            for settings, edits, steps in _edits(model, some, texts.targets, chosen, strengths, methods, seed + start):
                for one, edit, step, found in zip(some, edits, steps, texts.measured(edits), strict=True):
                    own = {"fact": one.fact.id, "relation": one.fact.relation} | settings
                    rows.append(own | {"norm": edit.norm(), "step": step} | found)
                bar.update(len(some))
    settings = model.provenance | {
        "asked": len(facts), "known": len(known), "edited": len(told_apart), "layers": chosen, "strengths": list(strengths),
        "methods": list(methods), "seed": seed, "versions": versions(),
    }  # fmt: skip
    return FactEdits(table=pd.DataFrame(rows), settings=settings)


def _edits(
    model: LanguageModel,
    some: Sequence[KnownFact],
    targets: Sequence[int],
    layers: Sequence[int],
    strengths: Sequence[float],
    methods: Sequence[str],
    seed: int,
) -> Iterator[tuple[dict[str, Any], list[WeightEdit], Sequence[float | None]]]:
    """Every setting, and the edit of each fact in it with its η: of all facts one forward and one backward pass."""
    wanted = with_targets(model, [one.fact.prompt for one in some], [[token] for token in targets])
    lengths = [float(model.vocabulary.direction(token).detach().float().norm()) for token in targets]
    of_layers = ",".join(map(str, layers))
    gradients = collect_gradients(
        model, wanted.batch, wanted.loss, columns=wanted.columns, layers=of_layers, matrices=["W_out"]
    )
    acts = capture(model, wanted.batch, [f"resid_post.{layer}" for layer in layers], positions="last")
    for layer in layers:
        own = [gradients[f"W_out.{layer}"].of_row(row) for row in range(len(some))]
        h = acts[f"resid_post.{layer}"][:, 0]
        for strength in strengths:
            shifts = [
                shift_of(model, layer, one.X[-1], h[i], token, strength=strength)
                for i, (one, token) in enumerate(zip(own, targets, strict=True))
            ]
            for method in methods:
                steps: Sequence[float | None]
                if method == "shift":
                    edits, steps = shifts, [float(one.right.norm()) / e for one, e in zip(shifts, lengths, strict=True)]
                elif method == "random":
                    edits, steps = [random_like(edit, seed + i) for i, edit in enumerate(shifts)], [None] * len(shifts)
                else:
                    rates = [shift.norm() / one.norm() for one, shift in zip(own, shifts, strict=True)]
                    edits, steps = [WeightEdit.step(one, rate) for one, rate in zip(own, rates, strict=True)], rates
                yield {"layer": layer, "strength": strength, "method": method}, edits, steps


def summarised(table: pd.DataFrame) -> pd.DataFrame:
    """`FactEdits.by_setting` of some rows."""
    wanted = [*MEASURES, "target_log_probability", "kl_neighbours_nats"]
    groups = table.groupby(["layer", "strength", "method"], sort=False)
    found = groups[wanted].mean()
    found.insert(0, "facts", groups.size())
    for name in wanted:
        found[f"{name}_error"] = groups[name].sem()
    shares = found[list(MEASURES)].to_numpy(dtype=float)
    with np.errstate(divide="ignore"):
        found["score"] = len(MEASURES) / (1 / shares).sum(1)
    return found.reset_index()


def _share(value: float, error: float) -> str:
    return f"{value:6.1%} ± {'–':>5}" if np.isnan(error) else f"{value:6.1%} ± {error:5.1%}"
