"""What a screen shows of each kind of result on disk: its tables and pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.plain import answer
from workbench.errors import UnknownOption


def neuron_map(found: Any) -> dict[str, Any]:
    tables = {"summary": found.summary(), "specialised": found.specialised(100)}
    return answer(found, tables, {"neurons": found.plot()})


def transport(found: Any) -> dict[str, Any]:
    return answer(found, found.tables(), dict(found.figures()), text=found.paragraph())


def linearity(found: Any) -> dict[str, Any]:
    ranking = None if found.damage is None else found.ranking()
    tables = {"table": found.table, "overview": found.overview(), "ranking": ranking, "damage": found.damage}
    return answer(found, tables, {"linearity": found.plot()}, text=found.paragraph())


def shortcuts(found: Any) -> dict[str, Any]:
    return answer(
        found, {"table": found.table, "overview": found.overview()}, {"shortcuts": found.plot()}, text=found.paragraph()
    )


def lens_quality(found: Any) -> dict[str, Any]:
    return answer(found, {"table": found.table, "saved": found.saved}, {"quality": found.plot()}, text=_said(found))


def probe_sweep(found: Any) -> dict[str, Any]:
    tables = {"table": found.table, "references": found.references}
    return answer(found, tables, _pictures(found, ("layers", "confusion", "directions", "map")), text=_said(found))


def erasure(found: Any) -> dict[str, Any]:
    tables = {"table": found.table, "curve": found.curve}
    pictures = _pictures(found, ("leaks", "curve", "scatter"))
    return answer(found, tables, pictures, text=_said(found), erasers=list(found.erasers))


def scrubbing(found: Any) -> dict[str, Any]:
    tables = {"table": found.table, "curve": found.curve, "texts": found.texts}
    return answer(found, tables, _pictures(found, ("bars", "curve", "profile")), text=_said(found))


def followed(found: Any) -> dict[str, Any]:
    return answer(found, None, {"followed": found.plot()}, text=_said(found))


def top_activations(found: Any) -> dict[str, Any]:
    return answer(found, {"statistics": found.statistics.head(2000)})


def map_comparison(found: Any) -> dict[str, Any]:
    tables = {"summary": found.summary(), "changed": found.changed(100)}
    return answer(found, tables, {"comparison": found.plot()}, text=found.headline())


def backward_lens(found: Any) -> dict[str, Any]:
    return answer(found, {"table": found.table, "targets": found.targets}, {"gradient": found.plot()})


def lens(found: Any) -> dict[str, Any]:
    tables = {"table": found.table, "positions": found.positions, "by_layer": found.by_layer()}
    return answer(found, tables, {"lens": found.plot(), "trajectories": found.plot_trajectories()})


SHOWN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "neuron map": neuron_map, "transport": transport, "linearity": linearity, "shortcuts": shortcuts,
    "lens_quality": lens_quality, "probe_sweep": probe_sweep, "erasure": erasure, "scrubbing": scrubbing, "followed": followed,
    "top activations": top_activations, "map comparison": map_comparison, "backward_lens": backward_lens, "lens": lens,
}  # fmt: skip


def _pictures(result: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Those that this result has: a sweep of numbers has no confusion, an erasure without INLP no curve."""
    found = {}
    for name in names:
        try:
            found[name] = result.plot(name)
        except UnknownOption:
            continue
    return found


def _said(result: Any) -> str:
    """What it prints, without the line that names what Python has of it."""
    return "\n".join(line for line in str(result).split("\n") if not line.startswith("  ."))
