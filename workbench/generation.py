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
    answers = continuations(model, batch, new)
    found = answers if chat else [text + answer for text, answer in zip(texts, answers, strict=True)]
    return found[0] if isinstance(prompts, str) else found


def continuations(model: LanguageModel, batch: Batch, new: Int[Tensor, "batch new"]) -> list[str]:
    """What was generated after a batch, as text without special tokens."""
    found = []
    for tokens, mask, more in zip(batch.tokens, batch.mask, new, strict=True):
        prompt, decode = tokens[mask].tolist(), model.tokenizer.decode
        head = str(decode(prompt, skip_special_tokens=True))
        whole = str(decode([*prompt, *more.tolist()], skip_special_tokens=True))  # alone, a first word may lose its space
        found.append(whole[len(head) :] if whole.startswith(head) else str(decode(more, skip_special_tokens=True)))
    return found


def end_ids(model: LanguageModel) -> list[int]:
    """Tokens that end a text: the model's, or else the tokenizer's."""
    hf: Any = model.hf
    ends: Any = hf.generation_config.eos_token_id
    ends = model.tokenizer.eos_token_id if ends is None else ends
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]


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
    hf: Any = model.hf
    own = hf.generation_config
    ends = end_ids(model)
    pads = (model.tokenizer.pad_token_id, own.pad_token_id, *ends, 0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or None, num_beams=num_beams,
        top_k=0 if temperature else None, eos_token_id=ends or None, pad_token_id=next(one for one in pads if one is not None),
        use_cache=True,
    )  # fmt: skip
    # The model's own settings would fill what is not said here: penalties, and 50 likeliest tokens alone to draw from.
    hf.generation_config = config
    try:
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            torch.manual_seed(seed)
            found = hf.generate(input_ids=batch.tokens, attention_mask=batch.mask.long(), generation_config=config)
    finally:
        hf.generation_config = own
    return found[:, batch.tokens.shape[1] :]
