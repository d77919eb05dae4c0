"""How linear each block, attention and MLP is: a score that says what is in it.

Source: Razzhigaev et al. 2024 (arXiv 2405.12250). Their score is the share of the centred stream after a block that a linear
map of the stream before it explains, on the tokens it was fitted on: `1 - min ‖XA - Y‖²` with X and Y centred and of norm 1,
the variance- weighted R² of least squares. They report 0.99 for every decoder they try. Four things can make it so that are not
linearity, and each is shown beside it here:

- sinks: the few tokens of massive norm, of which a map that separates them from the others explains nearly all variance:
  `strata` is `all` or `ordinary` (`workbench.corpus.corpus.STRATA`);
- the residual: the stream after a block contains the one before it. `residual` is True for Y = x + what is added, False for
  what is added alone;
- the fit: with n tokens of d numbers, noise scores d / (n - 1). So `in_sample` stands beside `adjusted`, and `held_out`, of
  documents that the map was not fitted on;
- chance: `null_in_sample` and `null_held_out` are of targets that come from other documents. `unrelated_in_sample` and
  `unrelated_held_out` are of the stream's own residual with what is added taken from other documents: what the score would be
  with the residual as it is, if what a block adds had nothing to do with what it reads.

We also differ in this: each part's own input is its X (the MLP's is the stream after attention), rank-deficient inputs are
solved by eigenvalues above the noise of the sums (theirs divides by every singular value), and the last block is scored too,
before the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm.auto import tqdm

from workbench.analyses.layer_moments import PARTS, LayerMoments, LayerSites, Part, Turning
from workbench.analyses.layer_scores import layer_rows, with_sinks
from workbench.analyses.linearity_damage import WAYS, Damage, agreement, measure_damage
from workbench.artifacts import read_tables, write_tables
from workbench.collecting import collect_moments
from workbench.corpus.corpus import Corpus
from workbench.errors import TooFewTokens, UnknownOption, require_one_of
from workbench.model import LanguageModel
from workbench.moments.moments import Moments, Strata
from workbench.results import Result, wrapped
from workbench.sites import parse_layers
from workbench.transports.fit import Recipe

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "linearity"


@dataclass(frozen=True, eq=False, repr=False)
class Linearity(Result):
    """`table` has a row a layer, part (block, attn, mlp), strata (all, ordinary) and residual (whether the target holds
    the input).

    n: tokens. in_sample (as published), adjusted, held_out, null_in_sample, null_held_out: variance-weighted R².
    uniform_held_out: the mean of R² over coordinates. procrustes: of the best rotation with one factor, in sample. cosine,
    growth: between the stream before and after, mean over tokens. variance: of the target, a token. condition: of the input's
    spread. sinks: the share of the target's variance that is due to tokens that are not ordinary (of `all` alone).

    `damage` has a row a layer: what the loss on held-out documents becomes when the block is removed, or replaced by its map.
    """

    damage: pd.DataFrame | None
    together: pd.DataFrame | None

    def overview(self, part: Part = "block") -> pd.DataFrame:
        """From the published score to what is left of it, a row a layer: published, ordinary (the same without sinks),
        held_out, unrelated (held out, were the additions another document's), added (held out, without the residual), null (of
        that), procrustes, cosine, growth (of ordinary tokens), and the damage, if measured."""
        table = self.table[self.table["part"] == part].set_index("layer")

        def column(name: str, strata: Strata, residual: bool) -> pd.Series:
            return table.loc[(table["strata"] == strata) & (table["residual"] == residual), name]

        wanted: dict[str, tuple[str, Strata, bool]] = {
            "published": ("in_sample", "all", True), "ordinary": ("in_sample", "ordinary", True),
            "held_out": ("held_out", "ordinary", True), "unrelated": ("unrelated_held_out", "ordinary", True),
            "added": ("held_out", "ordinary", False), "null": ("null_held_out", "ordinary", False),
            "procrustes": ("procrustes", "ordinary", True), "cosine": ("cosine", "ordinary", True),
            "growth": ("growth", "ordinary", True),
        }  # fmt: skip
        import pandas as pd

        found = pd.DataFrame({name: column(*where) for name, where in wanted.items() if where[0] in table})
        if self.damage is not None and part == "block":
            found = found.join(self.damage.set_index("layer")[list(WAYS)])
        return found.reset_index()

    def ranking(self) -> pd.DataFrame:
        """Blocks in the order of how non-linear they are by two scores (published; added: held out, without sinks and residual)
        and of what removing or replacing them costs: 1 is the least linear one, and the dearest.

        Raises:
            UnknownOption: if the damage was not measured.
        """
        if self.damage is None:
            raise UnknownOption("The damage was not measured. Pass damage=True.")
        overview = self.overview().set_index("layer")
        scores = (1 - overview[["published", "added"]]).join(overview[list(WAYS)])
        return scores.rank(ascending=False, method="min").astype(int).reset_index()

    def agreement(self) -> pd.DataFrame:
        """Spearman's correlation, over layers, of how non-linear a block is (1 - score) with what removing or replacing it
        costs: a row a score (column, strata, residual), and columns removed, replaced, replaced_later.

        Raises:
            UnknownOption: if the damage was not measured.
        """
        if self.damage is None:
            raise UnknownOption("The damage was not measured. Pass damage=True.")
        return agreement(self.table, self.damage)

    def paragraph(self) -> str:
        """What the numbers mean, in words."""
        from workbench.analyses.linearity_text import paragraph

        return paragraph(self)

    def plot(self) -> go.Figure:
        """Scores by layer for each part, as published and what is left of it, and the damage."""
        from workbench.plots.linearity import plot_linearity

        return plot_linearity(self)

    def save(self, folder: str | Path) -> Path:
        """Write linearity.parquet, damage.parquet and together.parquet, if measured, and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return write_tables(folder, KIND, self.settings, self._tables())

    @classmethod
    def load(cls, folder: str | Path) -> Linearity:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        table, others, settings = read_tables(folder, KIND, "workbench linearity", ("damage", "together"))
        return cls(table=table, settings=settings, **others)

    def __str__(self) -> str:
        lines = self.overview(self._first).round(3).to_string(index=False, max_rows=12)
        return f"{wrapped(self.paragraph())}\n\n{lines}\n  .table .damage .overview() .agreement() .plot() .save(folder)"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.paragraph())}</p>{self.overview(self._first).round(3).to_html(index=False)}"

    @property
    def _first(self) -> Part:
        return self.table["part"].iloc[0]

    def _tables(self) -> dict[str, pd.DataFrame | None]:
        return {"linearity": self.table, "damage": self.damage, "together": self.together}


def linearity(
    model: LanguageModel,
    corpus: Corpus | Any,
    *,
    layers: str | None = None,
    parts: Sequence[Part] = PARTS,
    kind: Literal["ols", "ridge"] = "ols",
    null: bool = True,
    damage: bool = True,
    loss_tokens: int = 2048,
    together: int = 0,
    on_policy: bool = False,
    batch_tokens: int | None = None,
    massive_at: str | None = "middle",
    seed: int = 0,
    progress: bool = True,
) -> Linearity:
    """Score how linear each layer is on a corpus, and measure what it costs to treat it as linear.

    Documents with an even ordinal are one fold and those with an odd one the other; each is scored by the map of the other.
    Damage is measured on documents of the second fold, with maps of the first.

    Args:
        layers: As `parse_layers` reads them; all, if None.
        kind: `ols` as published, or `ridge`, for few tokens.
        null: Also score targets from other documents: half of the sums' cost.
        damage: Also remove each block, and replace it by its map, and measure the loss.
        loss_tokens: Tokens that the loss is measured on.
        together: Remove and replace so many blocks at once too, the most linear ones (by the published score).
        on_policy: For `together`: also with maps that are fitted one after the other from the bottom, each on what the replaced
            blocks below it give. One pass over the corpus for each.
        batch_tokens, massive_at: As in `stream`.
        seed: Of the shuffling of documents.
    Raises:
        TooFewTokens: if least squares has too few tokens, or there is only one document.
        OutOfMemory, UnknownSite, LayerOutOfRange, UnknownOption, BadCorpus, NotFinite: as `collect_moments`.
    """
    import pandas as pd

    chosen = parse_layers(layers, model.n_layers)
    for part in parts:
        require_one_of("parts", part, PARTS)
    if not parts:
        raise UnknownOption(f"parts=[]: there is nothing to score. Use some of {', '.join(PARTS)}.")
    require_one_of("kind", kind, ("ols", "ridge"))
    if not 0 <= together <= len(chosen) or loss_tokens < 2:
        raise UnknownOption(
            f"together={together}, loss_tokens={loss_tokens}: at most {len(chosen)} layers, and 2 tokens or more."
        )
    if damage and "block" not in parts:
        raise UnknownOption(f"parts={list(parts)}: damage is of blocks. Add 'block', or pass damage=False.")
    if (together and not damage) or (on_policy and not together):
        raise UnknownOption("together= needs damage=True, and on_policy= needs together=. Ask for them too, or leave it out.")
    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    sites = {layer: LayerSites.of(model, layer) for layer in chosen}
    turning = Turning(sites)
    common: dict[str, Any] = {"batch_tokens": batch_tokens, "massive_at": massive_at, "seed": seed, "progress": progress}
    moments = collect_moments(
        model, corpus, [], [pair for own in sites.values() for pair in own.pairs],
        null=[pair for own in sites.values() for pair in own.null_pairs] if null else False, detail="two", folds=2,
        watch=turning, **common,
    )  # fmt: skip
    _require_two_documents(moments)
    recipe = Recipe(kind)
    for fold in (0, 1):  # before the fits begin: ordinary tokens of one fold are the fewest that any of them has
        recipe.require_tokens(LayerMoments(moments, sites[chosen[0]], "ordinary", [fold]).joint("block", residual=False))
    rows = [
        row
        for layer in tqdm(chosen, desc="fit", disable=not progress)
        for row in layer_rows(moments, sites[layer], layer, recipe, parts, turning)
    ]
    table = with_sinks(pd.DataFrame(rows))
    settings = moments.settings | {
        "d_model": model.d_model, "layers": chosen, "parts": list(parts), "fit": kind, "null": null,
        "loss_tokens": loss_tokens if damage else None, "unshuffled": moments.unshuffled if null else None,
        "together": together, "on_policy": on_policy,
    }  # fmt: skip
    found = Damage(None, None, {})
    if damage:
        found = measure_damage(
            model, corpus, moments, sites, recipe, table, tokens=loss_tokens, together=together, on_policy=on_policy,
            common=common,
        )  # fmt: skip
    return Linearity(table=table, settings=settings | found.settings, damage=found.table, together=found.together)


def _require_two_documents(moments: Moments) -> None:
    by_fold = moments.sums.n.sum(0)
    if not bool((by_fold > 0).all()):
        raise TooFewTokens(
            f"All {int(by_fold.sum()):,} tokens are of a single document, or of every other one, so there is none to hold out. "
            "Give the corpus more of them: in a .txt file blank lines part documents."
        )
