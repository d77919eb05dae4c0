"""Which facts a model knows: it says every token of the object as its likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from workbench.facts import Fact, Neighbour
from workbench.gradients.targets import with_targets
from workbench.model import LanguageModel

TEXTS_AT_ONCE = 64


class KnownFact(NamedTuple):
    """A fact that the model knows, and the neighbours that it knows too."""

    fact: Fact
    neighbours: tuple[Neighbour, ...]


def known_facts(model: LanguageModel, facts: Sequence[Fact], *, progress: bool = True) -> list[KnownFact]:
    """Those of the facts that the model knows, each with those of its neighbours that it knows: said token by token, each token
    the likeliest after the prompt and the tokens before it."""
    asked = {(one.prompt, one.object): False for fact in facts for one in (fact, *fact.neighbours)}
    pairs = sorted(asked, key=lambda pair: len(pair[0]))  # of equal length together: less padding
    with tqdm(total=len(pairs), desc="which facts are known", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(pairs), TEXTS_AT_ONCE):
            some = pairs[start : start + TEXTS_AT_ONCE]
            asked.update(zip(some, _said(model, some), strict=True))
            bar.update(len(some))
    return [
        KnownFact(fact, tuple(one for one in fact.neighbours if asked[one.prompt, one.object]))
        for fact in facts
        if asked[fact.prompt, fact.object]
    ]


@torch.no_grad()
def _said(model: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    wanted = with_targets(model, [prompt for prompt, _ in pairs], [f" {answer}" for _, answer in pairs])
    wrong = wanted.logits(model.forward(wanted.batch, wanted.columns)).argmax(-1) != wanted.token
    misses = torch.bincount(wanted.row, wrong.double(), minlength=len(pairs))
    return (misses == 0).tolist()
