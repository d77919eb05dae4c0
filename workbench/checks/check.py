"""One identity at one layer, its error, and the tokens that it is tried on."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.errors import MissingWeight, UnreadableWeight
from workbench.model import Batch, LanguageModel

LENGTHS = (7, 4)
"""Tokens in each row of the probe: unequal, so that one row is padded."""


class Check(NamedTuple):
    """One identity at one layer (None: the whole model)."""

    identity: str
    layer: int | None
    error: float
    """NaN if it could not be tried."""
    why: str = ""
    """Why it could not be tried."""
    through: bool = False
    """Whether two passes through all layers are compared, whose roundings add up, not tensors of one place."""


class NothingToSee(Exception):
    """An identity that this model gives no occasion to try: what would have to move is zero, or hidden by a window."""


def check(identity: str, layer: int | None, compute: Callable[[], float], *, through: bool = False) -> Check:
    """The identity with its error: without one where a weight that it needs cannot be read, infinite where shapes do not
    even meet."""
    try:
        return Check(identity, layer, compute(), through=through)
    except (UnreadableWeight, NothingToSee) as reason:
        return Check(identity, layer, float("nan"), str(reason))
    except MISFITS as misfit:
        return Check(identity, layer, *misfitting(misfit))


MISFITS = (RuntimeError, IndexError, KeyError, TypeError, AttributeError, AssertionError, MissingWeight)
"""What is raised where a row does not fit the modules and tensors that it speaks of."""


def misfitting(raised: Exception) -> tuple[float, str]:
    """The error and the reason of a check that could not even be computed; running out of memory is no such thing."""
    if isinstance(raised, torch.OutOfMemoryError):
        raise raised
    return float("inf"), (str(raised).splitlines() or [type(raised).__name__])[0]


def error(found: Tensor, expected: Tensor) -> float:
    """Largest distance of a row from the expected one, relative to the expected row's norm. NaN counts as infinite."""
    dtype = torch.promote_types(expected.dtype, torch.float32)  # the difference of two near float32 numbers is exact
    found, expected = found.detach().to(expected.device, dtype), expected.detach().to(dtype)
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float(errors.nan_to_num(nan=torch.inf).max())


def real(value: Tensor, batch: Batch) -> Tensor:
    """The real tokens' rows of `[batch, pos, …]`, on the device where the tensor is: a model may be spread over several."""
    return value[batch.mask.to(value.device)]


def probe(model: LanguageModel) -> Batch:
    """Two rows of fixed random tokens, right-padded."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.d_vocab, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return Batch(tokens.to(model.device), mask.to(model.device))
