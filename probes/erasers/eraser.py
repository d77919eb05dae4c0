"""What all erasers are once they are fitted: x - (x - mean) read writeᵀ."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, Unpack, cast

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from probes.erasers.concept import indicators, joint_of
from probes.estimators.inputs import rows_of
from workbench.edits.kinds import ProjectOut
from workbench.edits.make import Where, located
from workbench.errors import BadDataset, OtherJob, UnknownOption
from workbench.model import LanguageModel
from workbench.moments.joint import Joint
from workbench.sites import parse_sites
from workbench.transports.transport import require_weights

Own = TypeVar("Own", bound="Eraser")


class Eraser(TransformerMixin, BaseEstimator):
    """A map that takes a concept out of rows: x - (x - center) read writeᵀ with readᵀ write = 1, so that doing it twice is
    doing it once. What is subtracted lies in the span of `write_`; the mean stays where it is.

    Attributes:
        center_: `[d]`, the rows' mean.
        read_: `[d, rank]`; equal to write_ for an orthogonal projection.
        write_: `[d, rank]`, orthonormal.
        settings_: The model, site and dataset that it was fitted to, as far as they are known.
    """

    center_: Float[Tensor, " d"]
    read_: Float[Tensor, "d rank"]
    write_: Float[Tensor, "d rank"]
    device: str | None

    def fit(self: Own, X: Any, y: Any = None, *, groups: Any = None) -> Own:
        """
        Args:
            X: `[n, d]`, an array or a tensor on any device.
            y: The concept: labels `[n]`, a class each name or whole number; or floats `[n]` or `[n, column]`.
            groups: `[n]`; rows of one are held out together, where some are held out.
        Raises:
            BadDataset: if there are not as many labels as rows.
            TooFewExamples: if the concept is the same in all rows.
            NotFinite: if rows hold NaN or infinity.
        """
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Dimensions that are removed."""
        check_is_fitted(self, "write_")
        return self.write_.shape[1]

    @property
    def matrix(self) -> Float[Tensor, "d d"]:
        """P, of rows about the mean: `(x - center) @ P + center` is what is left."""
        check_is_fitted(self, "write_")
        return torch.eye(len(self.write_), dtype=self.write_.dtype) - self.read_ @ self.write_.T

    def transform(self, X: Any) -> Any:
        """Rows without the concept: an array of an array, a tensor (on its device, in its dtype) of a tensor.

        Raises:
            BadDataset: if rows are of another width than those that it was fitted on.
        """
        check_is_fitted(self, "write_")
        rows = X if isinstance(X, Tensor) and X.is_floating_point() else rows_of(self, X, fitting=False)
        if rows.shape[-1] != len(self.center_):
            raise BadDataset(f"Rows have {rows.shape[-1]} columns; the eraser was fitted on {len(self.center_)}.")
        dtype = torch.promote_types(rows.dtype, torch.float32)
        center, read, write = (one.to(rows.device, dtype) for one in (self.center_, self.read_, self.write_))
        found = (rows.to(dtype) - ((rows.to(dtype) - center) @ read) @ write.T).to(rows.dtype)
        return found if isinstance(X, Tensor) else found.numpy()

    def first(self: Own, rank: int) -> Own:
        """The eraser of its first so many directions.

        Raises:
            UnknownOption: if it has fewer.
        """
        if not 0 <= rank <= self.rank:
            raise UnknownOption(f"rank={rank} is out of range: this {type(self).__name__} removes {self.rank}.")
        from sklearn.base import clone

        found: Any = clone(cast(Any, self))
        orthogonal = self.read_ is self.write_ or torch.equal(self.read_, self.write_)
        write = self.write_[:, :rank]
        read = write if orthogonal else self.read_[:, :rank]
        return found._set(self.center_, read, write, dict(getattr(self, "settings_", {})))

    def as_edit(self, site: str | None = None, model: LanguageModel | None = None, **where: Unpack[Where]) -> ProjectOut:
        """For `wb.intervene`: the concept is erased from the model's own states.

        Args:
            site: Where; the site that it was fitted to, if None.
            model: The model to be changed, to have it refused if it is another one.
            where: As all edits take them; `skip=1`, unless positions are named: the first token's state is like no other, and
                nothing that was fitted on words is true of it.
        Raises:
            OtherJob: if the eraser was fitted to another site, or to another model.
            UnknownOption: if it was fitted to rows alone and no site is named.
        """
        own = getattr(self, "settings_", {}).get("site")
        if site is None and own is None:
            raise UnknownOption("This eraser was fitted to rows, of no site that it knows. Name the site.")
        if model is not None:
            self.require_model(model)
        n_layers = getattr(self, "settings_", {}).get("n_layers") or (1 << 16 if model is None else model.n_layers)
        if site is not None and own is not None and parse_sites([site], n_layers) != parse_sites([own], n_layers):
            raise OtherJob(
                f"The eraser was fitted to {own!r} and is to be used at {site!r}, whose states lie elsewhere. Fit one there."
            )
        read = None if torch.equal(self.read_, self.write_) else self.read_.float()
        chosen: dict[str, Any] = ({} if "positions" in where else {"skip": 1}) | located(where)
        return ProjectOut(
            site=str(site or own), basis=self.write_.float(), read=read, center=self.center_.float(), **chosen
        )  # fmt: skip

    def require_model(self, model: LanguageModel) -> None:
        """
        Raises:
            OtherJob: if it was fitted to other weights, or to another revision; one that was fitted to rows alone passes.
        """
        settings = getattr(self, "settings_", {})
        if "weights_hash" in settings:
            require_weights(settings, model, f"The eraser of {settings.get('site')}")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file.

        Raises:
            CannotWrite: if it cannot be written.
        """
        from probes.erasers.files import save_erasers

        return save_erasers({"eraser": self}, path)

    @classmethod
    def load(cls, path: str | Path) -> Eraser:
        """Read what `save` wrote, whatever kind of eraser it is.

        Raises:
            BadArtifact: if the file holds none, several, or a damaged one.
        """
        from probes.erasers.files import load_eraser

        return load_eraser(path)

    def _set(self: Own, center: Tensor, read: Tensor, write: Tensor, settings: dict[str, Any] | None = None) -> Own:
        self.center_, self.read_, self.write_ = (one.double().cpu().contiguous() for one in (center, read, write))
        self.n_features_in_ = len(center)
        if settings is not None:
            self.settings_ = settings
        return self


Moments = TypeVar("Moments", bound="MomentEraser")


class MomentEraser(Eraser):
    """An eraser that needs a `Joint` of rows and the concept's columns alone: sums that add over parts, and over files."""

    joint_: Joint
    classes_: np.ndarray | None

    def fit(self: Moments, X: Any, y: Any = None, *, groups: Any = None) -> Moments:
        rows = rows_of(self, X, fitting=True, device=self.device)
        columns, self.classes_ = indicators(y, len(rows))
        return self.fit_moments(joint_of(rows, columns))

    def partial_fit(self: Moments, X: Any, y: Any, *, classes: Any = None) -> Moments:
        """Add rows, such as a batch of `wb.stream`; `settled` makes the map when all are there.

        Args:
            classes: All classes that there are, with the first rows; not for floats.
        """
        begun = hasattr(self, "joint_")
        rows = rows_of(self, X, fitting=not begun, device=self.device)
        if not begun:
            self.classes_ = None if classes is None else np.sort(np.asarray(classes))
        columns, found = indicators(y, len(rows), self.classes_)
        self.classes_ = found if self.classes_ is None else self.classes_
        more = joint_of(rows, columns)
        self.joint_ = self.joint_.plus(more) if begun else more
        return self

    def settled(self: Moments) -> Moments:
        """The map of all rows that `partial_fit` was given."""
        check_is_fitted(self, "joint_")
        return self.fit_moments(self.joint_)

    def fit_moments(self: Moments, joint: Joint) -> Moments:
        """
        Args:
            joint: Of rows and the concept's columns: class indicators, or numbers.
        """
        raise NotImplementedError
