"""Results on disk that a screen shows: by the kind that their run.json names, what reads one and which pictures it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.plain import answer
from workbench.errors import UnknownOption


def neuron_map(folder: str) -> dict[str, Any]:
    from workbench.analyses.neuron_map import NeuronMap

    found = NeuronMap.load(folder)
    tables = {"summary": found.summary(), "specialised": found.specialised(100)}
    return answer(found, tables, {"neurons": found.plot()})


def transport(folder: str) -> dict[str, Any]:
    from workbench.analyses.transport_scores import TransportScores

    found = TransportScores.load(folder)
    return answer(found, found.tables(), dict(found.figures()), text=found.paragraph())


def linearity(folder: str) -> dict[str, Any]:
    from workbench.analyses.linearity import Linearity

    found = Linearity.load(folder)
    tables = {"table": found.table, "overview": found.overview(), "ranking": found.ranking(), "damage": found.damage}
    return answer(found, tables, {"linearity": found.plot()}, text=found.paragraph())


def shortcuts(folder: str) -> dict[str, Any]:
    from workbench.analyses.shortcuts import Shortcuts

    found = Shortcuts.load(folder)
    return answer(
        found, {"table": found.table, "overview": found.overview()}, {"shortcuts": found.plot()}, text=found.paragraph()
    )


def lens_quality(folder: str) -> dict[str, Any]:
    from workbench.analyses.lens_quality import LensQuality

    found = LensQuality.load(folder)
    return answer(found, {"table": found.table, "saved": found.saved}, {"quality": found.plot()}, text=str(found))


def probe_sweep(folder: str) -> dict[str, Any]:
    from probes.probe_sweep import ProbeSweep

    found = ProbeSweep.load(folder)
    tables = {"table": found.table, "references": found.references}
    return answer(found, tables, _pictures(found, ("layers", "confusion", "directions", "map")), text=str(found))


def erasure(folder: str) -> dict[str, Any]:
    from probes.erasing.erasure import Erasure

    found = Erasure.load(folder)
    tables = {"table": found.table, "curve": found.curve}
    pictures = _pictures(found, ("leaks", "curve", "points"))
    return answer(found, tables, pictures, text=str(found), erasers=list(found.erasers))


def scrubbing(folder: str) -> dict[str, Any]:
    from probes.erasing.scrubbing import Scrubbing

    found = Scrubbing.load(folder)
    tables = {"table": found.table, "curve": found.curve, "texts": found.texts}
    return answer(found, tables, _pictures(found, ("bars", "curve", "profile")), text=str(found))


def followed(folder: str) -> dict[str, Any]:
    from probes.erasing.following import Followed

    found = Followed.load(folder)
    return answer(found, None, {"followed": found.plot()}, text=str(found))


def top_activations(folder: str) -> dict[str, Any]:
    from workbench.analyses.top_activations import TopActivations

    found = TopActivations.load(folder)
    return answer(found, {"statistics": found.statistics.head(2000)})


def map_comparison(folder: str) -> dict[str, Any]:
    from workbench.analyses.map_comparison import MapComparison

    found = MapComparison.load(folder)
    tables = {"summary": found.summary(), "changed": found.changed(100)}
    return answer(found, tables, {"comparison": found.plot()}, text=found.headline())


def backward_lens(folder: str) -> dict[str, Any]:
    from workbench.analyses.backward_lens import BackwardLens

    found = BackwardLens.load(folder)
    return answer(found, {"table": found.table, "targets": found.targets}, {"gradient": found.plot()})


def lens(folder: str) -> dict[str, Any]:
    from workbench.analyses.lens import LensView

    found = LensView.load(folder)
    tables = {"table": found.table, "positions": found.positions, "by_layer": found.by_layer()}
    return answer(found, tables, {"lens": found.plot(), "trajectories": found.plot_trajectories()})


KINDS: dict[str, Callable[[str], dict[str, Any]]] = {
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
