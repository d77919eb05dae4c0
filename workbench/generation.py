"""Continuing texts, with the model's own key-value cache; inside `wb.intervene` with its edits."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import TextTooLong, UnknownOption
from workbench.model import Batch, LanguageModel


def generate(
    model: LanguageModel,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    num_beams: int = 1,
) -> str | list[str]:
    """Continue each prompt until the model ends it or `max_new_tokens` are there.

    Args:
        temperature: 0 takes the likeliest token each time; above it, tokens are drawn with the seed.
        chat: Each prompt is a user's message, put into the tokenizer's chat template.
        num_beams: Beams of a beam search; 1 for none.
    Returns:
        As many texts as prompts (one for a string): prompt and continuation, as TransformerLens gives them; with `chat` the
        answer alone.
    Raises:
        UnknownOption: for numbers out of range, or if the tokenizer has no chat template.
        TextTooLong: if a prompt and what is to come do not fit the context.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    batch = model.tokenize(texts, padding_side="left", chat=chat)
    new = generate_tokens(model, batch, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, num_beams=num_beams)
    answers = continuations(model, new)
    found = answers if chat else [text + answer for text, answer in zip(texts, answers, strict=True)]
    return found[0] if isinstance(prompts, str) else found


def continuations(model: LanguageModel, new: Int[Tensor, "batch new"]) -> list[str]:
    """What was generated, as text without special tokens."""
    return [str(model.tokenizer.decode(row, skip_special_tokens=True)) for row in new.tolist()]


@torch.no_grad()
def generate_tokens(
    model: LanguageModel,
    batch: Batch,
    *,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    seed: int = 0,
    num_beams: int = 1,
) -> Int[Tensor, "batch new"]:
    """As `generate`, for a left-padded batch; the tokens that come after it, filled up with the padding token.

    Raises:
        UnknownOption, TextTooLong: as `generate`; also if a row ends in padding.
    """
    from transformers import GenerationConfig

    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("temperature", temperature, 0),
        ("num_beams", num_beams, 1),
    ):
        if not value >= least:
            raise UnknownOption(f"{name}={value!r} is out of range: at least {least}.")
    if not batch.mask[:, -1].all():
        raise UnknownOption("A row of the batch ends in padding, so it cannot be continued. Tokenize with padding_side='left'.")
    longest = int(batch.mask.sum(1).max()) + max_new_tokens
    if model.n_context is not None and longest > model.n_context:
        raise TextTooLong(
            f"A prompt of {longest - max_new_tokens} tokens and {max_new_tokens} new ones do not fit the context of "
            f"{model.n_context}. Shorten one of them."
        )
    own: Any = model.hf.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else model.tokenizer.eos_token_id
    pad = next(
        (one for one in (model.tokenizer.pad_token_id, own.pad_token_id, end) if isinstance(one, int)),
        end[0] if isinstance(end, list) else 0,
    )
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or None, num_beams=num_beams,
        eos_token_id=end, pad_token_id=pad, use_cache=True,
    )  # fmt: skip
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        hf: Any = model.hf
        found = hf.generate(input_ids=batch.tokens, attention_mask=batch.mask.long(), generation_config=config)
    return found[:, batch.tokens.shape[1] :]
