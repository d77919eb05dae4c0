"""A lens: for every site of the stream, a linear map to a later state; the model's own norm and head read what it gives.

The logit lens (nostalgebraist 2020) takes states as they are. The others differ in how their maps were made: `shortcut` by
least squares ("Jump to Conclusions", Yom Din et al. 2024, arXiv 2303.09435), `tuned` by training on the output's own
distribution (Belrose et al. 2023, arXiv 2303.08112), `jacobian` from the mean derivative of the last state (Gurnee et al. 2026,
transformer-circuits.pub/2026/workspace). The norm is always that of the mapped state itself, never one that was kept from the
last state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import BadArtifact, NotComparable, require_one_of
from workbench.lenses.foreign import require_own
from workbench.lenses.kinds import KINDS, Kind
from workbench.lenses.unfinished import forget
from workbench.model import LanguageModel
from workbench.sites import Site, depth, state, state_number
from workbench.transports.files import load_transports, save_transports
from workbench.transports.transport import OF_THE_MODEL, Transport, of_model, require_weights

STREAM = ("resid_pre", "resid_mid", "resid_post")
"""What a lens reads: the stream itself, not what is added to it."""


@dataclass(frozen=True, eq=False, repr=False)
class Lens:
    """Maps by the site that they begin at; what comes at or after their target is read as it is."""

    kind: Kind
    maps: Mapping[str, Transport]
    settings: dict[str, Any]
    """The model, and how the maps were made."""

    def __repr__(self) -> str:
        maps = "" if self.kind == "logit" else f", {len(self.maps)} maps to {self.target}"
        return f"Lens({self.kind}{maps}, of {self.settings['model']!r})"

    @classmethod
    def logit(cls, model: LanguageModel) -> Lens:
        """Every state as it is."""
        return cls("logit", {}, of_model(model))

    @classmethod
    def of(cls, transports: Iterable[Transport], kind: Kind, settings: dict[str, Any]) -> Lens:
        """Of maps that begin at sites of the width of the stream, and all end at one state of it.

        Args:
            settings: What all maps have in common, that of the model among it.
        Raises:
            NotComparable: if there is none, one ends elsewhere, or begins after its end.
        """
        require_one_of("kind", kind, KINDS[1:])
        maps = {one.source: one for one in transports}
        n = settings["n_layers"]
        ends = {one.target for one in maps.values()}
        for one in maps.values():
            begins = depth(Site.parse(one.source, n), n)
            if (
                len(ends) > 1
                or state_number(one.target, n) is None
                or one.shape[0] != one.shape[1]
                or begins >= depth(Site.parse(one.target, n), n)
            ):
                raise NotComparable(
                    f"{one!r} is none of the maps of a lens, which all lead from the stream to one later state of it, as "
                    f"{state(n, n)}. Collect moments with pairs='last', and fit their transports."
                )
        if not maps:
            raise NotComparable("A lens needs a map from one state to a later one, and there is none.")
        return cls(kind, maps, settings)

    @property
    def target(self) -> str:
        """The state that its maps lead to."""
        last = state(self.settings["n_layers"], self.settings["n_layers"])
        return next((one.target for one in self.maps.values()), last)

    def read(self, rows: Float[Tensor, "... d_model"], site: str) -> Float[Tensor, "... d_model"]:
        """What the stream at this site would be at the target, in its dtype.

        Raises:
            NotComparable: if the lens has no map from there.
        """
        n = self.settings["n_layers"]
        if self.kind == "logit" or depth(Site.parse(site, n), n) >= depth(Site.parse(self.target, n), n):
            return rows
        if site not in self.maps:
            raise NotComparable(f"{self!r} has no map from {site}; it has {', '.join(self.maps)}.")
        return self.maps[site](rows)

    def require_model(self, model: LanguageModel) -> None:
        """
        Raises:
            OtherJob: if it is of another model or revision.
        """
        require_weights(self.settings, model, f"{self!r}")

    def rounded(self, dtype: torch.dtype) -> Lens:
        """The same lens with maps of another precision, to be kept on disk; they are multiplied in float32 all the same."""
        maps = {
            site: replace(one, left=one.matrix.to(dtype), right=None, bias=one.bias.to(dtype))
            for site, one in self.maps.items()
        }
        return replace(self, maps=maps)

    def save(self, folder: str | Path) -> Path:
        """Write transports.safetensors and, last, run.json; what was kept there of an unfinished fit of this kind goes.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        written = save_transports(list(self.maps.values()), self.settings | {"lens": self.kind}, folder)
        if self.kind not in ("logit", "shortcut"):
            forget(written)
        return written

    @classmethod
    def load(cls, folder: str | Path, *, model: LanguageModel | None = None) -> Lens:
        """Read what `save` wrote.

        Args:
            model: The model that it is to be used with.
        Raises:
            BadArtifact: if the folder holds no lens, or a damaged one.
            OtherJob: if it is of another model.
        """
        require_own(Path(folder))
        maps, settings = load_transports(folder)
        kind = settings.get("lens")
        if kind not in KINDS or not {*OF_THE_MODEL} <= settings.keys():
            raise BadArtifact(
                f"{str(folder)!r} holds transports, but no lens ({kind}; there are {', '.join(KINDS)}). Make one of them: "
                "Lens.of(transports.values(), 'shortcut', transports.settings).save(folder)."
            )
        settings = {name: value for name, value in settings.items() if name != "lens"}
        found = cls(kind, {}, settings) if kind == "logit" else cls.of(maps, kind, settings)
        if model is not None:
            found.require_model(model)
        return found
