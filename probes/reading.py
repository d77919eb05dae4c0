"""What a probe's direction says: in words, and by the neurons that write it or read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probes.probe_sweep import ProbeSweep
from workbench.analyses.decoded_directions import DecodedDirections, decode_directions
from workbench.artifacts import write_tables
from workbench.errors import MissingWeight, UnknownOption, UnknownSite, require_one_of
from workbench.model import LanguageModel
from workbench.results import Result, versions
from workbench.sites import Site
from workbench.tokens import shown

if TYPE_CHECKING:
    import pandas as pd

RANDOM = 100
"""Random directions of the null, where there are none of shuffled labels."""
STREAM = ("resid_pre", "resid_mid", "resid_post", "embed", "attn_out", "mlp_out")
"""Sites whose vectors are as wide as the stream and mean in it what the vocabulary reads."""


@dataclass(frozen=True, eq=False, repr=False)
class ProbeReading(Result):
    """`table`: the neurons nearest to each direction; columns direction, role (`writes`: a row of W_out below the site;
    `reads`: a column of W_in or W_gate above it; dense MLPs alone), layer, neuron, side, cosine, and null: the size of the
    cosine of the nearest neuron to any of the directions that `settings["null"]` names, those of shuffled labels or random
    ones."""

    words: DecodedDirections
    """The directions in the vocabulary, both ends, beside random ones."""

    def save(self, folder: str | Path) -> Path:
        """Write the words into `words/`, probe_reading.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        self.words.save(Path(folder) / "words")
        return write_tables(folder, "probe_reading", self.settings, {"probe_reading": self.table})

    def __str__(self) -> str:
        own = self.settings
        lines = [f"{own['what']} of {own['dataset']} at {own['site']} of {own['model']}"]
        for row in self.words.best().to_dict("records"):
            lines += [
                f"  {row['name']}",
                f"    {row['score']:+6.1f} {shown(row['word'])!r}: {row['tokens']}",
                f"    {row['bottom_score']:+6.1f} {shown(row['bottom_word'])!r}: {row['bottom_tokens']}",
            ]
        for (direction, role), some in self.table.groupby(["direction", "role"], sort=False):
            near = ", ".join(f"{one.layer}.{one.neuron} {one.side} {one.cosine:+.2f}" for one in some.head(5).itertuples())
            lines.append(f"  {direction}: neurons that {role[:-1]} it: {near} ({own['null']}: {some['null'].iloc[0]:.2f})")
        return "\n".join([*lines, "  .words .table .save(folder)"])


@torch.no_grad()
def read_probe(
    model: LanguageModel,
    probe: ProbeSweep | Tensor | np.ndarray | Mapping[str, Any],
    site: str | None = None,
    *,
    what: str = "pattern",
    k: int = 10,
    neurons: int = 10,
    seed: int = 0,
) -> ProbeReading:
    """Read the directions of a probe.

    Args:
        probe: A sweep, of which a `site` is read (the best, if none is named); or directions `[n, d_model]`, or by name, with
            the site that they are of.
        what: Of a sweep, the `pattern` that the states of a class share, or the probe's `weights`.
        k: Words of each end.
        neurons: Of each role, nearest by the size of the cosine.
    Raises:
        UnknownSite: for a site that is not of the stream's width.
        UnknownOption: if the sweep has no such site, or another model's width.
    """
    import pandas as pd

    named, null, site, about = _directions(probe, site, what)
    place = Site.parse(site, model.n_layers)
    if place.name not in STREAM:
        raise UnknownSite(f"A direction of {site} cannot be read by the vocabulary. Probe a state, such as resid_post.3.")
    unit = torch.stack([one / one.norm() for one in named.values()]).to(model.vocabulary.W_U.device, torch.float32)
    words = decode_directions(model, dict(zip(named, unit.split(1), strict=True)), k=k, seed=seed, progress=False)
    layer = -1 if place.name in ("embed", "resid_pre") and not place.layer else int(place.layer or 0)
    below = layer if place.name in ("resid_post", "mlp_out") else layer - 1
    if null is None:
        null = torch.randn(RANDOM, model.d_model, generator=torch.Generator().manual_seed(seed))
        about["null"] = "random directions"
    null = (null / null.norm(dim=1, keepdim=True)).float()
    tables = []
    for role, sides, layers in (
        ("writes", ("W_out",), range(0, max(below, -1) + 1)), ("reads", ("W_in", "W_gate"), range(below + 1, model.n_layers)),
    ):  # fmt: skip
        found = _nearest(model, unit, null, list(named), sides, layers, neurons)
        tables += [] if found is None else [found.assign(role=role)]
    columns = ["direction", "role", "layer", "neuron", "side", "cosine", "null"]
    table = pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    settings = model.provenance | about | {"site": site, "what": what, "k": k, "seed": seed, "versions": versions()}
    return ProbeReading(table=table, settings=settings, words=words)


def _directions(probe: Any, site: str | None, what: str) -> tuple[dict[str, Tensor], Tensor | None, str, dict[str, Any]]:
    """Directions by name, those of shuffled labels, the site, and what is known of them."""
    if not isinstance(probe, ProbeSweep):
        if site is None:
            raise UnknownOption("Directions by themselves do not say where they are from. Name the site.")
        rows = probe if isinstance(probe, Mapping) else {f"direction {i}": row for i, row in enumerate(torch.as_tensor(probe))}
        named = {str(name): torch.as_tensor(row).double().flatten() for name, row in rows.items()}
        return named, None, site, {"dataset": "given"}
    require_one_of("what", what, ("pattern", "weights"))
    site = site or str(probe.best()["site"])
    own = probe.settings
    if site not in probe.patterns or (what == "weights" and not hasattr(probe.probes.get(site), "coef_")):
        raise UnknownOption(f"The sweep has no {what} of site {site!r}. It has {', '.join(probe.patterns)}.")
    rows = probe.patterns[site] if what == "pattern" else np.atleast_2d(probe.probes[site].coef_)
    names = own["targets"] or ([f"{own['classes'][1]} - {own['classes'][0]}"] if len(rows) == 1 else own["classes"])
    named = {str(name): torch.from_numpy(np.ascontiguousarray(row)) for name, row in zip(names, rows, strict=True)}
    about = {"dataset": own["dataset"], "null": "shuffled labels"}
    null = torch.from_numpy(probe.null_patterns[site]) if what == "pattern" and site in probe.null_patterns else None
    return named, null, site, about


def _nearest(
    model: LanguageModel, unit: Tensor, null: Tensor, names: list[str], sides: tuple[str, ...], layers: range, n: int
) -> pd.DataFrame | None:
    """Neurons of the largest cosines with each direction, and what those of the null reach."""
    import pandas as pd

    parts, most = [], torch.zeros(len(null))
    for layer in layers:
        for side in sides:
            try:
                weight = model.optional_weight(side, layer)
            except MissingWeight:  # routed experts
                weight = None
            if weight is None:
                continue
            rows = (weight if side == "W_out" else weight.T).to(unit.device, torch.float32)
            rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
            most = torch.maximum(most, (rows @ null.T.to(rows.device)).abs().amax(0).cpu())
            cosines = rows @ unit.T
            best = cosines.abs().topk(min(n, len(rows)), dim=0).indices
            for i, name in enumerate(names):
                at = best[:, i]
                parts.append(
                    pd.DataFrame(
                        {"direction": name, "layer": layer, "neuron": at.cpu().numpy(), "cosine": cosines[at, i].cpu().numpy(),
                         "side": {"W_out": "down", "W_in": "up", "W_gate": "gate"}[side]}
                    )
                )  # fmt: skip
    if not parts:
        return None
    table = pd.concat(parts).assign(null=float(most.max()))
    table = table.sort_values("cosine", key=lambda own: -own.abs(), kind="stable").groupby("direction", sort=False).head(n)
    return table.sort_values("direction", key=lambda own: own.map(names.index), kind="stable")
