"""A lens: for every state of the stream, a linear map to the last one; the model's own norm and head read what it gives.

The logit lens (nostalgebraist 2020) takes states as they are; `shortcut` fits least-squares maps ("Jump to Conclusions", Yom
Din et al. 2024, arXiv 2303.09435). The norm is always that of the mapped state itself, never one that was kept from the last
state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from workbench.errors import NotComparable
from workbench.model import LanguageModel
from workbench.sites import state, state_number
from workbench.transports.fit import Transports
from workbench.transports.transport import Transport


@dataclass(frozen=True, eq=False, repr=False)
class Lens:
    """Maps by the number of the state they begin at (0 enters the first block); the last state is read as it is."""

    kind: str
    maps: Mapping[int, Transport]
    settings: dict[str, Any]
    """The model, and how the maps were made."""

    def __repr__(self) -> str:
        return f"Lens({self.kind}, {len(self.maps)} maps of {self.settings['model']!r})"

    @classmethod
    def logit(cls, model: LanguageModel) -> Lens:
        """Every state as it is."""
        n = model.n_layers
        last = state(n, n)
        one = Transport.identity(model, state(0, n), last)
        maps = {number: Transport.identity(model, state(number, n), last) for number in range(n)}
        return cls("logit", maps, one.settings)

    @classmethod
    def of(cls, transports: Transports, kind: str = "shortcut") -> Lens:
        """Of fitted maps to the last state.

        Raises:
            NotComparable: if a map does not begin at a state of the stream, or end at the last one.
        """
        n = transports.settings["n_layers"]
        maps: dict[int, Transport] = {}
        for one in transports.values():
            number = state_number(one.source, n)
            if number is None or one.target != state(n, n):
                raise NotComparable(
                    f"{one!r} is no map from a state to the last one ({state(n, n)}), as a lens needs. Collect moments with "
                    "pairs='last', and fit their transports."
                )
            maps[number] = one
        return cls(kind, maps, transports.settings)

    def read(self, states: Float[Tensor, "... d_model"], number: int) -> Float[Tensor, "... d_model"]:
        """What the states of this number would be at the last layer, in their dtype.

        Raises:
            NotComparable: if the lens has no map from there.
        """
        if number == self.settings["n_layers"] or self.kind == "logit":
            return states
        if number not in self.maps:
            raise NotComparable(f"{self!r} has no map from state {number}; it has {', '.join(map(str, sorted(self.maps)))}.")
        return self.maps[number](states)

    def require_model(self, model: LanguageModel) -> None:
        """
        Raises:
            OtherJob: if it is of another model or revision.
        """
        for one in list(self.maps.values())[:1]:
            one.require_model(model)

    def save(self, folder: str | Path) -> Path:
        """Write transports.safetensors and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        from workbench.transports.files import save_transports

        return save_transports(list(self.maps.values()), self.settings | {"lens": self.kind}, folder)

    @classmethod
    def load(cls, folder: str | Path, *, model: LanguageModel | None = None) -> Lens:
        """Read what `save` wrote.

        Args:
            model: The model that it is to be used with.
        Raises:
            BadArtifact: if the folder holds no lens, or a damaged one.
            OtherJob: if it is of another model.
        """
        transports = Transports.load(folder, model=model)
        return cls.of(transports, transports.settings.get("lens", "shortcut"))
