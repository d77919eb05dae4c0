"""A linear map in the place of what the model computes: the source is read and the target overwritten, in every forward
pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from workbench.capturing import keeping
from workbench.edits.edit import Edit
from workbench.edits.passing import Pass
from workbench.errors import UnknownOption
from workbench.intervention import intervene
from workbench.model import LanguageModel
from workbench.sites import Site, depth, parse_sites
from workbench.transports.transport import Transport


@contextmanager
def substitute(model: LanguageModel, *transports: Transport, skip: int = 0, one_in: int = 1) -> Iterator[None]:
    """While open, each transport stands in for all that the model computes between its source and its target.

    They are put in place from the bottom of the model upwards, so that one reads what those below it wrote. With the identity
    from the state before a block to the state after it, the block is removed.

    Args:
        skip: Leave the first so many positions of every text as the model computes them. Attention rests on them (4 holds the
            sinks of most models), and a map that was fitted on ordinary tokens says nothing of them.
        one_in: Of the others, only every so-manieth.
    Raises:
        OtherJob: if a transport is of another model.
        UnknownOption: if one ends before it begins.
        UnknownSite, ReadOnlySite: if a site cannot be read, or written.
    """
    ends = []
    for one in transports:
        one.require_model(model)
        source, target = parse_sites([one.source, one.target], model.n_layers)
        if depth(source, model.n_layers) >= depth(target, model.n_layers):
            raise UnknownOption(
                f"{one!r} ends before it begins: a pass computes {target} first. Give the earlier site as source."
            )
        ends.append((depth(target, model.n_layers), source, one))
    with ExitStack() as stack:
        for _, source, one in sorted(ends, key=lambda end: end[0]):
            kept = stack.enter_context(keeping(model, [source], to_the_end=True, gradients=torch.is_grad_enabled()))
            made = partial(_made, one, model, kept, source)
            stack.enter_context(intervene(model, Written(site=one.target, made=made, skip=skip, one_in=one_in)))
        yield


def _made(transport: Transport, model: LanguageModel, kept: Mapping[Site, Tensor], source: Site, seen: Tensor) -> Tensor:
    return transport.shaped(kept[source], model)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Written(Edit):
    """What a function makes of the site's tensor, at all positions, or one in so many of those that are not skipped."""

    made: Callable[[Tensor], Tensor]
    one_in: int = 1

    def new(self, seen: Tensor, site: str, at: Pass) -> Tensor:
        return self.made(seen)

    def tokens(self, at: Pass) -> Tensor:
        return super().tokens(at) & ((at.positions - self.skip) % self.one_in == 0)
