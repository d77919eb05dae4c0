"""A small network as the control of linear probes: what is there, but not along a direction."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from probes.estimators.inputs import classes_of, require_as_many, require_positive, rows_of, targets_of
from probes.estimators.linear import standardised
from probes.estimators.strength import Strength
from probes.folds import numeric_folds

HELD_OUT_FOLDS = 5
"""One in so many groups is held out, to stop by."""


class _Network(Strength):
    """One hidden layer of ReLUs on standardised rows, trained by AdamW; of all epochs that one is taken whose loss on groups
    held out was least."""

    device: str | None
    network_: nn.Module

    def __init__(
        self,
        hidden: int = 64,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        epochs: int = 60,
        patience: int = 8,
        batch: int = 256,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        """
        Args:
            hidden: Units.
            patience: Epochs without a better loss after which it is stopped.
            batch: Rows a step.
        """
        self.hidden, self.learning_rate, self.weight_decay, self.epochs = hidden, learning_rate, weight_decay, epochs
        self.patience, self.batch, self.seed, self.device = patience, batch, seed, device

    def _train(self, rows: Tensor, y: Tensor, outputs: int, loss: nn.Module, groups: Any) -> None:
        require_positive(
            hidden=self.hidden, learning_rate=self.learning_rate, epochs=self.epochs, patience=self.patience, batch=self.batch
        )
        if groups is not None:
            require_as_many(len(groups), len(rows), "groups")
        x, mean, spread = standardised(rows, torch.ones(len(rows), device=rows.device), standardize=True)
        fold = numeric_folds(len(x), groups, HELD_OUT_FOLDS, self.seed)
        learnt, asked = (torch.from_numpy(np.flatnonzero(part)).to(x.device) for part in (fold > 0, fold == 0))
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            network = nn.Sequential(nn.Linear(x.shape[1], self.hidden), nn.ReLU(), nn.Linear(self.hidden, outputs))
            network.to(x.device, x.dtype)
            optimiser = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
            best, since = (float("inf"), deepcopy(network.state_dict())), 0
            for _ in range(self.epochs):
                for some in learnt[torch.randperm(len(learnt)).to(learnt.device)].split(self.batch):
                    optimiser.zero_grad()
                    loss(network(x[some]), y[some]).backward()
                    optimiser.step()
                with torch.no_grad():
                    now = float(loss(network(x[asked]), y[asked]))
                since += 1
                if now < best[0]:
                    best, since = (now, deepcopy(network.state_dict())), 0
                if since >= self.patience:
                    break
        network.load_state_dict(best[1])
        self.network_, self.mean_, self.scale_ = network, mean, spread

    @torch.no_grad()
    def _outputs(self, X: Any) -> Tensor:
        check_is_fitted(self, "network_")
        rows = rows_of(self, X, fitting=False, device=self.device).to(self.mean_.device, self.mean_.dtype)
        return self.network_((rows - self.mean_) / self.scale_).double().cpu()


class MLPProbe(ClassifierMixin, _Network):
    """The non-linear control of a probe of classes. What it finds beyond a linear probe is there, but is no direction; what it
    finds in an untrained model or the embeddings alone is no work of the model."""

    def fit(self, X: Any, y: Any, *, groups: Any = None) -> MLPProbe:
        """
        Args:
            groups: `[n]`; a fifth of them is held out to stop by.
        Raises:
            TooFewExamples: for one class, or one group.
            NotFinite, BadDataset: as `rows_of`.
        """
        rows = rows_of(self, X, fitting=True, device=self.device)
        self.classes_, index = classes_of(y, len(rows))
        self._train(rows, torch.as_tensor(index, device=rows.device), len(self.classes_), nn.CrossEntropyLoss(), groups)
        return self

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Natural logarithms of the probabilities, `[n, classes]`."""
        return self._outputs(X).log_softmax(-1).numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """`[n, classes]`."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row."""
        best = self.predict_log_proba(X).argmax(1)
        return self.classes_[best]


class MLPRegressionProbe(MultiOutputMixin, RegressorMixin, _Network):
    """The non-linear control of a probe of numbers."""

    def fit(self, X: Any, y: Any, *, groups: Any = None) -> MLPRegressionProbe:
        """
        Args:
            groups: As `MLPProbe.fit`.
        """
        rows = rows_of(self, X, fitting=True, device=self.device)
        targets = targets_of(y, len(rows))
        self.one_ = targets.ndim == 1
        y = torch.as_tensor(targets, device=rows.device).reshape(len(rows), -1)
        self.y_mean_, self.y_scale_ = y.mean(0).cpu(), y.std(0, correction=0).clamp_min(1e-12).cpu()
        y = (y - self.y_mean_.to(y.device)) / self.y_scale_.to(y.device)
        self._train(rows, y.to(rows.dtype), y.shape[1], nn.MSELoss(), groups)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """`[n, targets]`, or `[n]`."""
        found = (self._outputs(X) * self.y_scale_ + self.y_mean_).numpy()
        return found[:, 0] if self.one_ else found
