"""Models that the benchmarks run on, the options that choose one, and what it costs to run it alone."""

import argparse
import logging
import warnings

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import workbench as wb
from workbench.embedded import DEFAULT, EMBEDDED
from workbench.streaming.batches import batch_of, batched

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49_152,
}  # fmt: skip
SHAPES = {"smollm2": LLAMA_8B | SMOLLM2, "llama-8b": LLAMA_8B, "llama-70b": LLAMA_70B}


def loaded(shape: str, device: str, dtype: str, layers: int | None = None) -> wb.LanguageModel:
    """A model of this shape, or of its first layers: the embedded one, where it was pulled, for its own."""
    chosen = getattr(torch, dtype)
    if shape == "smollm2" and layers is None and EMBEDDED[DEFAULT].is_pulled:
        return wb.load(device=device, dtype=chosen)
    from families import tiny_tokenizer

    own = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(LlamaConfig(**own), dtype=chosen)
    return wb.load(hf, tokenizer=tiny_tokenizer())


def options(**own: int | str | None) -> argparse.Namespace:
    """Options of the command line: device, dtype and shape of the model, and a benchmark's own with their defaults. Warnings
    are silenced, as only the table is to be read, and random weights are the same each time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", choices=[*SHAPES], default="smollm2")
    for name, default in own.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, type=str if isinstance(default, str) else int)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    return parser.parse_args()


def run_body(model: wb.LanguageModel, corpus: wb.Corpus, batch_tokens: int) -> None:
    """The model without its head over the batches that a stream makes of the corpus."""
    for rows in batched(corpus.rows(model), batch_tokens):
        batch = batch_of(rows, model)
        model.hf.model(input_ids=batch.tokens, attention_mask=batch.mask.long(), use_cache=False)
