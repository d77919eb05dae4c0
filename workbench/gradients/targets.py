"""Prompts with what should follow them: the texts that a loss is of, and where in them it is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import LengthMismatch, UnknownOption
from workbench.model import Batch, LanguageModel

Target = str | SupportsIndex | Sequence[int] | Tensor
"""What should follow a prompt: a text (of which a leading space is a part), a token id, or several."""


class Targets(NamedTuple):
    """Prompts, each followed by all tokens of its target but the last; and which token should come where."""

    batch: Batch
    row: Int[Tensor, " target"]
    """The text of each target token, text after text."""
    column: Int[Tensor, " target"]
    """The column whose logits should foretell it."""
    token: Int[Tensor, " target"]

    @property
    def columns(self) -> Int[Tensor, " kept"]:
        """All columns whose logits are wanted, in order; on the CPU, from where any device can be asked for them."""
        return self.column.unique().cpu()

    def log_probabilities(self, logits: Float[Tensor, "batch kept d_vocab"]) -> Float[Tensor, " target"]:
        """Of each target token, in nats, from logits in `columns`."""
        return self.logits(logits).log_softmax(-1).gather(1, self.token[:, None].to(logits.device))[:, 0]

    def loss(self, logits: Float[Tensor, "batch kept d_vocab"], _: Batch) -> Float[Tensor, ""]:
        """-log p of all target tokens, summed over tokens and texts, for `collect_gradients`."""
        return -self.log_probabilities(logits).sum()

    def logits(self, logits: Float[Tensor, "batch kept d_vocab"]) -> Float[Tensor, "target d_vocab"]:
        """Those that foretell each target token, in the accumulation dtype."""
        kept = torch.searchsorted(self.columns, self.column.cpu())
        own = logits[self.row.to(logits.device), kept.to(logits.device)]
        return own if own.dtype == torch.float64 else own.float()

    def first(self) -> Int[Tensor, " batch"]:
        """Where each text's first target token stands among all."""
        before = torch.bincount(self.row, minlength=len(self.batch.mask)).cumsum(0)
        return torch.cat([before.new_zeros(1), before[:-1]])


def with_targets(model: LanguageModel, prompts: str | Sequence[str], targets: Target | Sequence[Target]) -> Targets:
    """
    Args:
        prompts: One or several.
        targets: One for each prompt; of a single prompt, the target itself. A text is cut into tokens together with its prompt,
            where that leaves the prompt's own tokens as they are, else alone.
    Raises:
        UnknownOption: if a target has no tokens.
        UnknownToken: if an id is outside the vocabulary.
        LengthMismatch: if there are not as many targets as prompts.
        TextTooLong, WorkbenchError: as `LanguageModel.tokenize`.
    """
    several = not isinstance(prompts, str)
    prompts = list(prompts) if several else [str(prompts)]
    wanted: list[Target] = (
        list(targets) if several and isinstance(targets, Sequence) and not isinstance(targets, str) else [targets]
    )  # pyright: ignore[reportAssignmentType]
    if len(wanted) != len(prompts):
        raise LengthMismatch(f"{len(prompts)} prompts and {len(wanted)} targets: give one target for each prompt.")
    before = model.tokenize(prompts)  # refuses what is empty or too long
    heads = [tokens[mask].tolist() for tokens, mask in zip(before.tokens, before.mask, strict=True)]
    tails = [_tokens(model, *one) for one in zip(prompts, heads, wanted, strict=True)]
    rows = [head + tail[:-1] for head, tail in zip(heads, tails, strict=True)]
    length = max(map(len, rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    device = model.device
    places = [
        (i, len(head) - 1 + j, token)
        for i, (head, tail) in enumerate(zip(heads, tails, strict=True))
        for j, token in enumerate(tail)
    ]
    return Targets(Batch(tokens.to(device), mask.to(device)), *torch.tensor(places, device=device).T.contiguous())


def _tokens(model: LanguageModel, prompt: str, head: list[int], target: Target) -> list[int]:
    """
    Raises:
        UnknownOption, UnknownToken: as `with_targets`.
    """
    if not isinstance(target, str):
        ids: Any = target
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # NumPy's and torch's numbers too
        found = [model.token_id(one) for one in (ids if isinstance(ids, Sequence) else [ids])]
    else:
        (whole,) = model.token_ids([prompt + target])
        alone = model.tokenizer(target, add_special_tokens=False, verbose=False)["input_ids"]
        found = whole[len(head) :] if whole[: len(head)] == head else list(alone)  # pyright: ignore[reportArgumentType]
    if not found:
        raise UnknownOption(f"Target {target!r} of prompt {prompt!r} has no tokens. Give a word, as ' Paris', or a token id.")
    return found
