"""GGUF files: the same logits as the model they were written from, or a refusal that names the key or the tensor."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
import tiny_models
import torch
import transformers

import bstk
from bstack.errors import UnsupportedModelError
from bstack.models.gguf import GGUFCheckpoint
from bstack.models.gguf_config import ARCHITECTURES
from bstack.models.skeleton import Skeleton

gguf = pytest.importorskip("gguf")

IDS = torch.randint(3, tiny_models.VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
THETA = {"rope_theta": 10000.0}
DEFAULT = {"rope_type": "default", **THETA}
LINEAR = {"rope_type": "linear", "factor": 4.0, **THETA}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **THETA}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **THETA}
LLAMA3 |= {"original_max_position_embeddings": 32}
LONG, SHORT = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
LONGROPE = {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT, **THETA}
LONGROPE |= {"original_max_position_embeddings": 32}
HALF = {"partial_rotary_factor": 0.5, **DEFAULT}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
GEMMA = {"head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12, "pad_token_id": 0}
GPT_OSS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
GPT_OSS |= {"rope_parameters": YARN | {"truncate": False}}
LAYERS7 = {**GEMMA, "num_hidden_layers": 7}


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def read(path):
    """Compute the logits of a GGUF file."""
    skeleton = Skeleton(GGUFCheckpoint(path))
    with skeleton.loaded(skeleton.model.state_dict()):
        return logits(skeleton.model)


def check(tmp_path, model, **kwargs):
    found, wanted = read(tiny_gguf.write(tmp_path / "model.gguf", model, **kwargs)), logits(model)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def divisors(rope, dim):
    """Compute what is in the tensor rope_freqs.weight for transformers' llama3 scaling."""
    config = transformers.LlamaConfig(**{**tiny_gguf.BASE, "hidden_size": 4 * dim, "rope_parameters": rope})
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return np.round((plain / scaled).numpy(), 5)


CASES = {
    "llama": ("LlamaConfig", {"rms_norm_eps": 1e-3}, {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}, {}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama-wide-heads": ("LlamaConfig", {"head_dim": 16}, {}),
    "llama-theta": ("LlamaConfig", {"rope_parameters": DEFAULT | {"rope_theta": 5e5}}, {}),
    "llama-without-theta": ("LlamaConfig", {}, {"rope.freq_base": None, "rope.dimension_count": None}),
    "llama-one-value-per-layer": ("LlamaConfig", {}, {"attention.head_count_kv": [2, 2]}),
    "llama-linear": (
        "LlamaConfig",
        {"rope_parameters": LINEAR},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama-linear-without-a-type": ("LlamaConfig", {"rope_parameters": LINEAR}, {"rope.scaling.factor": 4.0}),
    "llama-linear-by-the-old-key": ("LlamaConfig", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}),
    "llama-scaling-none": ("LlamaConfig", {}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN}, YARN_KEYS),
    "llama-yarn-settings": (
        "LlamaConfig",
        {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 20.0, "beta_slow": 2.0}},
        YARN_KEYS
        | {
            "rope.scaling.yarn_attn_factor": 1.3,
            "rope.scaling.yarn_beta_fast": 20.0,
            "rope.scaling.yarn_beta_slow": 2.0,
        },
    ),
    "qwen2": ("Qwen2Config", {}, {"rope.dimension_count": None}),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": YARN}, YARN_KEYS),
    "qwen2moe": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 56}, {}),
    "qwen3": ("Qwen3Config", {"head_dim": 10}, {}),
    "qwen3moe": ("Qwen3MoeConfig", {**MOE, "head_dim": 16, "norm_topk_prob": True}, {}),
    "phi3": ("Phi3Config", {}, {"attention.sliding_window": 0}),
    "phi3-window-partial": (
        "Phi3Config",
        {"sliding_window": 16, "rope_parameters": HALF},
        {"attention.sliding_window": 16},
    ),
    "gemma2": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}, {}),
    "gemma3": ("Gemma3TextConfig", LAYERS7, {}),
    "gemma3-all-global": (
        "Gemma3TextConfig",
        {**GEMMA, "layer_types": ["full_attention"] * 2},
        {"attention.sliding_window": None, "rope.freq_base_swa": None},
    ),
    "gemma3-linear-softcap-pattern": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "layer_types": ["full_attention", "sliding_attention"],
            "final_logit_softcapping": 3.0,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": DEFAULT},
        },
        {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 4.0,
            "final_logit_softcapping": 3.0,
            "attention.sliding_window_pattern": [False, True],
        },
    ),
    "stablelm": ("StableLmConfig", {"rope_parameters": HALF, "layer_norm_eps": 1e-3}, {}),
    "stablelm-parallel": (
        "StableLmConfig",
        {"rope_parameters": HALF, "use_parallel_residual": True, "use_qkv_bias": True},
        {},
    ),
    "starcoder2": ("Starcoder2Config", {"rope_parameters": DEFAULT | {"rope_theta": 1e6}, "norm_epsilon": 1e-3}, {}),
    "nemotron": ("NemotronConfig", {"rope_parameters": HALF, "norm_eps": 1e-3}, {"rope.scaling.type": "none"}),
    "minimax-m2": (
        "MiniMaxM2Config",
        {"head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": HALF},
        {"expert_gating_func": 2},
    ),
    "gpt-oss": ("GptOssConfig", GPT_OSS, YARN_KEYS),
    "falcon": ("FalconConfig", {"num_kv_heads": 1, "ffn_hidden_size": 100}, {"tensor_data_layout": "jploski"}),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 2}, {"feed_forward_length": 192}),
    "gpt2": ("GPT2Config", {"n_embd": 44, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 90}, {}),
    "mamba": (
        "MambaConfig",
        {"intermediate_size": 96, "layer_norm_epsilon": 1e-3},
        {"context_length": 2**20, "feed_forward_length": 0},
    ),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"], "norm_eps": 1e-3, "block_auto_adjust_ff_dim": False},
        {"attention.head_count_kv": [0, 2]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case):
    kind, changes, keys = CASES[case]
    check(tmp_path, tiny_gguf.built(kind, **changes), keys=keys)


def test_every_architecture_has_a_case_and_is_in_the_guide():
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    assert [name for name in ARCHITECTURES if f"`{name}`" not in guide] == []
    assert {tiny_gguf.KEYS[getattr(transformers, kind).model_type][0] for kind, _, _ in CASES.values()} == {
        *ARCHITECTURES
    }


def test_llama3_factors(tmp_path):
    tensors = {"rope_freqs.weight": divisors(LLAMA3, 12)}
    check(tmp_path, tiny_gguf.built("LlamaConfig", rope_parameters=LLAMA3), tensors=tensors)
    config = GGUFCheckpoint(tmp_path / "model.gguf").config
    assert {key: config.rope_parameters[key] for key in LLAMA3} == LLAMA3


@pytest.mark.parametrize(
    ("theta", "factor", "original", "dim"), [(5e5, 8.0, 8192, 128), (5e5, 32.0, 8192, 64), (1e4, 3.0, 2048, 80)]
)
def test_llama3_settings_of_real_sizes_are_found(tmp_path, theta, factor, original, dim):
    rope = LLAMA3 | {"rope_theta": theta, "factor": factor, "original_max_position_embeddings": original}
    model = tiny_gguf.built("LlamaConfig", head_dim=dim)
    tensors = {"rope_freqs.weight": divisors(rope, dim)}
    path = tiny_gguf.write(tmp_path / "m.gguf", model, keys={"rope.freq_base": theta}, tensors=tensors)
    found = GGUFCheckpoint(path).config.rope_parameters
    assert {key: found[key] for key in rope} == rope


def test_factors_of_ones_change_nothing(tmp_path):
    check(tmp_path, tiny_gguf.built("LlamaConfig"), tensors={"rope_freqs.weight": np.ones(6, np.float32)})


@pytest.mark.parametrize("factors", [[2.0] * 6, [1, 2, 3, 4, 5, 6], [1, 1, 8, 1, 8, 8], [1, 1, 0.5, 2, 8, 8]])
def test_other_factors_are_refused(tmp_path, factors):
    path = tiny_gguf.write(tmp_path / "m.gguf", tensors={"rope_freqs.weight": np.array(factors, np.float32)})
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight is not the llama3 scaling"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("original", [32, 128])
def test_long_and_short_factors(tmp_path, original):
    """60 tokens are beyond the original context of 32 and within that of 128."""
    rope = LONGROPE | {"original_max_position_embeddings": original}
    model = tiny_gguf.built(
        "Phi3Config", rope_parameters=rope | {"attention_factor": 1.25}, original_max_position_embeddings=original
    )
    tensors = {"rope_factors_long.weight": np.float32(LONG), "rope_factors_short.weight": np.float32(SHORT)}
    keys = {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": 1.25}
    check(tmp_path, model, keys=keys, tensors=tensors)


def test_a_head_of_its_own_and_a_tied_one(tmp_path):
    model = tiny_gguf.built("LlamaConfig")
    assert not GGUFCheckpoint(tiny_gguf.write(tmp_path / "own.gguf", model)).config.tie_word_embeddings
    path = tiny_gguf.write(tmp_path / "tied.gguf", model, without="output.weight")
    assert GGUFCheckpoint(path).config.tie_word_embeddings


def test_tokens(tmp_path):
    keys = {
        f"tokenizer.ggml.{name}_token_id": value for name, value in {"bos": 1, "eos": 2, "eot": 7, "eom": 2}.items()
    }
    config = GGUFCheckpoint(tiny_gguf.write(tmp_path / "m.gguf", keys=keys)).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 7], None)


REFUSED = {
    "attention.scale": 0.1,
    "logit_scale": 2.0,
    "residual_scale": 0.5,
    "embedding_scale": 12.0,
    "attn_logit_softcapping": 50.0,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.value_length": 13,
    "attention.causal": False,
    "attention.sliding_window": 16,
    "attention.head_count_kv": [2, 4],
    "expert_count": 8,
    "expert_weights_scale": 2.5,
    "rope.dimension_count": 6,
    "rope.dimension_sections": [2, 2, 2, 0],
    "rope.freq_base_swa": 1e4,
    "rope.scaling.type": "dynamic",
    "rope.scaling.attn_factor": 1.5,
    "rope.scaling.alpha": 1000.0,
    "pooling_type": 1,
    "a_key_of_the_future": "x",
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_changes_the_results_is_refused_by_its_name(tmp_path, key):
    path = tiny_gguf.write(tmp_path / "m.gguf", keys={key: REFUSED[key]})
    with pytest.raises(UnsupportedModelError, match=rf"llama\.{key.replace('.', '[.]')} .*Give the folder"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (YARN_KEYS | {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        (YARN_KEYS | {"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"context_length": None}, "lacks llama.context_length"),
        ({"attention.head_count": 0}, "its metadata cannot be used"),
        ({"embedding_length": "wide"}, "its metadata cannot be used"),
        ({"split.count": "two"}, "its metadata cannot be used"),
        ({"general.type": "adapter"}, "holds no whole model: its general.type is 'adapter'"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, keys, named):
    path = tiny_gguf.write(tmp_path / "m.gguf", keys=keys)
    with pytest.raises(UnsupportedModelError, match=named):
        GGUFCheckpoint(path)


def test_keys_that_change_nothing(tmp_path):
    keys = {"vocab_size": 211, "attention.causal": True, "expert_count": 0, "rope.scaling.finetuned": True}
    check(tmp_path, tiny_gguf.built("LlamaConfig"), keys=keys | {"general.tags": ["x"], "quantize.imatrix.file": "y"})


@pytest.mark.parametrize(
    "name", ["blk.0.attn_sinks.weight", "blk.0.attn_q.scale", "blk.1.attn_q_norm.weight", "blk.2.attn_q.weight"]
)
def test_a_tensor_without_a_place_is_refused_by_its_name(tmp_path, name):
    path = tiny_gguf.write(tmp_path / "m.gguf", tensors={name: np.ones(48, np.float32)})
    with pytest.raises(UnsupportedModelError, match=f"has no use for the tensor {name}"):
        Skeleton(GGUFCheckpoint(path))


def test_biases_of_some_projections_only(tmp_path):
    model = tiny_gguf.built("LlamaConfig", attention_bias=True)
    path = tiny_gguf.write(tmp_path / "m.gguf", model, without="attn_output.bias")
    with pytest.raises(UnsupportedModelError, match=r"lacks model\.layers\.0\.self_attn\.o_proj\.bias"):
        Skeleton(GGUFCheckpoint(path))


def test_sizes_that_disagree_are_found_before_any_work(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf", keys={"feed_forward_length": 96})
    with pytest.raises(
        bstk.DamagedError, match=r"blk\.0\.ffn_gate\.weight \(100, 48\) has 4800 values.* asks for 4608"
    ):
        Skeleton(GGUFCheckpoint(path))


@pytest.mark.parametrize("architecture", ["gemma4", "deci", "t5", "clip", "mistral9"])
def test_other_architectures_are_refused_by_their_name(tmp_path, architecture):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UnsupportedModelError, match=f"does not read the GGUF architecture '{architecture}'. It reads llama"
    ):
        GGUFCheckpoint(tmp_path / "m.gguf")


# Files.


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16", "Q8_0", "MXFP4"])
def test_types(tmp_path, stored):
    """The values are those that the package gguf makes of the tensor; norms stay float32."""
    model = tiny_gguf.built("LlamaConfig", hidden_size=64, intermediate_size=96)
    kind = gguf.GGMLQuantizationType[stored]
    found = read(tiny_gguf.write(tmp_path / "m.gguf", model, stored=kind))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                values = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(np.array(values)).reshape(parameter.shape))
    wanted = logits(model)
    # Rows of queries and keys are permuted, which leaves each row's blocks as they are.
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_a_type_that_cannot_be_dequantised(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf", tensors={"blk.0.odd.weight": np.ones(32, np.int32)})
    with pytest.raises(UnsupportedModelError, match=r"the tensor blk\.0\.odd\.weight is stored as I32"):
        GGUFCheckpoint(path)


def test_a_type_of_the_future(tmp_path):
    raw = tiny_gguf.write(tmp_path / "m.gguf").read_bytes()
    name = b"token_embd.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8
    (tmp_path / "m.gguf").write_bytes(raw[:at] + (250).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(UnsupportedModelError, match=r"a tensor has a type that gguf .* does not know: .*250"):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_big_endian(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedModelError, match=r"big-endian GGUF file.*gguf-convert-endian m\.gguf little"):
        GGUFCheckpoint(path)


def test_an_old_version(tmp_path):
    raw = tiny_gguf.write(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw[:4] + b"\1\0\0\0" + raw[8:])
    with pytest.raises(UnsupportedModelError, match="a GGUF file of version 1"):
        GGUFCheckpoint(tmp_path / "m.gguf")


@pytest.fixture
def parts(tmp_path):
    model = tiny_gguf.built("LlamaConfig")
    tiny_gguf.write(tmp_path / "big.gguf", model, split_max_tensors=8)
    return model, sorted(tmp_path.glob("big-*.gguf"))


def test_a_model_in_parts(parts):
    model, files = parts
    assert len(files) == 3 and torch.equal(read(files[0]), logits(model))
    checkpoint = GGUFCheckpoint(files[0])
    assert checkpoint.name == "big" and checkpoint.size_bytes == sum(file.stat().st_size for file in files)
    assert [file["name"] for file in checkpoint.provenance()["files"]] == [file.name for file in files]


def test_parts_that_are_missing_or_not_the_first(parts):
    _, files = parts
    with pytest.raises(bstk.UsageError, match=r"part 2 of 3\. Give the first part, big-00001-of-00003\.gguf"):
        GGUFCheckpoint(files[1])
    files[2].unlink()
    with pytest.raises(bstk.UsageError, match=r"one of 3 parts; big-00003-of-00003\.gguf is not beside it"):
        GGUFCheckpoint(files[0])
    with pytest.raises(bstk.UsageError, match=r"is not named like NAME-00001-of-00003\.gguf"):
        GGUFCheckpoint(files[0].rename(files[0].with_name("first.gguf")))


def test_yarn_of_the_table_is_what_transformers_derives():
    """The amplitude that a file need not state."""
    config = transformers.LlamaConfig(**{**tiny_gguf.BASE, "rope_parameters": YARN})
    _, amplitude = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config)
    assert math.isclose(amplitude, 1 + 0.1 * math.log(4))
