"""Edits as JSON: what a notebook tried, the command line and the app can do again.

A tensor is `{"dtype", "shape", "base64"}`, its bytes little-endian: exact, and nothing that runs when it is read.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import MISSING, fields
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.artifacts import read_json, write_json
from workbench.edits.edit import KINDS, SELECTORS, Edit, indices
from workbench.edits.kinds import Replace
from workbench.errors import BadArtifact, UnknownOption

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_edits(path: str | Path, edits: Sequence[Edit]) -> Path:
    """Write edits to a JSON file.

    Raises:
        UnknownOption: if one of them is a function.
        CannotWrite: if the file cannot be written.
    """
    write_json(Path(path), {"edits": [to_json(edit) for edit in edits]})
    return Path(path)


def load_edits(path: str | Path) -> list[Edit]:
    """Read edits from a JSON file.

    Raises:
        BadArtifact: if it is none, or holds an edit that cannot be understood.
    """
    found = read_json(Path(path))
    if not isinstance(found, dict) or not isinstance(found.get("edits"), list):
        raise BadArtifact(f'{str(path)!r} holds no edits. It should be {{"edits": [{{"kind": "clamp", "site": …}}, …]}}.')
    return [from_json(one) for one in found["edits"]]


def to_json(edit: Edit) -> dict[str, Any]:
    """Plain values; what has its default is left out.

    Raises:
        UnknownOption: if it is a function, which no JSON holds.
    """
    if isinstance(edit, Replace):
        raise UnknownOption(f"{edit!r} is a Python function and cannot be saved. Save the tensors it makes, with add or patch.")
    given = {one.name: getattr(edit, one.name) for one in fields(edit)}
    changed = {one.name: given[one.name] for one in fields(edit) if one.default is MISSING or given[one.name] != one.default}
    return {"kind": edit.kind} | {name: _plain(value) for name, value in changed.items()}


def from_json(value: Any) -> Edit:
    """The edit of its plain values.

    Raises:
        BadArtifact: if they make none.
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in KINDS or KINDS[kind] is Replace:
        known = ", ".join(name for name, one in KINDS.items() if one is not Replace)
        raise BadArtifact(f"An edit of the kind {kind!r} is not known. Kinds are {known}.")
    try:
        return KINDS[kind](**{name: _read(name, item) for name, item in value.items() if name != "kind"})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # also WorkbenchErrors: here they are the file's fault
        names = ", ".join(one.name for one in fields(KINDS[kind]))
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise BadArtifact(f"The edit {kind!r} cannot be read: {reason} It has the fields {names}.") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        dtype = str(value.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(value.shape), "base64": base64.b64encode(data).decode()}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value


def _read(name: str, value: Any) -> Any:
    """A field of an edit, of what JSON holds.

    Raises:
        TypeError, ValueError, KeyError, RuntimeError: if it cannot be one.
    """
    if name in ("vector", "basis", "read", "center"):
        return _finite(_tensor(value))
    if name == "values":
        return {str(site): _tensor(item) for site, item in dict(value).items()}
    if name in ("value", "factor"):
        return float(value)
    if name in SELECTORS:
        return indices(name, value)
    if name == "lengths":
        return tuple(map(index, value))
    return index(value) if name in ("seed", "skip") else str(value)


def _tensor(value: Any) -> Tensor:
    dtype = {str(one).removeprefix("torch."): one for one in _DTYPES}[value["dtype"]]
    data = np.frombuffer(base64.b64decode(value["base64"], validate=True), np.uint8).copy()
    found = torch.from_numpy(data).view(dtype) if data.size else torch.empty(0, dtype=dtype)
    return found.reshape(value["shape"])


def _finite(value: Tensor) -> Tensor:
    if not torch.isfinite(value).all():
        raise ValueError("it holds NaN or infinity.")
    return value
