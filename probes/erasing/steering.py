"""Steering along a direction: does the model's answer follow, and what does it cost, beside a random direction as long?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from probes.dataset import Dataset
from probes.erasing.answers import ConceptTexts
from probes.probe_sweep import ProbeSweep
from workbench.analyses.held_out_change import HeldOut
from workbench.analyses.held_out_loss import held_out_rows
from workbench.artifacts import read_tables, write_tables
from workbench.corpus.corpus import Corpus
from workbench.edits.make import add
from workbench.errors import UnknownOption
from workbench.intervention import intervene
from workbench.model import LanguageModel
from workbench.results import Result, versions
from workbench.transports.transport import of_model

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND, MAKER = "steering", "probes.steer(...).save"
FACTORS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass(frozen=True, eq=False, repr=False)
class Steering(Result):
    """A row a factor and direction (`probe`, or `random`: as long, a mean over several).

    Columns: direction, factor, answers (share of texts after which the second class's word is likelier than the first's), odds
    (mean log odds of the second's, nats), loss (change on ordinary text, nats a token, with _error).
    """

    texts: pd.DataFrame
    """prompt, factor, text, along the probe's direction."""

    def plot(self) -> go.Figure:
        """Log odds and loss by factor."""
        from probes.erasing.plots import plot_steering

        return plot_steering(self)

    def save(self, folder: str | Path) -> Path:
        """Write steering.parquet, texts.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return write_tables(folder, KIND, self.settings, {KIND: self.table, "texts": self.texts})

    @classmethod
    def load(cls, folder: str | Path) -> Steering:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no complete result of this kind.
        """
        table, others, settings = read_tables(folder, KIND, MAKER, ["texts"])
        texts = others["texts"]
        return cls(table=table, settings=settings, texts=table.iloc[:0] if texts is None else texts)

    def __str__(self) -> str:
        own = self.settings
        words = " against ".join(repr(word) for word in reversed(own["answers"].values()))
        lines = [
            f"{own['model']} steered at {own['site']} along {own['dataset']}; a factor of 1 is "
            f"{own['length']:.3g} long; log odds of {words}",
            self.table.to_string(index=False, float_format=lambda x: f"{x:.3f}"),
        ]
        for prompt, some in self.texts.groupby("prompt", sort=False):
            lines.append(f"{prompt!r} goes on:")
            lines += [f"  {row.factor:+.1f} {row.text[len(str(prompt)) :]!r}" for row in some.itertuples()]
        return "\n".join(lines)


def steer(
    model: LanguageModel,
    direction: ProbeSweep | Tensor | np.ndarray,
    dataset: Dataset | str,
    site: str | None = None,
    *,
    factors: Sequence[float] = FACTORS,
    answers: Mapping[str, str] | None = None,
    prompts: Sequence[str] = (),
    corpus: str | Corpus = "wikipedia",
    tokens: int = 1500,
    examples: int = 200,
    draws: int = 2,
    max_new_tokens: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> Steering:
    """Add a multiple of a direction to every token's state but the first's.

    Args:
        direction: A sweep of two classes, of which the pattern is taken (how the model writes the concept, the second mean less
            the first; coefficients say how to read it, which is another direction); or a vector `[d_model]`.
        site: Of a sweep, the best if None.
        factors: Of the direction as it is.
        answers: As `scrub`, of two classes.
    Raises:
        UnknownOption: if there are no answers, or not of two classes.
    """
    import pandas as pd

    dataset = (dataset if isinstance(dataset, Dataset) else Dataset.load(dataset)).head(examples)
    if isinstance(direction, ProbeSweep):
        site = site or str(direction.best()["site"])
        if site not in direction.patterns:
            raise UnknownOption(f"The sweep has no site {site!r}. It has {', '.join(direction.patterns)}.")
        direction = direction.patterns[site]
    if site is None:
        raise UnknownOption("A vector does not say where it is from. Name the site.")
    vector = torch.as_tensor(direction).double().flatten()
    texts = ConceptTexts(model, dataset, answers)
    if texts.given is None or len(dataset.classes) != 2:
        raise UnknownOption("Steering is seen by two answers. Give answers={class: word} for a dataset of two classes.")
    ordinary = HeldOut(model, held_out_rows(corpus if isinstance(corpus, Corpus) else Corpus(corpus), model, tokens), None)
    random = torch.randn(draws, len(vector), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ways = {"probe": vector[None], "random": random / random.norm(dim=1, keepdim=True) * vector.norm()}
    sign, table, said = np.where(dataset.index == 1, 1, -1), [], []
    steps = [(name, own, factor) for name, own in ways.items() for factor in factors]
    for name, own, factor in tqdm(steps, desc="steer", disable=not progress):
        rows = []
        for one in own:
            edit = add(site, one.float(), factor, skip=1)
            odds, change = texts.under(intervene(model, edit)).odds, ordinary.under(intervene(model, edit))
            assert odds is not None
            rows.append(
                {"answers": float((odds * sign > 0).mean()), "odds": float((odds * sign).mean()), "loss": change.change,
                 "loss_error": change.change_error}
            )  # fmt: skip
        table.append({"direction": name, "factor": factor} | pd.DataFrame(rows).mean().to_dict())
        if prompts and name == "probe":
            with intervene(model, add(site, own[0].float(), factor, skip=1)):
                more = model.generate(list(prompts), max_new_tokens=max_new_tokens)
            said += [{"prompt": prompt, "factor": factor, "text": text} for prompt, text in zip(prompts, more, strict=True)]
    settings = of_model(model) | dataset.settings | {
        "site": site, "length": float(vector.norm()), "answers": texts.given, "draws": draws, "tokens": tokens, "seed": seed,
        "versions": versions(),
    }  # fmt: skip
    return Steering(
        table=pd.DataFrame(table), settings=settings, texts=pd.DataFrame(said, columns=["prompt", "factor", "text"])
    )
