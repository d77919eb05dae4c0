"""Texts with a concept, and a task that needs it: after a text, one word is right for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from probes.dataset import Dataset
from workbench.errors import UnknownOption
from workbench.model import LanguageModel

ANSWERS = {
    "gender": {"feminine": " She", "masculine": " He"},
    "gender_names": {"feminine": " She", "masculine": " He"},
    "subject_number": {"plural": " are", "singular": " is"},
}
"""Of shipped sets, what may follow the text."""
AT_ONCE = 1024
"""Tokens of a batch, padding included, whose logits are in memory at once."""


class Said(NamedTuple):
    """Of each text."""

    nats: np.ndarray
    """Summed loss of its tokens but the first, `[n]`."""
    odds: np.ndarray | None
    """Log odds of the right answer after it against the likeliest other one, nats, `[n]`: above 0 it is chosen."""


class ConceptTexts:
    """A dataset's texts: the model's loss on them, and its choice among one word a class after each."""

    def __init__(self, model: LanguageModel, dataset: Dataset, answers: Mapping[str, str] | None = None) -> None:
        """
        Args:
            answers: By class, what may follow a text; none are asked for if it is empty, and the shipped sets' own if None.
        Raises:
            UnknownOption: if a class has no answer, or two answers begin with the same token.
        """
        if dataset.texts is None:
            raise UnknownOption(f"{dataset.name!r} has no texts to run a model on. Give a dataset that has.")
        given = ANSWERS.get(dataset.name) if answers is None else {str(name): word for name, word in answers.items()}
        self.model, self.index = model, dataset.index if dataset.kind == "classes" else np.zeros(len(dataset), int)
        names = [str(one) for one in dataset.classes] if given else []
        self.tokens = _tokens(model, names, given) if given else None
        self.given = {name: given[name] for name in names} if given else None
        """By class, in their order."""
        ids = model.token_ids(dataset.texts)
        self.counted = np.array([len(one) - 1 for one in ids])
        """Tokens of each text whose loss is summed."""
        order, self._batches = sorted(range(len(ids)), key=lambda i: -len(ids[i])), []
        while order:
            n = max(1, AT_ONCE // len(ids[order[0]]))
            some, order = order[:n], order[n:]
            self._batches.append((some, model.tokenize([dataset.texts[i] for i in some], padding_side="left")))

    @torch.no_grad()
    def under(self, changed: AbstractContextManager[object]) -> Said:
        """What the model makes of them while it is changed."""
        n = len(self.index)
        nats, odds = np.empty(n), None if self.tokens is None else np.empty(n)
        with changed:
            for some, batch in self._batches:
                logits = self.model.forward(batch)
                real = batch.mask[:, :-1]
                lost = F.cross_entropy(logits[:, :-1][real].float(), batch.tokens[:, 1:][real], reduction="none")
                own = torch.zeros(real.shape, dtype=torch.float64, device=real.device).masked_scatter_(real, lost.double())
                nats[some] = own.sum(1).cpu().numpy()
                if odds is not None:
                    odds[some] = _odds(logits[:, -1, self.tokens].double().cpu().numpy(), self.index[some])
        return Said(nats, odds)


def _odds(logits: np.ndarray, right: np.ndarray) -> np.ndarray:
    rows = np.arange(len(right))
    own = logits[rows, right].copy()
    logits[rows, right] = -np.inf
    return own - logits.max(1)


def _tokens(model: LanguageModel, names: Sequence[str], given: Mapping[str, str]) -> list[int]:
    """The first token of each class's answer.

    Raises:
        UnknownOption: if a class has none, or two have the same.
    """
    if missing := [name for name in names if name not in given]:
        raise UnknownOption(f"There is no answer for {missing[0]!r}. Give one for each of {', '.join(names)}.")
    found = [model.tokenizer.encode(given[name], add_special_tokens=False)[0] for name in names]
    if len(set(found)) < len(names):
        raise UnknownOption(
            f"Answers {dict(given)} begin with the same token. Give words that differ from their first token on."
        )
    return found


def classes_of_answers(text: str) -> dict[str, str]:
    """`feminine= She,masculine= He` as a mapping.

    Raises:
        UnknownOption: if it is spelled otherwise.
    """
    pairs: Sequence[tuple[str, str, str]] = [one.partition("=") for one in text.split(",")]
    if not all(name and sign and word for name, sign, word in pairs):
        raise UnknownOption(f"answers={text!r} is not understood. Write class=word for each class: 'plural= are,singular= is'.")
    return {name.strip(): word for name, _, word in pairs}
