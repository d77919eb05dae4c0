"""What probes are fitted on, as tensors: rows that are numbers, labels as indices, and where a user must be told otherwise."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, validate_data
from torch import Tensor

from workbench.errors import BadDataset, NotFinite, TooFewExamples, UnknownOption


def rows_of(probe: Any, x: Any, *, fitting: bool, device: str | torch.device | None = None) -> Tensor:
    """Rows `[n, d]` of a matrix or a tensor, on the device: float64 stays so, all else becomes float32.

    Raises:
        NotFinite: naming the first row that holds NaN or infinity.
        BadDataset: for a tensor that is no matrix, or of another width than the probe was fitted on.
    """
    if isinstance(x, Tensor):
        if x.dim() != 2 or not x.numel():
            raise BadDataset(f"Rows are a tensor {list(x.shape)}. Give [examples, columns], one or more of each.")
        if fitting:
            probe.n_features_in_ = x.shape[1]
        elif x.shape[1] != probe.n_features_in_:
            raise BadDataset(f"Rows have {x.shape[1]} columns; the probe was fitted on {probe.n_features_in_}.")
        found = x.detach()
    else:
        wanted = {"dtype": [np.float64, np.float32], "ensure_all_finite": False}
        array = cast(np.ndarray, validate_data(probe, x, reset=fitting, **wanted))
        found = torch.from_numpy(array if array.flags.writeable else array.copy())
    found = found.to(device or found.device)
    found = found if found.dtype == torch.float64 else found.float()
    if not bool(torch.isfinite(found.sum())):
        wrong = ~torch.isfinite(found)
        if n := int(wrong.sum()):
            row = int(wrong.any(1).nonzero()[0])
            raise NotFinite(
                f"Rows hold {n} values that are NaN or infinity, the first in row {row}. Leave the row out, or load the model "
                "in a dtype of wider range."
            )
    return found


def classes_of(y: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes, sorted, and each row's index among them.

    Raises:
        TooFewExamples: if there is one class.
        BadDataset: if there are not as many labels as rows.
    """
    y = y.cpu().numpy() if isinstance(y, Tensor) else y
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None.")  # scikit-learn's own words for it
    y = _array(y, dtype=None)
    if y.ndim == 2 and y.shape[1] == 1:
        _warn_column()
    y = y.ravel() if y.ndim <= 2 and y.size == len(y) else y
    check_classification_targets(y)
    require_as_many(len(y), n, "labels")
    classes, index = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise TooFewExamples(f"All {n} labels are one class, {classes[0]!r}. A probe needs examples of two classes or more.")
    return classes, index


def targets_of(y: Any, n: int) -> np.ndarray:
    """Targets of a regression, float64, `[n]` or `[n, target]`."""
    y = y.cpu().numpy() if isinstance(y, Tensor) else y
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None.")
    found = np.array(_array(y, dtype=np.float64))  # a copy: tensors are made of it, which cannot be read-only
    require_as_many(len(found), n, "targets")
    return found


def weights_of(sample_weight: Any, class_weight: Any, classes: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Weight of each row: its own times its class's, as scikit-learn's classifiers take them."""
    from sklearn.utils.class_weight import compute_class_weight
    from sklearn.utils.validation import _check_sample_weight

    own = _check_sample_weight(sample_weight, np.empty((len(index), 0)), dtype=np.float64)
    if class_weight is None:
        return own
    if isinstance(class_weight, str) and class_weight == "balanced":
        mass = np.bincount(index, own, len(classes))
        return own * (mass.sum() / (len(classes) * mass))[index]
    return own * compute_class_weight(class_weight, classes=classes, y=classes[index])[index]


def require_as_many(found: int, n: int, what: str) -> None:
    """
    Raises:
        BadDataset: if there are more or fewer than rows.
    """
    if found != n:
        raise BadDataset(f"{found} {what} were given for {n} rows. Give one each; inconsistent numbers of samples cannot pair.")


def require_positive(**options: float | int) -> None:
    """
    Raises:
        UnknownOption: naming the option that is not above 0.
    """
    for name, value in options.items():
        if not value > 0:
            raise UnknownOption(f"{name}={value} must be above 0.")


def _array(y: Any, dtype: Any) -> np.ndarray:
    return cast(np.ndarray, check_array(y, ensure_2d=False, dtype=dtype, input_name="y"))


def _warn_column() -> None:
    import warnings

    from sklearn.exceptions import DataConversionWarning

    warnings.warn("A column-vector y was passed when a 1d array was expected.", DataConversionWarning, stacklevel=4)
