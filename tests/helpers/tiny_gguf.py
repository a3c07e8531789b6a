"""Tiny GGUF files of several architectures, for tests of every command that reads one.

Names, keys and the order of the rows are those that llama.cpp's converters write.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers

LLAMA_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
RMS = "attention.layer_norm_rms_epsilon"
LAYER_NORM = "attention.layer_norm_epsilon"
EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
EXPERTS |= {"expert_feed_forward_length": "moe_intermediate_size"}
SHARED = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}

# transformers' model type -> llama.cpp's name, and the key of each attribute of the configuration.
KEYS: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("llama", {**LLAMA_KEYS, RMS: "rms_norm_eps", "attention.key_length": "head_dim"}),
    "qwen2": ("qwen2", {**LLAMA_KEYS, RMS: "rms_norm_eps"}),
    "qwen2_moe": ("qwen2moe", {**LLAMA_KEYS, RMS: "rms_norm_eps", **EXPERTS, **SHARED}),
    "qwen3": ("qwen3", {**LLAMA_KEYS, RMS: "rms_norm_eps", "attention.key_length": "head_dim"}),
    "qwen3_moe": ("qwen3moe", {**LLAMA_KEYS, RMS: "rms_norm_eps", "attention.key_length": "head_dim", **EXPERTS}),
    "phi3": ("phi3", {**LLAMA_KEYS, RMS: "rms_norm_eps"}),
    "gemma2": (
        "gemma2",
        {
            **LLAMA_KEYS,
            RMS: "rms_norm_eps",
            "attention.key_length": "head_dim",
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
    ),
    "gemma3_text": (
        "gemma3",
        {
            **LLAMA_KEYS,
            RMS: "rms_norm_eps",
            "attention.key_length": "head_dim",
            "attention.sliding_window": "sliding_window",
        },
    ),
    "stablelm": (
        "stablelm",
        {**LLAMA_KEYS, LAYER_NORM: "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
    ),
    "starcoder2": ("starcoder2", {**LLAMA_KEYS, LAYER_NORM: "norm_epsilon"}),
    "nemotron": ("nemotron", {**LLAMA_KEYS, RMS: "norm_eps", LAYER_NORM: "norm_eps"}),
    "minimax_m2": (
        "minimax-m2",
        {
            **LLAMA_KEYS,
            RMS: "rms_norm_eps",
            "attention.key_length": "head_dim",
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
        },
    ),
    "gpt_oss": (
        "gpt-oss",
        {
            **LLAMA_KEYS,
            RMS: "rms_norm_eps",
            "attention.key_length": "head_dim",
            "attention.sliding_window": "sliding_window",
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
        },
    ),
    "falcon": (
        "falcon",
        {
            "context_length": "max_position_embeddings",
            "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers",
            "feed_forward_length": "ffn_hidden_size",
            "attention.head_count": "num_attention_heads",
            "attention.head_count_kv": "num_kv_heads",
            LAYER_NORM: "layer_norm_epsilon",
        },
    ),
    "bloom": (
        "bloom",
        {
            "context_length": "hidden_size",
            "embedding_length": "hidden_size",
            "block_count": "n_layer",
            "attention.head_count": "n_head",
            "attention.head_count_kv": "n_head",
            LAYER_NORM: "layer_norm_epsilon",
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            LAYER_NORM: "layer_norm_epsilon",
        },
    ),
    "mamba": (
        "mamba",
        {
            "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers",
            "ssm.conv_kernel": "conv_kernel",
            "ssm.state_size": "state_size",
            "ssm.inner_size": "intermediate_size",
            "ssm.time_step_rank": "time_step_rank",
            RMS: "layer_norm_epsilon",
        },
    ),
    "lfm2": ("lfm2", {**LLAMA_KEYS, RMS: "norm_eps", "shortconv.l_cache": "conv_L_cache"}),
}


BASE = tiny_models.ARCHITECTURES["llama"][1]


def built(kind, **changes):
    """Build a random model, without the biases and norms of its initialisation."""
    config = getattr(transformers, kind)(**{**BASE, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_proj.bias")):
                parameter.add_(
                    torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
                )
    return model.eval()


def write(
    path: Path,
    model: Any = None,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    without: str = "",
    stored: Any = None,
    **header: Any,
) -> Path:
    """Write a model, by default a tiny Llama; return the path.

    `keys` are added to those of the architecture or replace them (None leaves one out), `tensors` are added, those whose
    name contains `without` are left out. Matrices are `stored` as that type of the package gguf; `header` is for its writer.
    """
    gguf = pytest.importorskip("gguf")
    model = model or tiny_models.make("llama")
    config = model.config
    architecture, names = KEYS[config.model_type]
    writer = gguf.GGUFWriter(path, architecture, **header)
    values = {key: getattr(config, attribute) for key, attribute in names.items()} | _rope(config) | dict(keys or {})
    for key, value in values.items():
        if value is not None:
            _put(
                writer,
                key if key.startswith(("general.", "tokenizer.", "quantize.", "split.")) else f"{architecture}.{key}",
                value,
            )
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tied = model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        for piece, array in _pieces(config, name, tensor.numpy()):
            found = _tensor_name(table, piece)
            if without and without in found:
                continue
            array = np.ascontiguousarray(array)
            if stored is not None and array.ndim == 2:
                writer.add_tensor(found, gguf.quantize(array, stored), raw_dtype=stored)
            else:
                writer.add_tensor(found, array)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _put(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds |= {list: writer.add_array}
    kinds[type(value)](key, value)


def _rope(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    if "full_attention" in rope:
        return {
            "rope.freq_base": rope["full_attention"]["rope_theta"],
            "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    count = int(head_dim * rope.get("partial_rotary_factor", 1))
    return {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": count}


def _tensor_name(table: Any, name: str) -> str:
    if found := table.get_name(name):  # a parameter without an ending
        return found if name.endswith(("A_log", ".D")) else f"{found}.weight"
    stem, _, ending = name.rpartition(".")
    return f"{table.get_name(stem) or table.get_name(stem.removeprefix('transformer.'))}.{ending}"


def _pieces(config: Any, name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Turn one parameter into what the converter of its architecture stores."""
    kind, leaf = config.model_type, name.split(".")[-2]
    if kind == "llama" and leaf in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads
        array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
    if kind in ("gemma2", "gemma3_text", "nemotron") and name.endswith("norm.weight"):
        array = array + 1
    if kind == "gpt2" and name.endswith(".weight") and leaf in ("c_attn", "c_proj", "c_fc"):
        array = array.T
    if kind == "bloom" and leaf == "query_key_value":
        array = array.reshape(config.n_head, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
    if leaf in ("conv1d", "conv") and name.endswith(".weight"):
        array = array.squeeze(1)
    if name.endswith("A_log"):
        array = -np.exp(array)
    if kind == "gpt_oss" and leaf == "experts":
        ending = "bias" if name.endswith("_bias") else "weight"
        array = array if ending == "bias" else array.swapaxes(1, 2)
        stem = name.removesuffix("_bias").removesuffix("down_proj").removesuffix("gate_up_proj")
        if "down_proj" in name:
            return [(f"{stem}down_proj.{ending}", array)]
        return [(f"{stem}gate_proj.{ending}", array[:, ::2]), (f"{stem}up_proj.{ending}", array[:, 1::2])]
    if name.endswith("sinks"):
        name += ".weight"
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(array, 2, axis=1)
        stem = name.removesuffix("gate_up_proj")
        return [(f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up)]
    if name.endswith("experts.down_proj"):
        name += ".weight"
    if name.endswith("e_score_correction_bias"):
        name = name.removesuffix("_bias") + ".bias"
    return [(name, array)]
