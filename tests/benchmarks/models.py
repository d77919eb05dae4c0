"""Models that the benchmarks run on: the embedded one, or random weights of a real shape."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import workbench as wb
from workbench.embedded import DEFAULT, EMBEDDED

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
}  # fmt: skip
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49_152,
}  # fmt: skip
SHAPES = ("smollm2", "llama-8b")


def loaded(shape: str, device: str, dtype: str) -> wb.LanguageModel:
    """A model of this shape: the embedded one, where it was pulled, for its own."""
    chosen = getattr(torch, dtype)
    if shape == "smollm2" and EMBEDDED[DEFAULT].is_pulled:
        return wb.load(device=device, dtype=chosen)
    from families import tiny_tokenizer

    own = LLAMA_8B if shape == "llama-8b" else LLAMA_8B | SMOLLM2
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(LlamaConfig(**own), dtype=chosen)
    return wb.load(hf, tokenizer=tiny_tokenizer())
