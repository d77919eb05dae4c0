"""Finding words in a neuron map of any size: the text becomes token ids first, then DuckDB reads the rows that hold them.

Imports neither torch nor pandas, so that a search of a map on disk takes a fraction of a second from a cold start.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.analyses.neuron_folder import KIND, VERB
from workbench.artifacts import settings_of
from workbench.errors import BadArtifact, LayerOutOfRange, MissingWeight
from workbench.manifest import note
from workbench.sites import parse_layers
from workbench.tokens import Match, fold, matching_ids, no_such_token

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True)
class Query:
    """Which rows of a neuron map are wanted."""

    text: str
    match: Match = "folded"
    side: str | None = None
    layers: str | None = None
    """`7`, `4:8`, `-1`; all, if None."""
    max_rank: int | None = None
    """Only ranks up to this one; 0 is the top token alone."""


def search(
    query: Query, rows: duckdb.DuckDBPyRelation, tokens: duckdb.DuckDBPyRelation, settings: dict[str, Any]
) -> duckdb.DuckDBPyRelation:
    """The rows of a map whose token is named by the text, best rank and score first.

    Args:
        rows: Columns as in `NeuronMap.table`.
        tokens: Columns token_id, token and folded.
        settings: Of the map: which sides and layers it covers.
    Raises:
        UnknownToken: if the text is no token.
        LayerOutOfRange, MissingWeight: if the map does not cover the layer or side.
    """
    layers = _covered(query, settings)
    # The database narrows 128,000 tokens down; what matches is decided in one place, by matching_ids.
    candidates = tokens if query.match == "regex" else tokens.filter(f"folded = {_quoted(fold(query.text))}")
    ids = matching_ids(candidates.project("token_id, token").fetchall(), query.text, query.match)
    if not ids:
        raise no_such_token((token for (token,) in tokens.project("token").fetchall()), query.text, query.match)
    conditions = [f"token_id IN ({', '.join(map(str, ids))})"]
    if query.side is not None:
        conditions.append(f"side = {_quoted(query.side)}")
    if query.layers is not None:
        conditions.append(f"layer IN ({', '.join(map(str, layers))})")
    if query.max_rank is not None:
        conditions.append(f"rank <= {query.max_rank:d}")
    return rows.filter(" AND ".join(conditions)).order("rank, abs(score) DESC, side, layer, neuron")


def search_folder(folder: Path, query: Query, *, bottom: bool = False) -> duckdb.DuckDBPyRelation:
    """`search` in a map on disk, without loading it.

    Raises:
        BadArtifact: if the folder holds no complete neuron map.
    """
    settings = settings_of(folder, KIND, f"workbench {VERB}")
    note(model={name: settings.get(name) for name in ("model", "revision", "weights_hash")})
    import duckdb

    try:
        connection = duckdb.connect()
        rows = connection.from_parquet(str(folder / f"neurons{'_bottom' if bottom else ''}.parquet"))
        return search(query, rows, connection.from_parquet(str(folder / "tokens.parquet")), settings)
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        raise BadArtifact(f"The neuron map in {str(folder)!r} is damaged ({reason}). Make it again.") from None


def _covered(query: Query, settings: dict[str, Any]) -> list[int]:
    """The layers asked for, all of them in the map; and the side with them."""
    if query.side is not None and query.side not in settings["sides"]:
        raise MissingWeight(
            f"This map holds sides {', '.join(settings['sides'])}, not {query.side!r}. Map that side too (--side all)."
        )
    layers = parse_layers(query.layers, settings["n_layers"])
    lacking = sorted(set(layers) - set(settings["layers"]))
    if query.layers is not None and lacking:
        raise LayerOutOfRange(
            f"This map does not hold layers {', '.join(map(str, lacking))}; it holds {', '.join(map(str, settings['layers']))}."
        )
    return layers


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
