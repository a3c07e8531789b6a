"""From the metadata of a GGUF file to the configuration with which transformers computes the same model.

The keys mean what llama.cpp makes of them. Whatever a configuration is built from is taken out of the metadata; a key that
is left over may change the results, so it is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bstack.errors import UnsupportedModelError

__all__ = ["ARCHITECTURES", "ROPE_TENSORS", "Metadata", "read_config"]

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are part of the configuration in transformers."""

_ADVICE = "Give the folder with config.json and the safetensors that the file was made from."
_REQUIRED: Any = object()
# Keys that llama.cpp does not use to compute. The size of the vocabulary follows from the embedding.
_NO_EFFECT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
# Values of optional keys with which these change nothing.
_NEUTRAL = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0, "attention.sliding_window": 0}


class Metadata:
    """The metadata of one file, taken out key by key.

    Parameters
    ----------
    source : str
        Begins the messages.
    values : mapping of str
        All keys of the file, scalars and lists.
    shapes : mapping of str
        The shape of each tensor as torch writes it.
    read : callable
        From the name of a tensor to its values, for the rope factors.
    """

    def __init__(
        self,
        source: str,
        values: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
    ):
        self.source, self.shapes, self._read = source, shapes, read
        self.architecture = str(values.get("general.architecture", ""))
        prefix = f"{self.architecture}."
        self._left = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        ids = {key: value for key, value in values.items() if key.endswith("_token_id")}
        self.tokens = {key.removeprefix("tokenizer.ggml."): value for key, value in ids.items()}

    def take(self, key: str, default: Any = _REQUIRED, per_layer: bool = False) -> Any:
        """Take a value out. A list stands for its one value, unless the layers may differ."""
        value = self._left.pop(key, default)
        if value is _REQUIRED:
            raise UnsupportedModelError(f"{self.source}: its metadata lacks {self.architecture}.{key}.")
        if isinstance(value, list) and not per_layer:
            if len(set(value)) != 1:
                self.refuse(key, value, "one value for all layers")
            value = value[0]
        return value

    def expect(self, key: str, value: Any) -> None:
        """Take out an optional key that may only have this value."""
        if (found := self.take(key, value)) != value:
            self.refuse(key, found, str(value))

    def refuse(self, key: str, value: Any, possible: str) -> None:
        """Refuse a value of a key."""
        text = f"{value[:6]}"[:-1] + ", ...]" if isinstance(value, list) and len(value) > 6 else value
        raise UnsupportedModelError(
            f"{self.source}: {self.architecture}.{key} is {text}; for this architecture bstack reproduces only {possible}. "
            + _ADVICE
        )

    def has(self, ending: str) -> bool:
        """Return whether the first layer has a tensor of that name."""
        return f"blk.0.{ending}" in self.shapes

    def tensor(self, name: str) -> list[float]:
        """Return the values of a tensor."""
        return [_shortest(value) for value in self._read(name).ravel()]

    def finish(self) -> None:
        """Refuse whatever was not taken out."""
        for key in _NO_EFFECT:
            self._left.pop(key, None)
        for key, value in _NEUTRAL.items():
            if key in self._left:
                self.expect(key, value)
        if self._left:
            key, value = next(iter(sorted(self._left.items())))
            raise UnsupportedModelError(
                f"{self.source}: bstack does not know how to reproduce {self.architecture}.{key} = {str(value)[:60]}, "
                f"which may change the results. {_ADVICE}"
            )


def _shortest(value: Any) -> float:
    # 1e-5 as float32 is 9.99999974e-06 as a Python float.
    return float(str(np.float32(value)))


def read_config(metadata: Metadata) -> dict[str, Any]:
    """Return `model_type` and the arguments of the configuration in transformers.

    Raises
    ------
    bstack.errors.UnsupportedModelError
        For an architecture, a key or a value that would give another model; the message names it.
    """
    build = ARCHITECTURES.get(metadata.architecture)
    if build is None:
        raise UnsupportedModelError(
            f"{metadata.source}: bstack does not read the GGUF architecture {metadata.architecture!r}. It reads "
            f"{', '.join(ARCHITECTURES)}. {_ADVICE}"
        )
    if "token_embd.weight" not in metadata.shapes:
        raise UnsupportedModelError(f"{metadata.source}: the tensor token_embd.weight is missing.")
    tokens = metadata.tokens
    ends = [tokens[name] for name in ("eos_token_id", "eot_token_id", "eom_token_id") if name in tokens]
    ends = list(dict.fromkeys(ends))
    config = {
        "vocab_size": metadata.shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in metadata.shapes,
        "bos_token_id": tokens.get("bos_token_id"),
        "eos_token_id": ends if len(ends) > 1 else (ends or [None])[0],
        "pad_token_id": tokens.get("padding_token_id"),
        **build(metadata),
    }
    metadata.finish()
    return config


# One function for each architecture.


def _sizes(metadata: Metadata) -> dict[str, Any]:
    """Take the keys that every decoder with rotary positions has."""
    heads, width = metadata.take("attention.head_count"), metadata.take("embedding_length")
    head_dim = metadata.take("attention.key_length", width // heads)
    metadata.expect("attention.value_length", head_dim)
    return {
        "max_position_embeddings": metadata.take("context_length"),
        "num_hidden_layers": metadata.take("block_count"),
        "hidden_size": width,
        "intermediate_size": metadata.take("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.take("attention.head_count_kv", heads),
        "head_dim": head_dim,
    }


def _rms(metadata: Metadata, attribute: str = "rms_norm_eps") -> dict[str, Any]:
    return {attribute: metadata.take("attention.layer_norm_rms_epsilon")}


def _layer_norm(metadata: Metadata, attribute: str) -> dict[str, Any]:
    return {attribute: metadata.take("attention.layer_norm_epsilon")}


def _rope(
    metadata: Metadata, sizes: dict[str, Any], *, partial: bool = False, scalings: tuple[str, ...] = ("linear", "yarn")
) -> dict[str, Any]:
    """Take the keys of the rotary positions; return `rope_parameters`."""
    head_dim = sizes["head_dim"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.take("rope.freq_base", 10000.0)}
    if partial:
        count = metadata.take("rope.dimension_count", head_dim)
        share = count / head_dim
        # transformers rounds the product down.
        rope["partial_rotary_factor"] = share if int(head_dim * share) == count else math.nextafter(share, 2)
    else:
        metadata.expect("rope.dimension_count", head_dim)
    kind = metadata.take("rope.scaling.type", "linear")
    factor = metadata.take("rope.scale_linear", 0) or 1.0  # the older name
    factor = metadata.take("rope.scaling.factor", factor) or 1.0
    original = metadata.take("rope.scaling.original_context_length", sizes["max_position_embeddings"])
    if kind == "none":
        factor = 1.0
    if "rope_factors_long.weight" in metadata.shapes or kind == "longrope":
        if "longrope" not in scalings:
            metadata.refuse("rope.scaling.type", "longrope", " or ".join(scalings))
        if missing := [name for name in ROPE_TENSORS[1:] if name not in metadata.shapes]:
            raise UnsupportedModelError(f"{metadata.source}: the tensor {missing[0]} is missing.")
        return rope | {
            "rope_type": "longrope",
            "long_factor": metadata.tensor("rope_factors_long.weight"),
            "short_factor": metadata.tensor("rope_factors_short.weight"),
            "original_max_position_embeddings": original,
            "attention_factor": metadata.take("rope.scaling.attn_factor", 1.0),
        }
    if kind not in ("none", "linear", "yarn") or (factor != 1 and kind not in scalings):
        metadata.refuse("rope.scaling.type", kind, " or ".join(["none", *scalings]))
    if kind == "yarn" and factor != 1:
        metadata.expect("rope.scaling.yarn_ext_factor", 1)
        amplitude = metadata.take("rope.scaling.yarn_attn_factor", 1 + 0.1 * math.log(factor) if factor > 1 else 1.0)
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": metadata.take("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": metadata.take("rope.scaling.yarn_beta_slow", 1.0),
            "attention_factor": amplitude * metadata.take("rope.scaling.attn_factor", 1.0),
        }
    else:
        metadata.expect("rope.scaling.attn_factor", 1)
        if factor != 1:
            rope |= {"rope_type": "linear", "factor": factor}
    if "rope_freqs.weight" in metadata.shapes:
        if rope["rope_type"] != "default":
            metadata.refuse("rope.scaling.factor", factor, "1 beside the tensor rope_freqs.weight")
        rope |= _llama3(metadata, rope["rope_theta"], head_dim)
    return rope


def _llama3(metadata: Metadata, theta: float, head_dim: int) -> dict[str, Any]:
    """Find the settings of transformers' `llama3` scaling that give the divisors in the tensor rope_freqs.weight.

    Long waves are divided by one factor and short ones by 1; what lies between tells where the range begins. All known
    models have it begin at a quarter of the original context.
    """
    divisors = np.array(metadata.tensor("rope_freqs.weight"))
    if np.all(divisors == 1):
        return {}
    waves = 2 * np.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    factor = float(divisors.max())
    between = (divisors > 1) & (divisors < factor)
    if between.any() and 2 * len(divisors) == head_dim:
        share = (1 / divisors - 1 / factor) / (1 - 1 / factor)
        original = round(float((waves * (1 + 3 * share))[between].mean()))
        share = (original / waves - 1) / 3
        expected = 1 / ((1 - share) / factor + share)
        expected = np.where(waves < original / 4, 1, np.where(waves > original, factor, expected))
        if np.allclose(divisors, expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise UnsupportedModelError(
        f"{metadata.source}: the tensor rope_freqs.weight is not the llama3 scaling of rotary positions, "
        f"and transformers has no other for it. {_ADVICE}"
    )


def _llama(metadata: Metadata) -> dict[str, Any]:
    sizes = _sizes(metadata)
    biases = {"attention_bias": metadata.has("attn_q.bias"), "mlp_bias": metadata.has("ffn_up.bias")}
    return {"model_type": "llama", **sizes, **_rms(metadata), **biases, "rope_parameters": _rope(metadata, sizes)}


def _qwen2(metadata: Metadata) -> dict[str, Any]:
    sizes = _sizes(metadata)
    return {"model_type": "qwen2", **sizes, **_rms(metadata), "rope_parameters": _rope(metadata, sizes)}


def _qwen3(metadata: Metadata) -> dict[str, Any]:
    return {**_qwen2(metadata), "model_type": "qwen3"}


def _experts(metadata: Metadata) -> dict[str, Any]:
    return {
        "num_experts": metadata.take("expert_count"),
        "num_experts_per_tok": metadata.take("expert_used_count"),
        "moe_intermediate_size": metadata.take("expert_feed_forward_length"),
    }


def _qwen2moe(metadata: Metadata) -> dict[str, Any]:
    shared = {"shared_expert_intermediate_size": metadata.take("expert_shared_feed_forward_length")}
    weights = {"norm_topk_prob": False}  # llama.cpp has no key for it
    return {**_qwen2(metadata), "model_type": "qwen2_moe", **_experts(metadata), **shared, **weights}


def _qwen3moe(metadata: Metadata) -> dict[str, Any]:
    return {**_qwen2(metadata), "model_type": "qwen3_moe", **_experts(metadata), "norm_topk_prob": True}


def _minimax_m2(metadata: Metadata) -> dict[str, Any]:
    sizes = _sizes(metadata)
    metadata.expect("expert_gating_func", 2)  # sigmoid
    metadata.expect("expert_feed_forward_length", sizes["intermediate_size"])
    experts = {
        "num_local_experts": metadata.take("expert_count"),
        "num_experts_per_tok": metadata.take("expert_used_count"),
    }
    rope = _rope(metadata, sizes, partial=True)
    return {"model_type": "minimax_m2", **sizes, **_rms(metadata), **experts, "rope_parameters": rope}


def _gpt_oss(metadata: Metadata) -> dict[str, Any]:
    sizes = _sizes(metadata)
    metadata.expect("expert_feed_forward_length", sizes["intermediate_size"])
    return {
        "model_type": "gpt_oss",
        **sizes,
        **_rms(metadata),
        "num_local_experts": metadata.take("expert_count"),
        "num_experts_per_tok": metadata.take("expert_used_count"),
        "sliding_window": metadata.take("attention.sliding_window"),
        "layer_types": _layer_types(metadata, sizes, 2),
        # The original does not round the limits of its ranges, which no key says.
        "rope_parameters": _rope(metadata, sizes, scalings=("yarn",)) | {"truncate": False},
    }


def _phi3(metadata: Metadata) -> dict[str, Any]:
    sizes = _sizes(metadata)
    rope = _rope(metadata, sizes, partial=True, scalings=("longrope",))
    window = {"sliding_window": metadata.take("attention.sliding_window", 0) or None}
    original = {"original_max_position_embeddings": rope.get("original_max_position_embeddings", 4096)}
    return {"model_type": "phi3", **sizes, **_rms(metadata), **window, **original, "rope_parameters": rope}


def _gemma2(metadata: Metadata) -> dict[str, Any]:
    sizes = _sizes(metadata)
    return {
        "model_type": "gemma2",
        **sizes,
        **_rms(metadata),
        "rope_parameters": _rope(metadata, sizes),
        "sliding_window": metadata.take("attention.sliding_window", 4096),
        "layer_types": _layer_types(metadata, sizes, 2),
        "attn_logit_softcapping": metadata.take("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.take("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _scalar(sizes, large=46),
    }


def _gemma3(metadata: Metadata) -> dict[str, Any]:
    sizes = _sizes(metadata)
    window = metadata.take("attention.sliding_window", 0)
    local = {"rope_type": "default", "rope_theta": metadata.take("rope.freq_base_swa", 10000.0)}
    return {
        "model_type": "gemma3_text",
        **sizes,
        **_rms(metadata),
        "rope_parameters": {"full_attention": _rope(metadata, sizes, scalings=("linear",)), "sliding_attention": local},
        "sliding_window": window or 4096,
        "layer_types": _layer_types(metadata, sizes, 6 if window else 1),
        "final_logit_softcapping": metadata.take("final_logit_softcapping", 0) or None,
        "query_pre_attn_scalar": _scalar(sizes, large=62),
    }


def _layer_types(metadata: Metadata, sizes: dict[str, Any], period: int) -> list[str]:
    pattern = metadata.take("attention.sliding_window_pattern", period, per_layer=True)
    layers = range(sizes["num_hidden_layers"])
    local = pattern if isinstance(pattern, list) else [bool((layer + 1) % pattern) for layer in layers]
    return ["sliding_attention" if local[layer] else "full_attention" for layer in layers]


def _scalar(sizes: dict[str, Any], large: int) -> int:
    # The largest model divides by another number than the head size; llama.cpp knows it by its number of layers.
    if sizes["num_hidden_layers"] == large:
        return sizes["hidden_size"] // sizes["num_attention_heads"]
    return sizes["head_dim"]


def _stablelm(metadata: Metadata) -> dict[str, Any]:
    sizes = _sizes(metadata)
    parallel = not metadata.has("ffn_norm.weight")  # which decides in llama.cpp as well
    metadata.expect("use_parallel_residual", parallel)
    return {
        "model_type": "stablelm",
        **sizes,
        **_layer_norm(metadata, "layer_norm_eps"),
        "rope_parameters": _rope(metadata, sizes, partial=True),
        "use_qkv_bias": metadata.has("attn_q.bias"),
        "use_parallel_residual": parallel,
    }


def _starcoder2(metadata: Metadata) -> dict[str, Any]:
    sizes = _sizes(metadata)
    return {
        "model_type": "starcoder2",
        **sizes,
        **_layer_norm(metadata, "norm_epsilon"),
        "rope_parameters": _rope(metadata, sizes),
        "sliding_window": None,
        "use_bias": metadata.has("attn_q.bias"),
    }


def _nemotron(metadata: Metadata) -> dict[str, Any]:
    sizes = _sizes(metadata)
    metadata.take("attention.layer_norm_rms_epsilon", None)  # not used
    return {
        "model_type": "nemotron",
        **sizes,
        **_layer_norm(metadata, "norm_eps"),
        "rope_parameters": _rope(metadata, sizes, partial=True),
        "attention_bias": metadata.has("attn_q.bias"),
        "mlp_bias": metadata.has("ffn_up.bias"),
    }


def _falcon(metadata: Metadata) -> dict[str, Any]:
    sizes = _sizes(metadata)
    if sizes["num_key_value_heads"] != 1:
        metadata.refuse("attention.head_count_kv", sizes["num_key_value_heads"], "1")
    return {
        "model_type": "falcon",
        **{name: sizes[name] for name in ("max_position_embeddings", "num_hidden_layers", "hidden_size")},
        "num_attention_heads": sizes["num_attention_heads"],
        "num_kv_heads": 1,
        "ffn_hidden_size": sizes["intermediate_size"],
        **_layer_norm(metadata, "layer_norm_epsilon"),
        "rope_parameters": _rope(metadata, sizes),
        "bias": metadata.has("attn_qkv.bias"),
    }


def _bloom(metadata: Metadata) -> dict[str, Any]:
    width, heads = metadata.take("embedding_length"), metadata.take("attention.head_count")
    metadata.take("context_length", None)  # no table of positions
    metadata.expect("attention.head_count_kv", heads)
    metadata.expect("feed_forward_length", 4 * width)
    sizes = {"hidden_size": width, "n_head": heads, "n_layer": metadata.take("block_count")}
    return {"model_type": "bloom", **sizes, **_layer_norm(metadata, "layer_norm_epsilon")}


def _gpt2(metadata: Metadata) -> dict[str, Any]:
    heads = metadata.take("attention.head_count")
    metadata.expect("attention.head_count_kv", heads)
    return {
        "model_type": "gpt2",
        "n_positions": metadata.take("context_length"),
        "n_embd": metadata.take("embedding_length"),
        "n_head": heads,
        "n_layer": metadata.take("block_count"),
        "n_inner": metadata.take("feed_forward_length"),
        **_layer_norm(metadata, "layer_norm_epsilon"),
    }


def _mamba(metadata: Metadata) -> dict[str, Any]:
    width = metadata.take("embedding_length")
    metadata.expect("ssm.dt_b_c_rms", False)
    for key in ("context_length", "feed_forward_length", "attention.head_count"):
        metadata.take(key, None)  # llama.cpp writes 0, or a length that limits nothing
    return {
        "model_type": "mamba",
        "hidden_size": width,
        "num_hidden_layers": metadata.take("block_count"),
        "conv_kernel": metadata.take("ssm.conv_kernel"),
        "state_size": metadata.take("ssm.state_size"),
        "time_step_rank": metadata.take("ssm.time_step_rank"),
        "expand": metadata.take("ssm.inner_size") // width,
        **_rms(metadata, "layer_norm_epsilon"),
    }


def _lfm2(metadata: Metadata) -> dict[str, Any]:
    heads = metadata.take("attention.head_count_kv", per_layer=True)
    if not isinstance(heads, list) or len({count for count in heads if count}) != 1:
        metadata.refuse("attention.head_count_kv", heads, "a list of zeros and one other value")
    sizes = _sizes(metadata) | {"num_key_value_heads": max(heads)}
    return {
        "model_type": "lfm2",
        **{name: value for name, value in sizes.items() if name != "head_dim"},
        **_rms(metadata, "norm_eps"),
        "rope_parameters": _rope(metadata, sizes),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": metadata.take("shortconv.l_cache"),
        "conv_bias": any(name.endswith("shortconv.in_proj.bias") for name in metadata.shapes),
    }


ARCHITECTURES: dict[str, Callable[[Metadata], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
    "nemotron": _nemotron,
    "minimax-m2": _minimax_m2,
    "gpt-oss": _gpt_oss,
    "falcon": _falcon,
    "bloom": _bloom,
    "gpt2": _gpt2,
    "mamba": _mamba,
    "lfm2": _lfm2,
}
"""From an architecture of llama.cpp to the function that builds its configuration."""
