"""Describe a model by its config.json: an `Architecture`, or why the native engine does not know the model.

A family names its parameters and the fields that it reads. A field that is neither read nor known to change nothing means
that the model is not for this engine, so nothing is dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bstack.engine.native.architecture import Architecture, Experts, NotNativeError, Rope

__all__ = ["describe"]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What the models of one ``model_type`` share: names of parameters, fields of their own, and how these are read."""

    names: Mapping[str, str]
    fields: frozenset[str]
    read: Callable[[Config], dict[str, Any]]


_ATTENTION = {
    name: f"self_attn.{short}_proj" for name, short in zip(("query", "key", "value", "out"), "qkvo", strict=True)
}
_FEED = {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_LLAMA = {**_ATTENTION, **_FEED, "input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
_OLMO = {
    **_ATTENTION,
    **_FEED,
    **_HEAD_NORMS,
    "attention_norm": "post_attention_layernorm",
    "feed_norm": "post_feedforward_layernorm",
}
_GEMMA = {
    **_ATTENTION,
    **_FEED,
    "input_norm": "input_layernorm",
    "attention_norm": "post_attention_layernorm",
    "post_norm": "pre_feedforward_layernorm",
    "feed_norm": "post_feedforward_layernorm",
}
_PHI = {
    "query": "self_attn.qkv_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
}

_MIXTURE = {"num_experts_per_tok", "num_local_experts"}

# Fields that every family reads, and fields that change no result.
_COMMON = {
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
}
_INERT = {
    "_attn_implementation",
    "_experts_implementation",
    "_model_name_or_path",
    "_name_or_path",
    "_sliding_window_pattern",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "initializer_range",
    "output_router_logits",  # gives the caller more, and
    "router_aux_loss_coef",  # what training adds
    "router_jitter_noise",
    "is_causal",
    "is_llama_config",
    "pad_token_id",
    "pretraining_tp",
    "resid_pdrop",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}


# A hostile file asks for gigabytes of windows and ropes.
MAX_LAYERS = 10_000


def describe(config: Config) -> Architecture:
    """Return what a config.json describes; raise NotNativeError for what this engine does not compute."""
    kind = config.get("model_type")
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise NotNativeError(f"its architecture is {kind!r}")
    known = _COMMON | _INERT | family.fields
    unknown = sorted(name for name, value in config.items() if name not in known and value not in (None, False))
    if unknown:
        raise NotNativeError(f"it does not know {unknown[0]} in config.json")
    if not config.get("is_causal", True) or config.get("use_bidirectional_attention"):
        raise NotNativeError("its attention looks forward, too")
    try:
        own = family.read(config)
        heads = config["num_attention_heads"]
        head_width = config.get("head_dim")
        if head_width is None:
            head_width = config["hidden_size"] // heads
        layers = config["num_hidden_layers"]
        if not isinstance(layers, int) or layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers is {layers!r}")
        found = Architecture(
            **{
                "names": family.names,
                "biases": frozenset(),
                "vocabulary": config["vocab_size"],
                "width": config["hidden_size"],
                "inner": config["intermediate_size"],
                "layers": layers,
                "heads": heads,
                "key_heads": config["num_key_value_heads"],
                "head_width": head_width,
                "epsilon": float(config["rms_norm_eps"]),
                "scale": head_width**-0.5,
                "activation": _activation(config),
                "tied": bool(config["tie_word_embeddings"]),
                "context": config["max_position_embeddings"],
                "windows": _windows(config, layers),
                "ropes": (0,) * layers,
                "rotary": (_rope(config["rope_parameters"], head_width, config["max_position_embeddings"]),)
                if "rotary" not in own
                else (),
                **own,
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise NotNativeError(f"config.json lacks or misuses a field: {error}") from None
    _check(found)
    if not -found.vocabulary <= (config.get("pad_token_id") or 0) < found.vocabulary:
        raise NotNativeError("it has no token pad_token_id")
    return found


def _check(found: Architecture) -> None:
    """Refuse numbers that no shape can be made of."""
    numbers = (found.vocabulary, found.width, found.inner, found.layers, found.heads, found.key_heads, found.head_width)
    if not all(isinstance(number, int) and 0 < number < 2**31 for number in (*numbers, found.context)):
        raise NotNativeError("config.json gives no sizes")
    rotated = {2 * len(rope.frequencies) for rope in found.rotary}
    if found.heads % found.key_heads or len(rotated) != 1 or not 0 < min(rotated) <= found.head_width:
        raise NotNativeError("its heads have no usual shape")
    if len(found.windows) != found.layers or len(found.ropes) != found.layers:
        raise NotNativeError("config.json describes another number of layers")


def _activation(config: Config) -> str:
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    name = config.get("hidden_activation") or config.get("hidden_act")
    if name not in known:
        raise NotNativeError(f"its activation is {name!r}")
    return known[name]


def _windows(config: Config, layers: int) -> tuple[int, ...]:
    window = config.get("sliding_window") or 0
    kinds = config.get("layer_types")
    if kinds is None:
        return (window,) * layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise NotNativeError(f"it has layers of {min(unknown)}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _attention_biases(config: Config) -> frozenset[str]:
    return frozenset(_ATTENTION if config.get("attention_bias") else ()) | frozenset(
        _FEED if config.get("mlp_bias") else ()
    )


def _read_llama(config: Config) -> dict[str, Any]:
    return {"biases": _attention_biases(config)}


def _read_qwen2(_config: Config) -> dict[str, Any]:
    return {"biases": frozenset(("query", "key", "value"))}


def _read_smollm3(config: Config) -> dict[str, Any]:
    return {"biases": _attention_biases(config), "ropes": tuple(0 if rope else -1 for rope in config["no_rope_layers"])}


def _read_olmo2(config: Config) -> dict[str, Any]:
    return {"biases": _attention_biases(config), "whole_norms": True}


def _read_gemma2(config: Config) -> dict[str, Any]:
    return {
        "biases": _attention_biases(config),
        "scale": config["query_pre_attn_scalar"] ** -0.5,
        "embedding_scale": config["hidden_size"] ** 0.5,
        "norm_offset": 1.0,
        "cap": config.get("attn_logit_softcapping") or 0.0,
        "final_cap": config.get("final_logit_softcapping") or 0.0,
    }


def _read_gemma3(config: Config) -> dict[str, Any]:
    if config.get("attn_logit_softcapping"):
        raise NotNativeError("it does not know attn_logit_softcapping in config.json")
    kinds = ("full_attention", "sliding_attention")
    ropes, head_width = config["rope_parameters"], config["head_dim"]
    return {
        **_read_gemma2(config),
        "ropes": tuple(map(kinds.index, config["layer_types"])),
        "rotary": tuple(_rope(ropes[kind], head_width, config["max_position_embeddings"]) for kind in kinds),
    }


def _read_phi3(config: Config) -> dict[str, Any]:
    head_width = config["hidden_size"] // config["num_attention_heads"]
    return {"rotary": (_rope(config["rope_parameters"], head_width, config["max_position_embeddings"], partial=True),)}


def _experts(config: Config, layers: Iterable[int], inner: int, normalised: bool) -> dict[str, Any]:
    """Read a mixture of experts; layers without one have the usual feed-forward."""
    count, chosen = config["num_local_experts"], config["num_experts_per_tok"]
    if not all(isinstance(number, int) and 0 < number < 2**20 for number in (count, chosen, inner)) or chosen > count:
        raise ValueError(f"each token takes {chosen!r} of {count!r} experts of width {inner!r}")
    return {"experts": Experts(frozenset(layers), count, chosen, inner, normalised)}


def _read_mixtral(config: Config) -> dict[str, Any]:
    return _experts(config, range(config["num_hidden_layers"]), config["intermediate_size"], normalised=True)


def _read_qwen3_moe(config: Config) -> dict[str, Any]:
    plain, step = set(config.get("mlp_only_layers") or ()), config["decoder_sparse_step"]
    layers = [layer for layer in range(config["num_hidden_layers"]) if layer not in plain and (layer + 1) % step == 0]
    return {
        **_read_llama(config),
        **_experts(config, layers, config["moe_intermediate_size"], bool(config["norm_topk_prob"])),
    }


_WINDOWS = {"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"}
_GEMMA_FIELDS = {
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_activation",
    "layer_types",
    "query_pre_attn_scalar",
    "sliding_window",
    "sliding_window_pattern",  # layer_types says what follows from it
    "use_bidirectional_attention",
}
_FAMILIES = {
    "llama": Family(_LLAMA, frozenset(("attention_bias", "mlp_bias", "head_dim")), _read_llama),
    "mixtral": Family(_LLAMA, frozenset({"sliding_window", "head_dim"} | _MIXTURE), _read_mixtral),
    "mistral": Family(_LLAMA, frozenset(("sliding_window", "head_dim")), _read_llama),
    "qwen2": Family(_LLAMA, frozenset(_WINDOWS), _read_qwen2),
    "qwen3": Family(_LLAMA | _HEAD_NORMS, frozenset(_WINDOWS | {"attention_bias", "head_dim"}), _read_llama),
    "qwen3_moe": Family(
        _LLAMA | _HEAD_NORMS,
        frozenset(
            _MIXTURE
            | {"attention_bias", "decoder_sparse_step", "head_dim", "mlp_only_layers", "moe_intermediate_size"}
            | {"norm_topk_prob", "sliding_window", "use_sliding_window"}
        ),
        _read_qwen3_moe,
    ),
    "smollm3": Family(
        _LLAMA,
        frozenset(_WINDOWS | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"}),
        _read_smollm3,
    ),
    "olmo2": Family(_OLMO, frozenset(("attention_bias",)), _read_olmo2),
    "gemma2": Family(_GEMMA, frozenset(_GEMMA_FIELDS), _read_gemma2),
    "gemma3_text": Family(_GEMMA | _HEAD_NORMS, frozenset(_GEMMA_FIELDS), _read_gemma3),
    "phi3": Family(_PHI, frozenset(("sliding_window", "original_max_position_embeddings")), _read_phi3),
}


# Fields of rope_parameters that are read; each kind's formula follows (transformers' modeling_rope_utils is the truth).
_ROPE_FIELDS = {
    "default": set(),
    "dynamic": {"factor"},
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    },
}


def _rope(parameters: Config, head_width: int, context: int, partial: bool = False) -> Rope:
    """Return the rotary positions of one entry of ``rope_parameters``; `partial` allows some of a head's values alone.

    Of kind ``dynamic`` only texts beyond `context` differ from the default, and this engine writes none.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_FIELDS:
        raise NotNativeError(f"its rotary positions are of kind {kind!r}")
    share = parameters.get("partial_rotary_factor") or 1.0
    known = _ROPE_FIELDS[kind] | {"rope_theta", "rope_type", "type"}
    if partial or share == 1:
        known.add("partial_rotary_factor")
    if unknown := sorted(name for name, value in parameters.items() if name not in known and value is not None):
        raise NotNativeError(f"it does not know {unknown[0]} of its rotary positions")
    base, rotated = float(parameters["rope_theta"]), int(head_width * share)
    periods = base ** (np.arange(0, rotated, 2) / rotated)
    frequencies, factor = 1 / periods, 1.0
    if kind == "linear":
        frequencies = frequencies / parameters["factor"]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, parameters)
    elif kind == "yarn":
        frequencies, factor = _yarn(periods, parameters, base, rotated, context)
    return Rope(frequencies.astype(np.float32), factor)


def _llama3(frequencies: np.ndarray, parameters: Config) -> np.ndarray:
    """Divide low frequencies by the factor, keep high ones, and go over smoothly between them."""
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def _yarn(periods: np.ndarray, parameters: Config, base: float, rotated: int, context: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., arXiv 2309.00071): frequencies and the factor of cosine and sine."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or context / original

    def strength(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def place(turns: float) -> float:
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = place(parameters.get("beta_fast") or 32), place(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = np.clip((np.arange(rotated // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    frequencies = ramp / (factor * periods) + (1 - ramp) / periods
    attention = parameters.get("attention_factor")
    if attention is None:
        weights = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention = strength(weights[0]) / strength(weights[1]) if weights[0] and weights[1] else strength()
    return frequencies, float(attention)
