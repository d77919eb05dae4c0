"""Is a concept there, at which layers, and would it be there in an untrained model? A probe at every site, with its
controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from probes.dataset import Dataset
from probes.estimators.project import ProjectAndProbe
from probes.estimators.strength import afresh
from probes.evaluation.classes import Plan
from probes.evaluation.site_scores import Scored, scored_classes, scored_numbers
from probes.fit import probe_named
from probes.folds import folds_by_group
from probes.states import BAG, EMBEDDING, Pool, States, collect_states
from probes.sweep_files import load_sweep, save_sweep
from probes.sweep_text import sweep_text
from probes.untrained_model import untrained
from workbench.analyses.lens import layer_of
from workbench.errors import BadDataset, NotFinite, TooFewExamples, UnknownOption, require_one_of
from workbench.model import LanguageModel
from workbench.results import Result, versions

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FOLDS, SHUFFLES = 5, 5


@dataclass(frozen=True, eq=False, repr=False)
class ProbeSweep(Result):
    """A row a site. All scores are of examples whose groups the probe did not learn from, unless said otherwise; `_low` and
    `_high` hold 95 % of resamples of the groups.

    Columns for classes: site, layer, accuracy (with _low, _high), balanced_accuracy (mean over classes), information_bits (the
    entropy of the classes less the mean loss: V-information, Xu et al. 2020), shuffled_accuracy (mean over shuffled labels),
    shuffled_most (the largest of these), seen_accuracy (of words whose other examples were learnt from), control_accuracy (of
    random labels of words, learnt alike), selectivity (their difference, with _low, _high), untrained_accuracy (_low, _high:
    the same probe on the same model with random weights), over_untrained and over_embeddings (accuracy less that, with _low,
    _high), bits (of the online code, an example), compression (uniform bits over these), shuffled_compression,
    untrained_compression, strength.

    Columns for numbers: r2 in place of accuracy, r2 of each target, median_km for latitude and longitude, bits_saved.
    """

    references: pd.DataFrame
    """What is to be had without the model's work, a row each: the commonest class (or the mean), the embedding of the words
    asked about, the mean embedding of all tokens up to there; columns as in `table`, as far as they have one."""
    predictions: pd.DataFrame
    """Held out, a row an example and site: site, example, group, label, predicted, and log2_p, the label's; for numbers,
    columns of every target and its prediction."""
    probes: dict[str, Any]
    """By site, the probe fitted to all examples at the strength that was chosen most often: for reading and steering, not for
    scoring. After loading: those that have coefficients."""
    patterns: dict[str, np.ndarray]
    """By site, what the states of a class have that others have not (Haufe et al. 2014), `[1 or classes, d]`: of two classes
    the second mean less the first, of more each less the mean of all; of numbers, the covariance with each target over its
    spread, `[targets, d]`. A probe's coefficients say how to read a concept, which is not how the model writes it: they also
    take away what merely goes along with it."""
    null_patterns: dict[str, np.ndarray]
    """The same of shuffled labels, one after another: where differences of means point that mean nothing. Empty without
    controls."""
    directions: pd.DataFrame | None
    """Of the best site: example, group, label, first, second: the examples of one half of the groups along two directions
    (`ProjectAndProbe`) that were fitted on the other half. None for numbers."""

    @property
    def measure(self) -> str:
        """The column that is the score."""
        return "r2" if self.settings["labels_are"] == "numbers" else "accuracy"

    def best(self) -> pd.Series:
        """The row of the site with the best score. It was chosen among all on the same examples, so its score is a little too
        good: `settings["best_beside"]` has the best of all sites on shuffled labels and in the untrained model."""
        return self.table.loc[self.table[self.measure].idxmax()]

    def confusion(self, site: str | None = None) -> pd.DataFrame:
        """Share of each class (rows) that a site's probe takes for each (columns); of the best site, if none is named.

        Raises:
            UnknownOption: for numbers, or a site that was not swept.
        """
        own = self.at(site)
        if self.settings["labels_are"] == "numbers":
            raise UnknownOption("Numbers have no confusion. Look at .predictions, or plot('map').")
        import pandas as pd

        return pd.crosstab(own["label"], own["predicted"], normalize="index")

    def at(self, site: str | None = None) -> pd.DataFrame:
        """Held-out predictions of a site; of the best, if none is named.

        Raises:
            UnknownOption: if it was not swept.
        """
        site = site or str(self.best()["site"])
        if site not in set(self.table["site"]):
            raise UnknownOption(f"Site {site!r} was not swept. Swept were {', '.join(self.table['site'])}.")
        return self.predictions[self.predictions["site"] == site].reset_index(drop=True)

    def plot(self, what: str = "layers", site: str | None = None) -> go.Figure:
        """`layers`: score by layer with controls and bands; `confusion`; `directions`: examples along the two leading
        directions; `map`: places where a probe of coordinates puts them.

        Raises:
            UnknownOption: for a picture that there is not, or not of this kind of probe.
        """
        from probes.plots import plot_sweep

        return plot_sweep(self, what, site)

    def save(self, folder: str | Path) -> Path:
        """Write probe_sweep.parquet, references.parquet, predictions.parquet, directions.parquet, probes.safetensors and, last,
        run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return save_sweep(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> ProbeSweep:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no complete result of this kind.
        """
        return load_sweep(cls, folder)

    def __str__(self) -> str:
        return sweep_text(self)


def sweep(
    model: LanguageModel | Mapping[str, Any],
    dataset: Dataset | str,
    sites: str | Sequence[str] = ("resid_pre.0", "resid_post"),
    *,
    probe: Any = "logistic",
    pool: Pool = "last",
    controls: bool = True,
    folds: int = FOLDS,
    shuffles: int = SHUFFLES,
    seed: int = 0,
    device: str | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> ProbeSweep:
    """Fit a probe at every site, and score it on groups held out, beside controls that say what the score means.

    The model is run over the texts once, and so is one of the same shape with random weights. Strengths are chosen on training
    rows, by the true labels; shuffled labels and the control task are put to the same probe.

    Args:
        model: A model; or rows that are at hand, by name, `[n, d]` each, in the order of the dataset (such as `States`), which
            are then all that is probed.
        dataset: A `Dataset`, a file, or the name of a shipped set.
        sites: As `parse_sites` reads them; all states of the stream, if not given.
        probe: `logistic`, `lda`, `mean`, `sparse`, `project` or `mlp`, for numbers `ridge` or `mlp`; or an estimator of them.
        pool: Of the tokens of the words asked about, the `last`, the `first`, or their `mean`.
        controls: Also the untrained model, shuffled labels and the control task. Without them a score says little.
        folds: Of groups. Where the dataset holds out by two columns, three of each.
        seed: Of folds, shuffles, control task, untrained weights, order of the code, and resamples.
        device: Where probes are fitted; the CPU, if None.
    Raises:
        TooFewExamples: if a class has fewer than two groups, or there are fewer than two folds.
        BadDataset, UnknownOption, NotFinite, OutOfMemory, TextTooLong, UnknownSite: as `Dataset.load` and `collect_states`.
    """
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.load(dataset)
    probe = _estimator(probe, dataset, seed, device)
    if folds < 2 or shuffles < 1:
        raise TooFewExamples(f"folds={folds}, shuffles={shuffles}: two folds are needed at least, and one shuffle.")
    if dataset.kind == "numbers" and (dataset.labels == dataset.labels[0]).all(0).any():
        raise BadDataset(f"A target of {dataset.name!r} is the same in all examples: there is nothing to tell. Leave it out.")
    plan = Plan.of(dataset, folds=folds, shuffles=shuffles, seed=seed)
    twin = None
    if isinstance(model, LanguageModel):
        options: dict[str, Any] = {"pool": pool, "batch_tokens": batch_tokens, "progress": progress}
        states = collect_states(model, dataset, sites, embeddings=True, **options)
        if controls:
            fresh = untrained(model, seed)
            twin = collect_states(fresh, dataset, sites, **options)
            del fresh
        settings = states.settings
    else:
        states = _rows_given(model, dataset)
        settings = (states.settings if isinstance(states, States) else {"model": "rows at hand"}) | dataset.settings
    scored = scored_numbers if dataset.kind == "numbers" else scored_classes
    references = [name for name in (EMBEDDING, BAG) if name in states]
    names = [name for name in states if name not in references]
    score = Scored(plan, seed)
    for name in references:
        scored(score, probe, _rows(states[name], device), name, reference=True)
    for name in tqdm(names, desc="probe", unit="site", disable=not progress):
        beside = None if twin is None else _rows(twin[name], device)
        scored(score, probe, _rows(states[name], device), name, twin=beside, controls=controls)
    fewest = int(plan.splits.train.sum(0).min())
    settings |= {
        "probe": type(probe).__name__, "options": probe.get_params(), "folds": folds, "shuffles": shuffles, "seed": seed,
        "controls": controls, "more_columns_than_rows": [one for one in names if states[one].shape[1] >= fewest],
        "types_recur": plan.seen is not None, "classes": None if dataset.kind == "numbers" else dataset.classes.tolist(),
        "targets": list(dataset.target_names) if dataset.kind == "numbers" else None,
        "held_out_columns": dataset.groups.shape[1], "versions": versions("scikit-learn"),
    }  # fmt: skip
    table, others, predictions = score.tables()
    settings |= {"best_beside": score.best_beside()}
    best = names[int(table["r2" if dataset.kind == "numbers" else "accuracy"].to_numpy().argmax())]
    if isinstance(model, LanguageModel):
        table.insert(1, "layer", [layer_of(name) for name in names])
    else:
        table.insert(1, "layer", range(len(names)))
    return ProbeSweep(
        table=table, settings=settings, references=others, predictions=predictions, probes=score.probes,
        patterns=score.patterns, null_patterns=score.null_patterns,
        directions=_leading(_rows(states[best], device), dataset, seed),
    )  # fmt: skip


def _leading(rows: Tensor, dataset: Dataset, seed: int) -> pd.DataFrame | None:
    """As `ProbeSweep.directions`."""
    import pandas as pd

    if dataset.kind == "numbers" or rows.shape[1] < 2:
        return None
    fold = folds_by_group(dataset.index, dataset.groups[:, 0], 2, seed)
    learnt, drawn = (np.flatnonzero(fold == side) for side in (0, 1))
    found = ProjectAndProbe(2).fit(rows[torch.from_numpy(learnt).to(rows.device)], dataset.labels[learnt])
    first, second = found.transform(rows[torch.from_numpy(drawn).to(rows.device)]).T
    return pd.DataFrame(
        {"example": drawn, "group": dataset.groups[drawn, 0], "label": dataset.labels[drawn], "first": first, "second": second}
    )


def _estimator(probe: Any, dataset: Dataset, seed: int, device: str | None) -> Any:
    """The probe to be fitted to indices of classes.

    Raises:
        UnknownOption: if there is no such probe, or it gives no probabilities.
    """
    numbers = dataset.kind == "numbers"
    if isinstance(probe, str):
        probe = probe_named("ridge" if probe == "logistic" and numbers else probe, dataset.kind, device=device)
        if "seed" in probe.get_params():
            probe.set_params(seed=seed)
    wanted = "predict" if numbers else "predict_log_proba"
    if not all(hasattr(probe, name) for name in (wanted, "variants", "settled")):
        raise UnknownOption(
            f"A {type(probe).__name__} cannot be swept: it has no {wanted}, or no strength to keep. Use one of the probes of "
            "probes.fit that gives probabilities (for numbers, predictions)."
        )
    weights = probe.get_params().get("class_weight")
    if isinstance(weights, dict):
        names = dataset.classes.tolist()
        for name in weights:
            require_one_of("class_weight of", name, tuple(names))
        probe = afresh(probe, class_weight={names.index(name): weight for name, weight in weights.items()})
    return probe


def _rows_given(rows: Mapping[str, Any], dataset: Dataset) -> Mapping[str, Tensor]:
    """
    Raises:
        BadDataset: if some are not of as many examples as the dataset.
    """
    if not rows:
        raise BadDataset("No rows were given to probe. Give some by name, [n, d] each, or a model.")
    if isinstance(rows, States):
        read = rows.dataset
        if dataset.texts is not None and (dataset.texts != read.texts or not np.array_equal(dataset.spans, read.spans)):
            raise BadDataset(f"The states are of the texts of {read.name!r}, not of {dataset.name!r}. Collect states of these.")
    found = {str(name): torch.as_tensor(value) for name, value in rows.items()}
    for name, value in found.items():
        if value.dim() != 2 or len(value) != len(dataset):
            raise BadDataset(f"Rows {name!r} are {list(value.shape)}, the dataset has {len(dataset)} examples. Give [n, d].")
        if not bool(torch.isfinite(value.sum())) and (wrong := ~torch.isfinite(value).all(1)).any():
            row = int(wrong.nonzero()[0])
            raise NotFinite(f"Rows {name!r} hold NaN or infinity, the first in row {row}. Leave it out, or mend it.")
    return rows if isinstance(rows, States) else found


def _rows(states: Tensor, device: str | None) -> Tensor:
    """As probes multiply them."""
    return states.to(device or "cpu", torch.float64 if states.dtype == torch.float64 else torch.float32)
