"""What is kept of a batch's tensors: real tokens alone, in another dtype, on another device if asked for.

From a GPU to the CPU they go through pinned memory on a stream of their own, each site as soon as it is there: the copies
run beside the layers after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.errors import NotFinite
from workbench.streaming.batches import Tokens
from workbench.tracer import Place


@dataclass(eq=False)
class Flat:
    """Called with each place's tensor `[batch, pos, …]`, gives what is kept of it, `[token, …]`."""

    real: Tensor | None
    """Where the real tokens stand in the flattened batch; None: all are real."""
    dtype: torch.dtype | None
    device: torch.device
    """Where what is kept goes."""
    normed: Place | None
    """The place whose tokens' norms are taken."""
    wanted: frozenset[Place]
    norms: Tensor | None = None
    _sums: dict[Place, Tensor] = field(default_factory=dict)
    _copied: "torch.cuda.Event | None" = None

    def __call__(self, place: Place, value: Tensor) -> Tensor:
        value = value.flatten(0, 1)
        if self.real is not None:
            value = value.index_select(0, self.real.to(value.device))
        if place == self.normed:
            self.norms = value.flatten(1).float().norm(dim=1)
        if place not in self.wanted:
            assert self.norms is not None
            return self.norms
        value = value if self.dtype is None else value.to(self.dtype)
        self._sums[place] = value.sum(dtype=torch.float32) if value.is_floating_point() else value.new_zeros(())
        if value.device == self.device:
            return value
        if value.device.type != "cuda" or self.device.type != "cpu":
            return value.to(self.device)
        return self._through_pinned_memory(value)

    def _through_pinned_memory(self, value: Tensor) -> Tensor:
        kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        side = _side_stream(value.device)
        side.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(side):
            kept.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        value.record_stream(side)  # so that its memory is not given to another tensor before it was copied
        return kept

    def finish(self, kept: Mapping[Any, Tensor], tokens: Tokens) -> None:
        """Wait until everything is there, and is numbers.

        Args:
            tokens: What is known of the real tokens.
        Raises:
            NotFinite: naming the first place that holds NaN or infinity, and the first token there.
        """
        if self._copied is not None:
            self._copied.synchronize()
        # All sums are read at once: on a GPU, waiting for each in turn would show.
        totals = list(self._sums.values())
        sums = torch.stack([total.to(totals[0].device) for total in totals])
        if bool(torch.isfinite(sums).all()):
            return
        for place in self._sums:
            wrong = ~torch.isfinite(kept[place]).flatten(1)
            if n := int(wrong.sum()):
                first = int(wrong.any(1).nonzero()[0])
                raise NotFinite(
                    f"{place} holds {n} values that are NaN or infinite, in {kept[place].dtype}, the first at position "
                    f"{tokens.pos[first]} of row {tokens.row[first]}, in document {tokens.document[first]}. Keep it in "
                    "a dtype of wider range (bfloat16 or float32), leave the document out, or find where they arise with "
                    "wb.capture."
                )


_SIDE: dict[torch.device, "torch.cuda.Stream"] = {}


def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    if device not in _SIDE:
        _SIDE[device] = torch.cuda.Stream(device)
    return _SIDE[device]
