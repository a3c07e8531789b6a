"""The engine without torch: the logits that transformers computes, and the same bits whatever else runs."""

import numpy as np
import pytest
import tiny_models
import torch
from native_models import IDS, MODELS, close, expected

import bstack
import bstk
from bstack.engine.native import architecture, families, generate, load, sequence, weights
from bstack.kernels.native import library

# The fast tests have one of each kind: plain, a scaled rope with biases, windows, norms after the layers, fused projections.
FAST = {"llama", "qwen3", "mixtral", "qwen3-moe", "smollm3", "olmo2", "gemma3", "phi3"}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_logits_are_those_of_transformers(name, native_file, monkeypatch):
    """A prompt in pieces and token by token; caches of half precision cost some thousandths of the logits' deviation."""
    path = native_file(name)
    wanted = expected(path, IDS)
    model, *_ = load.load(path)
    assert (model._decoder is None) == (library() is None)
    model.piece = 40
    text = model.sequence()
    found = [model.read(text, IDS[:70], every=True), *(model.step([text], [token]) for token in IDS[70:])]
    assert text.length == 90 and close(np.concatenate(found), wanted, 2e-2)
    # The same arithmetic in numpy, and in single precision: no more than the rounding of inputs is left.
    monkeypatch.setattr(sequence, "CACHED", np.float32)
    model._decoder = None
    text = model.sequence()
    found = [model.read(text, IDS[:70])[None], *(model.step([text], [token]) for token in IDS[70:])]
    assert close(np.concatenate(found), wanted[69:], 2e-3)


BATCHED = {"llama", "gemma2", "phi3", "qwen3-moe"}


@pytest.mark.parametrize("name", [n if n in BATCHED else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_a_text_is_the_same_whatever_else_runs(name, native_file):
    """Bit for bit: alone, in steps with others, while prompts are read in between, and beside texts that begin and end."""
    model, *_ = load.load(native_file(name))
    prompts = [IDS[:length] for length in (3, 1, 40, 17, 64)]

    def alone(prompt):
        text = model.sequence()
        return [model.read(text, prompt), *(model.step([text], [token])[0] for token in IDS[30:50])]

    wanted = [alone(prompt) for prompt in prompts]
    texts = [model.sequence() for _ in prompts]
    found = [[model.read(text, prompt)] for text, prompt in zip(texts[:3], prompts[:3], strict=True)]
    for turn, token in enumerate(IDS[30:50]):
        if turn in (4, 9):  # one begins while others run
            found.append([model.read(texts[len(found)], prompts[len(found)])])
        running = [k for k in range(len(found)) if len(found[k]) <= 20]
        tokens = [IDS[30 + len(found[k]) - 1] for k in running]
        for k, logits in zip(running, model.step([texts[k] for k in running], tokens), strict=True):
            found[k].append(logits)
        assert token
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=False))
        assert len(ours) > 10


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_model_changes_its_size_while_it_runs(name, native_file):
    path = native_file(name)
    with bstk.open(path) as file:
        small = (file.base.budget + 1) / bstk.MB
    model, *_ = load.load(path)
    bstack.resize(model, mb=small)
    assert bstack.resident(model).blocks < bstack.resident(model).all_blocks
    few = model.read(model.sequence(), IDS[:20], every=True)
    assert close(few, expected(path, IDS[:20], mb=small), 2e-2)
    bstack.resize(model)
    many = model.read(model.sequence(), IDS[:20], every=True)
    assert close(many, expected(path, IDS[:20]), 2e-2) and not close(many, few, 2e-2)


@pytest.mark.parametrize("codec", ["sign", "spqr"])
def test_other_codecs(codec, tmp_path):
    settings = bstack.Settings(codec=codec, planes=1, samples=2, sequence_length=16)
    bstack.compress(tiny_models.save("qwen3", tmp_path / "model"), tmp_path / "m.bstk", settings=settings)
    model, *_ = load.load(tmp_path / "m.bstk")
    text = model.sequence()
    found = [model.read(text, IDS[:20], every=True), model.step([text], IDS[20:21])]
    assert close(np.concatenate(found), expected(tmp_path / "m.bstk", IDS[:21]), 2e-2)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 1}, {"tie_word_embeddings": True}])
def test_matrices_that_stay_plain(changes, tmp_path):
    """Narrow ones do; then, and with embeddings in bfloat16, numpy decodes what the kernels do not take."""
    source = tiny_models.save("llama", tmp_path / "model", dtype=torch.bfloat16, **changes)
    kept = {"embeddings": "dense"} if "tie_word_embeddings" in changes else {}
    settings = bstack.Settings(codec="trellis", planes=2, samples=2, sequence_length=16, **kept)
    bstack.compress(source, tmp_path / "m.bstk", settings=settings)
    with bstk.open(tmp_path / "m.bstk") as file:
        assert any(len(chunk.shape) == 2 and not chunk.is_block and chunk.dtype == "bf16" for chunk in file.chunks)
    model, _ = load.load(tmp_path / "m.bstk")
    assert model._decoder is None or not model._decoder.has_head
    texts = [model.sequence() for _ in range(2)]
    found = [model.read(texts[0], IDS[:20], every=True), model.step(texts[:1], IDS[20:21])]
    model.read(texts[1], IDS[:30])
    both = model.step(texts, [IDS[21], IDS[30]])
    wanted = expected(tmp_path / "m.bstk", IDS[:31])
    assert close(np.concatenate([*found, both]), wanted[[*range(22), 30]], 2e-2)


@pytest.mark.parametrize("ids", [[], [211], [-1], [[1, 2]], IDS[:5] * 40])
def test_tokens_that_the_model_does_not_read(ids, native_file):
    model, *_ = load.load(native_file("llama"))
    text = model.sequence()
    with pytest.raises(ValueError, match="tokens"):
        model.read(text, ids)
    assert text.length == 0


def test_a_step_takes_each_text_once(native_file):
    model, *_ = load.load(native_file("llama"))
    text = model.sequence()
    for texts, ids in (([text, text], [3, 4]), ([text], [3, 4])):
        with pytest.raises(ValueError, match="different texts"):
            model.step(texts, ids)


CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "vocab_size": 211,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "use_cache": True,
    "some_new_switch": False,
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "architecture is 'gpt2'"),
        ({"model_type": ["llama"]}, "architecture"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"hidden_size": None}, "config.json"),
        ({"num_hidden_layers": -1}, "layers|sizes"),
        ({"num_hidden_layers": 10**11}, "num_hidden_layers is 1000"),  # more than memory holds
        ({"num_key_value_heads": 3}, "heads"),
        ({"head_dim": 7}, "heads"),
        ({"is_causal": False}, "forward"),
        ({"is_causal": None}, "forward"),
        ({"rope_parameters": None}, "field"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "number of layers"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}, "5 of 4 experts"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "shared_experts": 1},
            "shared_experts",
        ),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 12, "use_bidirectional_attention": True}, "forward"),
    ],
)
def test_what_the_engine_does_not_know_is_named(changes, reason):
    assert families.describe(CONFIG).head_width == 12
    with pytest.raises(architecture.NotNativeError, match=reason):
        families.describe({**CONFIG, **changes})


def test_parameters_must_be_those_of_the_description(native_file):
    with bstk.open(native_file("llama")) as file:
        shapes = families.describe(generate.read_json(file, "config.json")).shapes()
        for changed, reason in (
            (
                {**shapes, "model.layers.0.self_attn.q_proj.bias": (48,)},
                "the file lacks model.layers.0.self_attn.q_proj.bias",
            ),
            (
                {name: shape for name, shape in shapes.items() if name != "lm_head.weight"},
                "does not know lm_head.weight",
            ),
        ):
            with pytest.raises(architecture.NotNativeError, match=reason):
                weights.read_weights(file, changed, weights.Host())
        for name in ("model.norm.weight", "lm_head.weight"):
            with pytest.raises(bstk.DamagedError, match=name):
                weights.read_weights(file, {**shapes, name: (50, 48)}, weights.Host())
