"""Tiny random models of every family, from configs written here."""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 300
LAYERS = 3
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_HEADS = _LLAMA | {"head_dim": 8}
_EQUAL_HEADS = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "n_inner": 48}
_OPT = {key: value for key, value in _EQUAL_HEADS.items() if key != "intermediate_size"} | {"ffn_dim": 48}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4}
_FALCON = {key: value for key, value in _OPT.items() if key != "ffn_dim"} | {"ffn_hidden_size": 48}
_WINDOWS = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 3}
_MULTIPLIERS = {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25}
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 6, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", _BLOOM),
    "cohere": ("cohere", _LLAMA),
    "cohere query norms": ("cohere", _LLAMA | {"use_qk_norm": True}),
    "cohere2": ("cohere2", _LLAMA | _WINDOWS),
    "deepseek_v3": ("deepseek_v3", _LLAMA | _LATENT),
    "deepseek_v3 full queries": ("deepseek_v3", _LLAMA | _LATENT | {"q_lora_rank": None}),
    "exaone4": ("exaone4", _LLAMA | _WINDOWS),
    "falcon 7b": ("falcon", _FALCON),
    "falcon rw": ("falcon", _FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "falcon 40b": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "gemma": ("gemma", _HEADS),
    "gemma2": ("gemma2", _HEADS | {"final_logit_softcapping": 5.0, "sliding_window": 3}),
    "gemma3_text": ("gemma3_text", _HEADS | {"sliding_window": 3}),
    "gemma3_text softcap": ("gemma3_text", _HEADS | {"final_logit_softcapping": 5.0}),
    "glm": ("glm", _HEADS),
    "glm4": ("glm4", _HEADS),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_layers": LAYERS, "num_heads": 4,
            "max_position_embeddings": 64, "attention_types": [[["local", "global", "local"], 1]], "window_size": 3,
        },
    ),
    "gpt_neox": ("gpt_neox", _EQUAL_HEADS),
    "gpt_neox sequential": ("gpt_neox", _EQUAL_HEADS | {"use_parallel_residual": False}),
    "gpt_oss": ("gpt_oss", _HEADS | _MIXTRAL | {"sliding_window": 3}),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 4}),
    "granite": ("granite", _LLAMA | _MULTIPLIERS),
    "granitemoe": ("granitemoe", _LLAMA | _MULTIPLIERS | _MIXTRAL),
    "helium": ("helium", _HEADS),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEADS),
    "lfm2": (
        "lfm2",
        _LLAMA | {"layer_types": ["conv", "full_attention", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "llama": ("llama", _LLAMA),
    "llama biases": ("llama", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", _LLAMA | {"tie_word_embeddings": True}),
    "llama wide heads": ("llama", _LLAMA | {"head_dim": 16}),
    "llama4_text": (
        "llama4_text",
        _HEADS
        | {
            "intermediate_size": 16, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
            "moe_layers": [1, 2], "no_rope_layers": [1, 0, 1], "attention_chunk_size": 32,
        },
    ),
    "ministral": ("ministral", _HEADS | {"sliding_window": 3}),
    "ministral3": ("ministral3", _HEADS),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 3}),
    "mixtral": ("mixtral", _LLAMA | _MIXTRAL),
    "nemotron": ("nemotron", _LLAMA),
    "olmo": ("olmo", _LLAMA),
    "olmo clipped": ("olmo", _LLAMA | {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", _LLAMA),
    "olmo3": ("olmo3", _LLAMA | _WINDOWS),
    "opt": ("opt", _OPT),
    "phi": ("phi", _LLAMA),
    "phi query norms": ("phi", _LLAMA | {"qk_layernorm": True}),
    "phi3": ("phi3", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2_moe": ("qwen2_moe", _LLAMA | _QWEN_MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3": ("qwen3", _HEADS),
    "qwen3_moe": ("qwen3_moe", _HEADS | _QWEN_MOE),
    "seed_oss": ("seed_oss", _HEADS),
    "smollm3": ("smollm3", _LLAMA | {"no_rope_layer_interval": 2}),
    "stablelm": ("stablelm", _LLAMA),
    "stablelm parallel": (
        "stablelm",
        _LLAMA | {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    ),
    "starcoder2": ("starcoder2", _LLAMA),
}  # fmt: skip
"""Name, model type and config: every row of `workbench.architectures.families`, with the variants that change its parts."""

REPRESENTATIVE = frozenset({
    "bloom", "deepseek_v3", "falcon 40b", "falcon 7b", "falcon rw", "gemma2", "gpt2", "gpt_oss", "gptj", "granitemoe",
    "lfm2", "llama biases", "llama4_text", "nemotron", "olmo clipped", "olmo2", "opt", "phi3", "qwen2_moe",
})  # fmt: skip
"""Families that between them have every trait that hooks, edits and analyses meet: `test_families.py` says which those are."""


def tiny_hf(family: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A fresh model whose every parameter is random."""
    model_type, config = FAMILIES[family]
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, pad_token_id=0, **config), **options)
    return randomised(hf)


def randomised(hf: PreTrainedModel) -> PreTrainedModel:
    """Every parameter made random, norm gains and biases included: ones and zeros would hide a wrong or dropped one."""
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
