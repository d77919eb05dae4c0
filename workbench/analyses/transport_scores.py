"""What `wb.transport` found: tables by pair, rank, direction, route and replacement, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.artifacts import read_tables, write_tables
from workbench.errors import UnknownOption
from workbench.moments.moments import Strata
from workbench.results import Result, wrapped

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "transport"
TABLES = ("transport", "curves", "directions", "routes", "damage")
PICTURES = ("transport", "decay", "curves", "directions")


@dataclass(frozen=True, eq=False, repr=False)
class TransportScores(Result):
    """`table` has a row a pair and strata: source, target, from, to (states, if they are any), distance, strata, n, and

    - in_sample, adjusted, held_out, null (shuffled documents): R², variance-weighted; low, high: 95 % of held_out over
      documents, as whitened_held_out_low and so on of other scores (closely, and of the first strata; nan with fewer than 5
      documents in a fold);
    - whitened_in_sample, whitened_held_out, whitened_null: R² with the target whitened; ceiling_in_sample, as published: what
      no map can exceed on the rows of the fit; ceiling: what the map's canonical directions explain of other documents, with
      the best slopes there; efficiency: whitened_held_out / ceiling;
    - fisher, readers (and _null): R² weighed by what the output, or the next block, depends on;
    - size_published, size_null: the participation ratio of canonical correlations, and of those of shuffled documents; size: of
      those alone that exceed, on rows they were not fitted on, every shuffled one (null_edge); correlations_above_null: how
      many;
    - kept_source, kept_target: directions above the precision of the sums; freedom, strength: of the map.

    `curves`: R² by rank (`transport_pairs.curve_rows`). `directions`: a row a direction (`transport_directions`, and from the
    second pass `transport_tokens`). `routes`, `damage`: as their modules say. None where they were not asked for.
    """

    curves: pd.DataFrame | None
    directions: pd.DataFrame | None
    routes: pd.DataFrame | None
    damage: pd.DataFrame | None

    def matrix(self, column: str = "held_out", strata: Strata | None = None) -> pd.DataFrame:
        """A score as a square, sources down and targets across, by state.

        Raises:
            UnknownOption: if there is no such column, or pairs are not of states.
        """
        table = self._of(strata)
        if column not in table or table["from"].isna().any():
            raise UnknownOption(f"column={column!r}: pairs of states have {', '.join(table.select_dtypes('number'))}.")
        return table.pivot(index="from", columns="to", values=column)

    def decay(self, strata: Strata | None = None) -> pd.DataFrame:
        """Scores by distance, medians over pairs: columns distance, pairs, held_out, null, efficiency, fisher, readers,
        size."""
        table = self._of(strata)
        wanted = [name for name in ("held_out", "null", "efficiency", "fisher", "readers", "size") if name in table]
        groups = table.groupby("distance")
        return groups[wanted].median().assign(pairs=groups.size()).reset_index()

    def plot(self, column: str = "held_out") -> go.Figure:
        """Pairs of states as a heatmap: under the cursor, and in `customdata`, the pair as `4>8` and its other scores.

        Raises:
            UnknownOption: if there is no such column, or pairs are not of states.
        """
        from workbench.plots.transport import plot_matrix

        return plot_matrix(self, column)

    def plot_curves(self) -> go.Figure:
        """R² over ranks, a column a pair and a row a metric: each metric's best truncation, the published one, and ceilings.

        Raises:
            UnknownOption: if there are none.
        """
        from workbench.plots.transport import plot_curves

        return plot_curves(self, self._closely("curves"))

    def plot_decay(self) -> go.Figure:
        """Scores by distance, a line a source."""
        from workbench.plots.transport import plot_decay

        return plot_decay(self)

    def plot_directions(self) -> go.Figure:
        """Each direction: how well it is carried where it is active, against all tokens.

        Raises:
            UnknownOption: if no directions were scored.
        """
        from workbench.plots.transport import plot_directions

        return plot_directions(self, self._closely("directions"))

    def figures(self) -> dict[str, go.Figure]:
        """All pictures that this result has, by name."""
        of_states = not self.table["from"].isna().any()
        makers = (self.plot, self.plot_decay, self.plot_curves, self.plot_directions)
        there = (of_states, of_states, self.curves is not None, self.directions is not None)
        return {name: make() for name, make, wanted in zip(PICTURES, makers, there, strict=True) if wanted}

    def paragraph(self) -> str:
        """What the numbers mean, in words."""
        from workbench.analyses.transport_text import paragraph

        return paragraph(self)

    def save(self, folder: str | Path) -> Path:
        """Write transport.parquet, the other tables there are, and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        return write_tables(folder, KIND, self.settings, self.tables())

    @classmethod
    def load(cls, folder: str | Path) -> TransportScores:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        table, others, settings = read_tables(folder, KIND, "workbench transport", TABLES[1:])
        return cls(table=table, settings=settings, **others)

    def tables(self) -> dict[str, pd.DataFrame | None]:
        """All of them, by the names of their files."""
        own = (self.table, self.curves, self.directions, self.routes, self.damage)
        return dict(zip(TABLES, own, strict=True))

    def overview(self) -> pd.DataFrame:
        """The columns that one looks at first."""
        wanted = ["source", "target", "strata", "held_out", "low", "high", "null", "efficiency", "size", "fisher", "readers"]
        return self.table[[name for name in wanted if name in self.table]]

    def __str__(self) -> str:
        lines = self.overview().round(3).to_string(index=False, max_rows=12)
        rest = " ".join(f".{name}" for name, table in list(self.tables().items())[1:] if table is not None)
        return f"{wrapped(self.paragraph())}\n\n{lines}\n  .table {rest} .matrix() .decay() .plot() .save(folder)"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.paragraph())}</p>{self.overview().round(3).to_html(index=False, max_rows=12)}"

    def _closely(self, name: str) -> pd.DataFrame:
        found = self.tables()[name]
        if found is None:
            raise UnknownOption(f"No {name} were made. Name few pairs, or pass closely=True (--closely).")
        return found

    def _of(self, strata: Strata | None) -> pd.DataFrame:
        first = self.settings["strata"][0] if strata is None else strata
        return self.table[self.table["strata"] == first]
