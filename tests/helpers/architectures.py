"""A tiny configuration of every causal architecture of the installed transformers, and what bstack makes of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import bstack
import bstk
from bstack.packed.store import store_of
from bstack.progress import no_progress

VOCABULARY = 211
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Fields of configurations by what they count, and how many there are in the tiny ones.
_SIZES = {
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    128: "max_position_embeddings n_positions max_target_positions n_ctx max_seq_len model_max_length context_length "
    "max_source_positions",
    64: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size dim_model_base word_embed_proj_dim lru_width "
    "attention_hidden_size input_embedding_size output_embedding_size backbone_hidden_size feed_forward_size",
    96: "intermediate_size ffn_dim n_inner dff dim_ff d_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
    "dense_intermediate_size intermediate_size_mlp expert_ffn_hidden_size shared_intermediate_size",
    48: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "shared_experts_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_local_experts num_experts n_routed_experts moe_num_experts linear_num_value_heads index_n_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads num_kv_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k num_encoder_layers num_decoder_layers num_blocks "
    "linear_num_key_heads swa_num_key_value_heads",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "num_nextn_predict_layers first_k_dense_replace",
    16: "head_dim kv_channels dim_head d_head v_head_dim qk_rope_head_dim qk_nope_head_dim index_head_dim swa_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim attention_head_size "
    "q_lora_rank kv_lora_rank o_lora_rank mamba_chunk_size chunk_size sliding_window attention_chunk_size",
    8: "state_size mamba_d_state ssm_state_size time_step_rank mamba_dt_rank rotary_dim index_topk",
    32: "qk_head_dim",
}
SIZES = {name: value for value, names in _SIZES.items() for name in names.split()}
_HYBRID = {"num_hidden_layers": 4}
_MLA = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
_INDEXER = {
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
}
# Of these those that get a value where the default is None.
_SET = {"num_key_value_heads", "head_dim", "moe_intermediate_size", "linear_num_value_heads", "linear_num_key_heads"}
# What the rule above does not give.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"], _HYBRID),
    **dict.fromkeys(["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"], _MLA),
    **dict.fromkeys(["glm_moe_dsa", "minicpm3"], _MLA),
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_moe": {"text_config": _HYBRID},
    "qwen4_exp": {"text_config": {**_HYBRID, **_INDEXER}},
    "bailing_hybrid": {"layer_group_size": 2, **_MLA},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], **_MLA},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2, **_MLA},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "intermediate_size": 96},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "intermediate_size": 96}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"num_experts_per_tok": 2, **_MLA},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": _MLA, **_MLA},
    "dots3_note_text": _MLA,
    "xlstm": {"qk_dim_factor": 1.0},
    "qwen4_exp_text": {**_HYBRID, **_INDEXER},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "use_mamba_kernels": False,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 8,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "use_mamba_kernels": False,
    },
    "roc_bert": {
        "shape_vocab_size": 50,
        "pronunciation_vocab_size": 50,
        "shape_embed_dim": 32,
        "pronunciation_embed_dim": 32,
    },
    "youtu": {"pad_token_id": None, **_MLA},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str) -> PreTrainedConfig:
    """Return a tiny configuration of a model type: the default one with its sizes shrunk."""
    return _shrunk(CONFIG_MAPPING[kind], OVERRIDES.get(kind, {}))


def _shrunk(cls: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    default = cls()
    values: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": changes.get("pad_token_id", 0)}
    for name, value in default.to_dict().items():
        # Not getattr: some attributes have no value for all layers together.
        if isinstance(part := vars(default).get(name), PreTrainedConfig):
            # Another number of layers than the text has, as the encoders of real models.
            other = {"num_hidden_layers": 1, "num_blocks": 1} if "vision" in name or "audio" in name else {}
            values[name] = _shrunk(type(part), {**other, **changes.get(name, {})})
        elif name in changes:
            values[name] = changes[name]
        elif name == "is_decoder":
            values[name] = True
        elif name in SIZES and (type(value) is int or (value is None and name in _SET)):
            values[name] = SIZES[name]
    return cls(**{**changes, **values})


def make(config: PreTrainedConfig, seed: int = 0) -> Any:
    """Build the model of a configuration with weights that make its logits uneven; float32, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


# Tokens of a trial: enough for the cheapest calibration, and for logits of two texts of more than two windows.
SETTINGS = bstack.Settings(planes=3, samples=2, sequence_length=16)
IDS = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))


class Found(NamedTuple):
    """What came of a model type.

    `outcome` is ``works``; ``refused`` before any work, by name; ``fails`` for everything that should not be; or
    ``not tried``, where transformers itself does not make or run the tiny model. `detail` says why.
    """

    kind: str
    outcome: str
    detail: str


def try_out(kind: str, folder: Path) -> Found:
    """Compress a tiny model of a type, and compare what the original, the dense, packed and exported model compute.

    The exact test of the dense model is the original with the decoded weights: it must have the same logits.
    """
    from bstack.engine.export import export_safetensors

    stages: list[str] = []

    def progress(stage: str, total: int) -> Any:
        stages.append(stage)
        return no_progress(stage, total)

    try:
        make(tiny_config(kind)).save_pretrained(folder / kind)
        original = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
        usable = bool(logits(original).isfinite().all())
    except Exception as error:
        return Found(kind, "not tried", _words(error))
    if not usable:
        return Found(kind, "not tried", "the tiny model computes NaN")
    try:
        bstack.compress(folder / kind, folder / "out.bstk", settings=SETTINGS, progress=progress)
        dense, _ = bstack.load(folder / "out.bstk")
        packed, _ = bstack.load(folder / "out.bstk", mode="packed")
        with bstk.open(folder / "out.bstk") as file:
            export_safetensors(file, folder / "exported", dtype=torch.float32)
        exported = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)
        expected = logits(dense)
        weights = dense.state_dict()
        lost = max(_error(weights[name], value) for name, value in original.state_dict().items())
        original.load_state_dict(weights)
        found = {  # and the maximum
            "weights": (lost, 0.15),
            "dense": (_distance(expected, logits(original)), 1e-4),
            "packed": (_distance(logits(packed), expected, "expert" in " ".join(weights)), 1e-3),
            "exported": (_distance(logits(exported), expected), 1e-4),
        }
        wrong = [f"{name}: an error of {error:.2g}" for name, (error, limit) in found.items() if not error < limit]
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        packed.generate(IDS[:1, :3], attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, **settings)
        store_of(packed).close()
    except bstk.BstkError as error:
        return Found(kind, "refused" if stages == ["open"] else "fails", str(error.args[0]))
    except Exception as error:
        return Found(kind, "fails", f"after {stages[-1]}: {_words(error)}")
    if wrong:
        return Found(kind, "fails", "; ".join(wrong))
    return Found(kind, "works", "fused step" if packed.bstack_unfused is None else "")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.double()


def _distance(a: torch.Tensor, b: torch.Tensor, experts: bool = False) -> float:
    """Relative error of logits, the largest of all positions; of models with experts that of most.

    With rounded weights a token that is between two experts may go to the other one.
    """
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).flatten().quantile(0.7 if experts else 1.0))


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    size = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (size or 1.0)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
