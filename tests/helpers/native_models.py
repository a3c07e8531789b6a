"""Tiny models of the families that the native engine knows, and what transformers computes with them."""

import numpy as np
import torch

import bstack

# Changes to the models of tiny_models: windows that texts leave, scalings of rotary positions, a partial rotation.
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama-tied", {"rope_parameters": _LLAMA3}),
    "mistral": ("mistral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "qwen2": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    "qwen3": ("qwen3", {"attention_bias": True, "rope_parameters": _YARN}),
    "mixtral": ("mixtral", {"sliding_window": 9}),
    # Routers of 20 rows are packed; those of 4 and 6 rows stay plain.
    "qwen3-moe": ("qwen3-moe", {"num_experts": 20}),
    "qwen3-moe-2": ("qwen3-moe", {"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2}),
    "smollm3": ("smollm3", {"use_sliding_window": True, "sliding_window": 9}),
    "olmo2": ("olmo2", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {"num_hidden_layers": 3, "sliding_window_pattern": 2, "final_logit_softcapping": 20.0}),
    "phi3": (
        "phi3",
        {
            "sliding_window": 20,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
}
IDS = [(7919 * number) % 205 + 3 for number in range(90)]


def expected(path, ids, **options):
    """Logits of transformers' own code, float32."""
    dense, _ = bstack.load(path, **options)
    dense.set_attn_implementation("eager")  # the default of some versions leaves out Gemma 2's cap of attention
    with torch.no_grad():
        return dense(torch.tensor([ids])).logits[0].numpy()


def close(found, wanted, tolerance):
    return bool(np.abs(found - wanted).max() <= tolerance * wanted.std())
