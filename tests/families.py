"""Tiny random models of every family, from configs written here."""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 300
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox sequential": ("gpt_neox", _NEOX | {"use_parallel_residual": False}),
    "llama": ("llama", _LLAMA),
    "llama biases": ("llama", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", _LLAMA | {"tie_word_embeddings": True}),
    "llama wide heads": ("llama", _LLAMA | {"head_dim": 16}),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 3}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 8}),
    "gemma2": ("gemma2", _LLAMA | {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 3}),
    "gemma3_text": ("gemma3_text", _LLAMA | {"head_dim": 8, "sliding_window": 3}),
    "gemma3_text softcap": ("gemma3_text", _LLAMA | {"head_dim": 8, "final_logit_softcapping": 5.0}),
}
"""Name, model type and config. The tied ones are gpt2, gemma and `llama tied`."""


def tiny_hf(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A fresh model whose every parameter is random."""
    model_type, options = FAMILIES[family]
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, pad_token_id=0, **options))
    for parameter in hf.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return hf.eval()


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, spelled in GPT-2's alphabet, and a few words; ids above it pad the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġdog", "dog", "ĠDog", "Ġcat", "Ġdogs", "Ċ"]
    vocabulary = {token: i for i, token in enumerate(["<s>", *alphabet, *(w for w in words if w not in alphabet)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
