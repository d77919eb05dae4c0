"""What a stream found while it ran."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """From this row of this batch on, a pass has no more tokens than this: memory had run out."""

    batch: int
    row: int
    tokens: int


@dataclass
class StreamState:
    """What a stream found while it ran, and another one of the same corpus needs to do the very same."""

    median_norm: float | None = None
    """Of the tokens of the first batch at `massive_at`."""
    limits: list[Limit] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"median_norm": self.median_norm, "limits": [limit._asdict() for limit in self.limits]}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> StreamState:
        return cls(saved["median_norm"], [Limit(**limit) for limit in saved["limits"]])
