"""Does the model miss what was erased? Erasers in its forward pass, at one site or one after another, beside random
subspaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from probes.dataset import Dataset
from probes.erasers.closed_forms import RandomSubspace
from probes.erasers.eraser import Eraser
from probes.erasers.fit import fit_erasers
from probes.erasing.answers import ConceptTexts
from probes.erasing.erasure import Erasure
from probes.erasing.scrubbing_text import scrubbing_text
from probes.evaluation.scores import Resamples, interval
from probes.states import token_spans
from workbench.analyses.held_out_change import HeldOut
from workbench.analyses.held_out_loss import held_out_rows, mean_and_error
from workbench.artifacts import output_folder, read_tables, write_tables
from workbench.corpus.corpus import Corpus
from workbench.errors import UnknownOption
from workbench.intervention import intervene
from workbench.model import LanguageModel
from workbench.results import Result, versions
from workbench.sites import depth, parse_sites
from workbench.substitution import Written
from workbench.transports.transport import of_model

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND, MAKER = "scrubbing", "workbench erase or probes.scrub(...).save"
STEPS = 6
"""Ranks at which an INLP is stopped, for the curve."""


@dataclass(frozen=True, eq=False, repr=False)
class Scrubbing(Result):
    """A row a way of erasing, `none` first. Random subspaces are of the same sites and ranks, a mean over several draws.

    Columns: erased, sites, rank (of all sites together), loss (change on ordinary text, nats a token, with _error, over
    documents), kl (nats, untouched against erased), agreement (of the likeliest token), concept_loss (change on the dataset's
    own texts, with _error), and where the task is known task_accuracy (the right answer's token before the others', with _low
    and _high over resampled groups) and task_odds (mean log odds of the right answer, nats).
    """

    curve: pd.DataFrame
    """Of INLP's first directions and as many random ones: erased, rank, and as in `table`."""
    texts: pd.DataFrame
    """What the model says: prompt, erased, text."""

    def plot(self, what: str = "bars") -> go.Figure:
        """`bars`: loss and task by way of erasing; `curve`: against rank; `profile`: by layer, where erasers of one kind were
        tried at several sites.

        Raises:
            UnknownOption: for a picture that there is not.
        """
        from probes.erasing.plots import plot_scrubbing

        return plot_scrubbing(self, what)

    def save(self, folder: str | Path) -> Path:
        """Write scrubbing.parquet, curve.parquet, texts.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        folder = output_folder(Path(folder))
        return write_tables(folder, KIND, self.settings, {KIND: self.table, "curve": self.curve, "texts": self.texts})

    @classmethod
    def load(cls, folder: str | Path) -> Scrubbing:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no complete result of this kind.
        """
        table, others, settings = read_tables(folder, KIND, MAKER, ["curve", "texts"])
        curve, texts = (one if one is not None else table.iloc[:0] for one in (others["curve"], others["texts"]))
        return cls(table=table, settings=settings, curve=curve, texts=texts)

    def __str__(self) -> str:
        return scrubbing_text(self)


def scrub(
    model: LanguageModel,
    erasers: Erasure | Mapping[str, Any],
    dataset: Dataset | str,
    *,
    answers: Mapping[str, str] | None = None,
    prompts: Sequence[str] = (),
    corpus: str | Corpus = "wikipedia",
    tokens: int = 2000,
    examples: int = 300,
    draws: int = 2,
    curve: bool = False,
    max_new_tokens: int = 20,
    skip: int = 1,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scrubbing:
    """What becomes of the model while a concept is erased from its states, at every token but the first.

    Args:
        erasers: An `Erasure`, fitted to half of the dataset, of which the other half is then looked at; or by name an eraser,
            or several that act together (`fit_scrubbers`), each at the site that it was fitted to.
        dataset: Texts with the concept. Better none that erasers of your own were fitted to: see `Dataset.halves`.
        answers: By class, the word that is right after a text (`{"plural": " are", "singular": " is"}`); a shipped set's own.
        prompts: To be continued, greedily, under each way of erasing.
        corpus, tokens: Ordinary text, and how much of it.
        examples: Of the dataset, at most.
        draws: Random subspaces of each size.
        curve: Also an INLP's first directions, at several ranks, and as many random ones.
        skip: Tokens of every text that are left alone, from the first on.
    Raises:
        OtherJob: if an eraser was fitted to another model.
        UnknownOption: if one is of no site.
    """
    import pandas as pd

    dataset = dataset if isinstance(dataset, Dataset) else Dataset.load(dataset)
    if isinstance(erasers, Erasure):
        dataset = dataset.halves(int(erasers.settings["seed"]))[1]
    dataset = dataset.head(examples)
    ways = _ways(model, erasers)
    measured = _Measured(model, dataset, answers, corpus, tokens, batch_tokens, seed, skip)
    randoms = {_sizes(several): several for several in ways.values() if any(one.rank for one in several)}
    drawn = {
        f"random, {_size(sizes)}": [_random_like(several, seed + draw) for draw in range(draws)]
        for sizes, several in randoms.items()
    }  # fmt: skip
    bar = tqdm(total=1 + len(ways) + draws * len(drawn), desc="scrub", disable=not progress)
    table, texts = [], []
    for name, several in {"none": [[]], **{name: [own] for name, own in ways.items()}, **drawn}.items():
        rows = []
        for own in several:
            rows.append(measured.row(own))
            bar.update()
        table.append({"erased": name, **_where(several[0])} | pd.DataFrame(rows).mean().to_dict())
        if prompts:
            with _erasing(model, several[0], skip):
                said = model.generate(list(prompts), max_new_tokens=max_new_tokens)
            texts += [{"prompt": prompt, "erased": name, "text": text} for prompt, text in zip(prompts, said, strict=True)]
    bar.close()
    steps = measured.curve(ways, seed, progress) if curve else []
    settings = of_model(model) | dataset.settings | {
        "corpus": str(corpus if isinstance(corpus, str) else corpus.source.name), "tokens": tokens, "draws": draws,
        "skip": skip, "seed": seed, "answers": measured.texts.given,
        "loss": measured.loss, "concept_loss": measured.concept_loss, "scored_tokens": measured.n_tokens,
        "versions": versions(),
    }  # fmt: skip
    return Scrubbing(
        table=pd.DataFrame(table), settings=settings, curve=pd.DataFrame(steps),
        texts=pd.DataFrame(texts, columns=["prompt", "erased", "text"]),
    )  # fmt: skip


@torch.no_grad()
def fit_scrubbers(
    model: LanguageModel,
    dataset: Dataset | str,
    sites: str | Sequence[str] | None = None,
    eraser: str | Eraser = "leace",
    *,
    examples: int = 1500,
    skip: int = 1,
    device: str | None = None,
    **options: Any,
) -> list[Any]:
    """Concept scrubbing (Belrose et al. 2023, section 6): an eraser at every site, each fitted to what the ones before it
    leave.

    One forward pass of all texts: at each site it stops, fits, erases, and goes on. (The paper scrubs what every norm gives,
    `ln1` and `ln2`.)

    Args:
        sites: All states but the last, if None: from the last one logits are read, and where class means are equal there, so
            are the classes' mean logits after the words that it was fitted to, whatever the model would make of them.
        eraser: As `fit_erasers`.
        examples: At most: their states at one site lie in memory together.
        skip: As `scrub`.
        device: Where erasers are fitted.
    Raises:
        UnknownSite, ReadOnlySite: if a site does not exist, or cannot be written.
    """
    dataset = (dataset if isinstance(dataset, Dataset) else Dataset.load(dataset)).head(examples)
    places = torch.from_numpy(token_spans(model, dataset)[:, 1] - 1)
    batch = model.tokenize(list(dataset.texts or ()))
    given = [f"resid_post.0:{model.n_layers - 1}"] if sites is None else [sites] if isinstance(sites, str) else sites
    wanted = parse_sites(given, model.n_layers)
    fitted: dict[str, Any] = {}
    about = of_model(model)

    def fit_at(site: str, seen: Tensor) -> Tensor:
        rows = seen[torch.arange(len(places), device=seen.device), places.to(seen.device)].flatten(1)
        found = fit_erasers({site: rows}, dataset, eraser, device=device, **options)[site]
        found.settings_ = about | found.settings_
        fitted[site] = found
        return fitted[site].transform(seen.flatten(2)).view_as(seen)

    edits = [Written(site=str(site), made=partial(fit_at, str(site)), skip=skip) for site in wanted]
    with intervene(model, *edits):
        model.forward(batch, torch.tensor([0], device=model.device))
    return [fitted[str(site)] for site in sorted(wanted, key=lambda one: depth(one, model.n_layers))]


class _Measured:
    """Texts on which the model is measured, untouched and erased."""

    def __init__(
        self, model: LanguageModel, dataset: Dataset, answers: Mapping[str, str] | None, corpus: str | Corpus, tokens: int,
        batch_tokens: int | None, seed: int, skip: int,
    ) -> None:  # fmt: skip
        self.model, self.skip = model, skip
        ordinary = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
        self.ordinary = HeldOut(model, held_out_rows(ordinary, model, tokens), batch_tokens)
        self.texts = ConceptTexts(model, dataset, answers)
        self.untouched = self.texts.under(nullcontext())
        self.n_tokens = {"ordinary": len(self.ordinary.nats), "concept": int(self.texts.counted.sum())}
        self.loss = float(self.ordinary.nats.mean())
        self.concept_loss = float(self.untouched.nats.sum() / self.n_tokens["concept"])
        self.resamples = Resamples(dataset.groups[:, 0], seed)

    def row(self, erasers: Sequence[Eraser]) -> dict[str, float]:
        """All figures under some erasers together."""
        ordinary = self.ordinary.under(_erasing(self.model, erasers, self.skip))
        said = self.texts.under(_erasing(self.model, erasers, self.skip))
        own = np.repeat(np.arange(len(said.nats)), self.texts.counted)
        by_token = np.repeat((said.nats - self.untouched.nats) / np.maximum(self.texts.counted, 1), self.texts.counted)
        change, error = mean_and_error(by_token, own)
        found = {
            "loss": ordinary.change, "loss_error": ordinary.change_error, "kl": ordinary.kl_nats,
            "agreement": ordinary.agreement, "concept_loss": change, "concept_loss_error": error,
        }  # fmt: skip
        if said.odds is not None:
            low, high = interval(self.resamples.means((said.odds > 0).astype(float)))
            found |= {"task_accuracy": float((said.odds > 0).mean()), "task_accuracy_low": low, "task_accuracy_high": high}
            found |= {"task_odds": float(said.odds.mean())}
        return found

    def curve(self, ways: Mapping[str, Sequence[Any]], seed: int, progress: bool) -> list[dict[str, Any]]:
        """Of an INLP's first directions, and as many random ones."""
        whole = next((own[0] for own in ways.values() if len(own) == 1 and type(own[0]).__name__ == "INLP"), None)
        if whole is None or whole.rank < 2:
            return []
        ranks = sorted({round(whole.rank ** (i / (STEPS - 1))) for i in range(STEPS)})
        found = []
        for rank in tqdm(ranks, desc="curve", disable=not progress):
            some = whole.first(rank)
            for name, own in (("inlp", [some]), ("random", _random_like([some], seed))):
                found.append({"erased": name, "rank": rank} | self.row(own))
        return found


def _erasing(model: LanguageModel, erasers: Sequence[Eraser], skip: int) -> Any:
    return intervene(model, *(one.as_edit(skip=skip) for one in erasers)) if erasers else nullcontext()


def _ways(model: LanguageModel, erasers: Erasure | Mapping[str, Any]) -> dict[str, list[Any]]:
    """By name, erasers that act together.

    Raises:
        OtherJob: if one was fitted to another model.
        UnknownOption: if one is no eraser, or of no site.
    """
    given: Any = erasers
    if isinstance(erasers, Erasure):
        several = len(set(erasers.table["site"])) > 1
        given = {
            (f"{name.partition('/')[2]} at {name.partition('/')[0]}" if several else name.partition("/")[2]): one
            for name, one in erasers.erasers.items()
            if not name.endswith("/random")
        }
    found = {}
    for name, one in given.items():
        own = [one] if isinstance(one, Eraser) else list(one)
        for eraser in own:
            if not isinstance(eraser, Eraser):
                raise UnknownOption(f"{name!r} is a {type(eraser).__name__}, no eraser. Fit one with probes.fit_erasers.")
            eraser.as_edit(model=model)  # refuses those of another model, or of no site
        found[name] = own
    return found


def _sizes(erasers: Sequence[Eraser]) -> tuple[tuple[str, int], ...]:
    return tuple((str(one.settings_["site"]), one.rank) for one in erasers)


def _size(sizes: tuple[tuple[str, int], ...]) -> str:
    ranks = sorted({rank for _, rank in sizes})
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{shown} at {sizes[0][0]}" + (f" and {len(sizes) - 1} more" if len(sizes) > 1 else "")


def _random_like(erasers: Sequence[Any], seed: int) -> list[Any]:
    """A random subspace for each, of its rank, about its mean."""
    found = []
    for at, one in enumerate(erasers):
        drawn = RandomSubspace(one.rank, seed=seed + 1000 * at).fit(one.center_[None])
        drawn.settings_ = one.settings_
        found.append(drawn)
    return found


def _where(erasers: Sequence[Any]) -> dict[str, Any]:
    return {"sites": ",".join(str(one.settings_["site"]) for one in erasers), "rank": sum(one.rank for one in erasers)}
