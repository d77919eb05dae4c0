"""Probes whose strength is chosen, and probes like them."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar, cast

from sklearn.base import BaseEstimator, clone

Probe = TypeVar("Probe")
Chosen = TypeVar("Chosen", bound="Strength")


class Strength(BaseEstimator):
    """A probe with an option that `"cv"` chooses: `option` names it, the same with an s its candidates, with a _ what was
    found."""

    option: ClassVar[str] = ""
    """None, if empty: nothing is chosen."""

    def variants(self: Chosen) -> list[Chosen]:
        """This probe, not fitted, at each strength that it would choose among."""
        if not self.option or getattr(self, self.option) != "cv":
            return [afresh(self)]
        return [afresh(self, **{self.option: one}) for one in self._candidates()]

    def settled(self: Chosen) -> Chosen:
        """A new one of the strength that this one found, to be fitted to other labels."""
        return afresh(self, **({self.option: getattr(self, f"{self.option}_")} if self.option else {}))

    def _candidates(self) -> list[float]:
        return [float(one) for one in getattr(self, f"{self.option}s")]


def afresh(probe: Probe, **options: Any) -> Probe:
    """A probe with the same options but these, not fitted."""
    found: Any = clone(cast(Any, probe))
    return found.set_params(**options)
