"""What a job will take, said before it starts."""

from typing import NamedTuple

import torch

from workbench.manifest import peak_bytes


class Plan(NamedTuple):
    """Counted over the whole corpus; time and memory are those of its first batch, which was run."""

    documents: int
    rows: int
    tokens: int
    tokens_hash: str
    """Of `workbench.corpus.corpus.Count`."""
    padding: float
    """Share of padding among the tokens that the model is given."""
    batches: int
    bytes: int
    """Of what is kept, all sites and tokens together."""
    seconds: float
    """What the whole would take at the first batch's pace."""
    peak_bytes: int | None
    """The most that this process has held up to now, the model included: of the GPU's memory, if the model is there. None where
    the system does not say."""

    def __str__(self) -> str:
        peak = "unknown" if self.peak_bytes is None else shown_bytes(self.peak_bytes)
        return (
            f"{self.documents:,} documents, {self.rows:,} rows, {self.tokens:,} tokens in {self.batches:,} batches "
            f"({self.padding:.1%} padding); keeps {shown_bytes(self.bytes)}; about {shown_seconds(self.seconds)} "
            f"({self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s); peak memory {peak}"
        )


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held: on the GPU, if that is the device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


def shown_bytes(n: int | float) -> str:
    """As 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def shown_seconds(seconds: int | float) -> str:
    """As 12 s, 5 min or 3.2 h."""
    for unit, size in (("s", 60.0), ("min", 60.0)):
        if seconds < 100 or (unit == "min" and seconds < 100):
            return f"{seconds:.3g} {unit}"
        seconds /= size
    return f"{seconds:.3g} h"
