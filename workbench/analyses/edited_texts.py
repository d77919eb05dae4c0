"""The prompts of some facts, other wordings and known neighbours, run before and after edits: all facts in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analyses.known_facts import KnownFact
from workbench.gradients.targets import with_targets
from workbench.model import LanguageModel
from workbench.weight_edits import WeightEdit, edit_weights


class EditedTexts:
    """A row a text: of each fact its prompt, its paraphrases, then its neighbours."""

    def __init__(self, model: LanguageModel, facts: Sequence[KnownFact], targets: Sequence[int]) -> None:
        """
        Args:
            targets: The first token of each fact's new object.
        """
        self.model, self.targets = model, list(targets)
        texts = [(one.fact.prompt, *one.fact.paraphrases, *(next_to.prompt for next_to in one.neighbours)) for one in facts]
        self.sizes = [len(some) for some in texts]
        self.wordings = [1 + len(one.fact.paraphrases) for one in facts]
        self.batch = model.tokenize([text for some in texts for text in some], padding_side="left")
        neighbours = [next_to for one in facts for next_to in one.neighbours]
        right = first_tokens(model, [(one.prompt, one.object) for one in neighbours])
        self.right = torch.tensor(right, device=model.device)
        """The first token of each neighbour's object."""
        fact = torch.arange(len(facts)).repeat_interleave(torch.tensor(self.sizes))
        self.acts_on = fact[:, None] == torch.arange(len(facts))
        self.before = self._log_probabilities([])

    def measured(self, edits: Sequence[WeightEdit]) -> list[dict[str, float | None]]:
        """What each fact's own edit does, one edit a fact."""
        after = self._log_probabilities(edits)
        best, found, start, right_from = after.argmax(-1), [], 0, 0
        for token, size, wordings in zip(self.targets, self.sizes, self.wordings, strict=True):
            said = (best[start : start + wordings] == token).float()
            apart = slice(start + wordings, start + size)
            right = self.right[right_from : right_from + size - wordings]
            before, now = self.before[apart], after[apart]
            found.append(
                {
                    "efficacy": float(said[0]), "paraphrase": float(said[1:].mean()),
                    "neighbourhood": float((best[apart] == right).float().mean()) if len(right) else None,
                    "target_log_probability": float(after[start, token]),
                    "kl_neighbours_nats": float((before.exp() * (before - now)).sum(-1).mean()) if len(right) else None,
                }
            )  # fmt: skip
            start, right_from = start + size, right_from + size - wordings
        return found

    @torch.no_grad()
    def _log_probabilities(self, edits: Sequence[WeightEdit]) -> Float[Tensor, "row d_vocab"]:
        """After each text."""
        last = torch.tensor([self.batch.tokens.shape[1] - 1], device=self.model.device)
        with edit_weights(self.model, *edits, acts_on=self.acts_on if edits else None):
            logits = self.model.forward(self.batch, last)[:, 0]
        return logits.float().log_softmax(-1)


def first_tokens(model: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[int]:
    """The first token of each answer, after its prompt."""
    if not pairs:
        return []
    wanted = with_targets(model, [prompt for prompt, _ in pairs], [f" {answer}" for _, answer in pairs])
    return wanted.token[wanted.first()].tolist()
