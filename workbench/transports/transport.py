"""A linear map from one site of a model to another: the one object for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import NotComparable, OtherJob, UnknownOption
from workbench.model import LanguageModel
from workbench.sites import Site

if TYPE_CHECKING:
    from workbench.activations import Activations
    from workbench.streaming.token_batch import TokenBatch

OF_THE_MODEL = ("model", "revision", "weights_hash", "family", "dtype", "n_layers")
"""Settings that say of which model a map is."""


@dataclass(frozen=True, eq=False, repr=False)
class Transport:
    """h ↦ h T + b, from a source site to a target site; T is `left`, or `left @ right` if it was made of low rank."""

    source: str
    target: str
    left: Float[Tensor, "dx r"]
    right: Float[Tensor, "r dy"] | None
    bias: Float[Tensor, " dy"]
    settings: dict[str, Any]
    """The model, and how the map was fitted: kind, strata, strength, rank, corpus, …"""
    scores: dict[str, float] = field(default_factory=dict)
    """R² by metric and way, as `frobenius_held_out`; empty where nothing was fitted."""

    def __repr__(self) -> str:
        dx, dy = self.shape
        rank = "" if self.right is None else f", rank {self.right.shape[0]}"
        held_out = self.scores.get("frobenius_held_out")
        score = "" if held_out is None else f", held-out R² {held_out:.4f}"
        return f"Transport({self.pair}, {self.settings['kind']}, [{dx}, {dy}]{rank}{score})"

    @classmethod
    def identity(cls, model: LanguageModel, source: str, target: str) -> Transport:
        """The map that leaves a state as it is: what the logit lens assumes, and what removing blocks does."""
        one = torch.eye(model.d_model, dtype=torch.float64)
        own = of_model(model) | {"kind": "identity", "affine": False}
        return cls(source, target, one, None, torch.zeros(model.d_model, dtype=torch.float64), own)

    @property
    def pair(self) -> str:
        return f"{self.source}>{self.target}"

    @property
    def shape(self) -> tuple[int, int]:
        """Width of the source and of the target."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    @property
    def matrix(self) -> Float[Tensor, "dx dy"]:
        """T, whole."""
        return self.left if self.right is None else self.left @ self.right

    def __call__(self, rows: Float[Tensor, "... dx"]) -> Float[Tensor, "... dy"]:
        """Transported rows, in their dtype; computed in float32, or in float64 if they are.

        Raises:
            NotComparable: if they are of another width.
        """
        if rows.shape[-1] != self.shape[0]:
            raise NotComparable(
                f"Rows of {rows.shape[-1]} numbers were given; {self!r} reads {self.source}, of {self.shape[0]}. Give it that "
                "site's activations."
            )
        dtype = torch.promote_types(rows.dtype, torch.float32)
        left, bias = self.left.to(rows.device, dtype), self.bias.to(rows.device, dtype)
        found = rows.to(dtype) @ left
        if self.right is not None:
            found = found @ self.right.to(rows.device, dtype)
        return (found + bias).to(rows.dtype)

    def of(self, activations: Activations | TokenBatch) -> Tensor:
        """What the map makes of the source's activations, in the target's shape.

        Raises:
            OtherJob: if they are of another model.
            UnknownOption: if they do not hold the source.
        """
        self.require_model(activations.model)
        if self.source not in activations:
            raise UnknownOption(f"{self!r} reads {self.source}; there are {', '.join(activations)}. Capture that site.")
        return self.shaped(activations[self.source], activations.model)

    def shaped(self, value: Tensor, model: LanguageModel) -> Tensor:
        """The map of a source's tensor as the model has it, heads apart, with the target's own axes."""
        axes = [
            [size for axis, size in model.axes(Site.parse(site, model.n_layers)).items() if axis not in ("batch", "pos")]
            for site in (self.source, self.target)
        ]
        rows = self(value.flatten(value.dim() - len(axes[0])))
        return rows if len(axes[1]) == 1 else rows.unflatten(-1, [size or -1 for size in axes[1]])

    def then(self, other: Transport) -> Transport:
        """First this map, then the other: from this one's source to the other's target. It has no scores of its own.

        Raises:
            NotComparable: if the other does not begin where this one ends, or is of another model.
        """
        if other.source != self.target:
            raise NotComparable(f"{self!r} ends at {self.target}, and {other!r} begins at {other.source}. They must meet.")
        self._require_same_model(other.settings, f"{other!r}")
        if self.right is None:
            left, right = self.left.double() @ other.left.double(), other.right
        else:
            left, right = self.left, self.right.double() @ other.matrix.double()
        bias = self.bias.double() @ other.matrix.double() + other.bias
        made = {name: self.settings[name] for name in OF_THE_MODEL} | {
            "kind": "composed",
            "of": [self.settings, other.settings],
        }
        return Transport(self.source, other.target, left, right, bias, made)

    def require_model(self, model: LanguageModel) -> None:
        """
        Raises:
            OtherJob: if the map was fitted to other weights, or to another revision.
        """
        require_weights(self.settings, model, f"{self!r}")

    def save(self, folder: str | Path) -> Path:
        """Write transports.safetensors and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        from workbench.transports.files import save_transports

        return save_transports([self], self.settings, folder)

    @classmethod
    def load(cls, folder: str | Path, *, model: LanguageModel | None = None) -> Transport:
        """Read what `save` wrote.

        Args:
            model: The model that it is to be used with.
        Raises:
            BadArtifact: if the folder holds no transport, several, or a damaged one.
            OtherJob: if it is of another model.
        """
        from workbench.transports.files import load_one

        found = load_one(folder)
        if model is not None:
            found.require_model(model)
        return found

    def _require_same_model(self, settings: Mapping[str, Any], what: str) -> None:
        if settings["weights_hash"] != self.settings["weights_hash"]:
            raise NotComparable(f"{what} is of {settings['model']!r}, not of {self.settings['model']!r}: {self!r}.")


def require_weights(settings: Mapping[str, Any], model: LanguageModel, what: str) -> None:
    """
    Raises:
        OtherJob: if the settings are of other weights than the model's, or of another revision.
    """
    if any(settings[name] != value for name, value in of_model(model).items() if name in ("weights_hash", "revision")):
        raise OtherJob(
            f"{what} is of {settings['model']!r}, revision {settings['revision']}, in {settings['dtype']} "
            f"({settings['weights_hash'][:12]}…), not of the weights of {model.name!r}, revision {model.revision}, in "
            f"{str(model.dtype).removeprefix('torch.')} ({model.weights_hash[:12]}…). Fit one with this model, or load "
            "that one."
        )


def of_model(model: LanguageModel) -> dict[str, Any]:
    """What says of which model a map is."""
    return {name: value for name, value in model.provenance.items() if name in OF_THE_MODEL} | {"n_layers": model.n_layers}
