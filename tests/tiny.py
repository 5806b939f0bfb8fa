"""Configurations and a tokenizer for tiny random models."""

from __future__ import annotations

from typing import Any

WORDS = "the of and to in a is that it was for on are as with his they at be this from have or by one had not but"


def tiny_tokenizer(bos: bool = False) -> Any:
    """A word-level tokenizer over WORDS; with `bos` it puts `<s>` before every text, as Gemma's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

# Mixtures of experts, likewise.
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**SMALL, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 2},
}

# Model type -> config arguments. Between them: grouped-query attention, biases, tied embeddings, sliding windows,
# learned and rotary positions, fused projections, blocks that return tuples, and scaled embeddings.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL},
    "mistral": {**SMALL, "sliding_window": 16},
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "head_dim": 16, "attention_bias": True},
    "gemma3_text": {
        **SMALL,
        "head_dim": 16,
        "sliding_window": 16,
        "num_hidden_layers": 3,
        "sliding_window_pattern": 2,
    },
    "phi3": {**SMALL, "pad_token_id": 0},
    "opt": {
        "vocab_size": 64,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
    },
    "gpt_neox": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}
