"""A model that was changed and saved, beside the one that it was made of: loss on ordinary text, and what both say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

from workbench.analyses.held_out_loss import held_out_rows, losses
from workbench.analyses.rerun import Rerun
from workbench.corpus.corpus import Corpus
from workbench.model import LanguageModel


class Compared(NamedTuple):
    """Losses in nats a token, of the same tokens."""

    tokens: int
    loss_before: float
    loss_after: float
    change: float
    change_error: float
    """Over documents."""
    texts: list[dict[str, str]]
    """prompt, before, after."""

    def __str__(self) -> str:
        lines = [
            f"Loss on {self.tokens:,} ordinary tokens: {self.loss_before:.4f} before, {self.loss_after:.4f} after "
            f"({self.change:+.4f} ± {self.change_error:.4f} nats a token)"
        ]
        for one in self.texts:
            lines += [f"{one['prompt']!r} goes on:", f"  before {one['before']!r}", f"  after  {one['after']!r}"]
        return "\n".join(lines)


def compare_models(
    before: LanguageModel,
    after: LanguageModel,
    *,
    corpus: str | Corpus = "wikipedia",
    tokens: int = 2000,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 20,
    batch_tokens: int | None = None,
) -> Compared:
    """Run two models with the same tokenizer over the same text.

    Args:
        corpus, tokens: Ordinary text, and how much of it is scored.
        prompts: To be continued by both, greedily.
    """
    rows = held_out_rows(corpus if isinstance(corpus, Corpus) else Corpus(corpus), before, tokens)
    old, new = (losses(Rerun(model, rows, batch_tokens), nullcontext()) for model in (before, after))
    change, error = new.change(old)
    said = [model.generate(list(prompts), max_new_tokens=max_new_tokens) if prompts else [] for model in (before, after)]
    texts = [
        {"prompt": prompt, "before": one[len(prompt) :], "after": other[len(prompt) :]}
        for prompt, one, other in zip(prompts, *said, strict=True)
    ]
    return Compared(len(old.nats), float(old.nats.mean()), float(new.nats.mean()), change, error, texts)
