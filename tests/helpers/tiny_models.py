"""Tiny random models of many architectures, written as `save_pretrained` writes them.

The initialisation is scaled up, so that logits are far from flat and a wrong layer shows in them.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCABULARY = 211
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    **_COMMON,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

# Name -> configuration class and arguments. Widths that are no multiple of 8 or 16 stand among them on purpose.
ARCHITECTURES = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama-tied": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 10}),
    "gemma2": ("Gemma2Config", {**_LLAMA, "head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12}),
    "phi3": ("Phi3Config", _LLAMA),
    "smollm3": ("SmolLM3Config", {**_LLAMA, "num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "gpt2": ("GPT2Config", {**_COMMON, "n_embd": 44, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 90}),
    "opt": (
        "OPTConfig",
        {
            **_COMMON,
            "hidden_size": 48,
            "ffn_dim": 100,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 48,
        },
    ),
    # As OPT-350M: the embedding is narrower than the layers.
    "opt-projected": (
        "OPTConfig",
        {
            **_COMMON,
            "hidden_size": 48,
            "ffn_dim": 100,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 36,
            "do_layer_norm_before": False,
        },
    ),
    "gpt-neox": (
        "GPTNeoXConfig",
        {
            **_COMMON,
            "hidden_size": 48,
            "intermediate_size": 100,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "falcon": (
        "FalconConfig",
        {
            **_COMMON,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_hidden_size": 100,
            "max_position_embeddings": 128,
        },
    ),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            **_LLAMA,
            "num_hidden_layers": 3,
            "head_dim": 10,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 36,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    # Not in anybody's list: they show that none is needed.
    "stablelm": ("StableLmConfig", {**_LLAMA, "use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    "cohere": ("CohereConfig", _LLAMA),
    "olmo2": ("Olmo2Config", _LLAMA),
    "olmo3": ("Olmo3Config", {**_LLAMA, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt-oss": (
        "GptOssConfig",
        {**_LLAMA, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
}


def make(name: str, *, seed: int = 0, scale: float = 1.0, **changes) -> transformers.PreTrainedModel:
    """Build a model of an architecture with weights that make its logits uneven; float32, in evaluation mode."""
    kind, arguments = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**{**arguments, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                width = parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (scale * 1.5 / width**0.5))
            else:
                # Biases and norms away from the 0 and 1 they start with, so that a lost one shows.
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes) -> Path:
    """Write a model of an architecture into a folder, without a tokenizer; return the folder."""
    make(name, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def add_tokenizer(folder: Path, size: int = VOCABULARY) -> Path:
    """Put a small byte-level tokenizer beside a model's weights; return the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # ASCII alone: all 256 bytes would not fit the tiny vocabulary.
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=[chr(c) for c in range(33, 127)]
    )
    tokenizer.train_from_iterator([text()], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def text(sentences: int = 200) -> str:
    """Plain English of a few words, enough for the tiny calibrations."""
    subjects = ["the river", "a small model", "every layer", "the quick fox", "one block", "her answer"]
    verbs = ["follows", "keeps", "compresses", "explains", "carries", "forgets"]
    objects = ["the stone", "what it reads", "a sentence", "many numbers", "the lazy dog", "an error"]
    return "\n".join(
        f"{subjects[i % 6]} {verbs[(i // 6 + i) % 6]} {objects[(i // 36 + 5 * i) % 6]}, number {i}."
        for i in range(sentences)
    )
