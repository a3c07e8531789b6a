"""GGUF files: read back by bstack's own reader they are the model, with the tokens of its tokenizer; others are refused."""

import json
import re

import in_process
import numpy as np
import pytest
import tiny_models
import torch
from packed_models import IDS, logits
from rewriting import rewritten
from tokenizers import Tokenizer

import bstack
import bstk

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.slow

from bstack.cli.export import TYPES as OFFERED  # noqa: E402
from bstack.engine.gguf import _WORDS, TYPES, _encoded, _split_name, export_gguf  # noqa: E402
from bstack.errors import UnsupportedModelError  # noqa: E402
from bstack.models.open import open_checkpoint  # noqa: E402
from bstack.models.skeleton import Skeleton  # noqa: E402

QUICK = bstack.Settings(codec="sign", planes=2, samples=2, sequence_length=16)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def compressed(name, folder, **changes):
    model = tiny_models.add_tokenizer(tiny_models.save(name, folder / "model", **changes))
    bstack.compress(model, folder / "tiny.bstk", settings=QUICK)
    return folder / "tiny.bstk"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compressed("llama", tmp_path_factory.mktemp("gguf"), hidden_size=64, num_attention_heads=4)


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama-tied", {"rope_parameters": LINEAR}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
        ("qwen3", {}),
    ],
)
def test_read_back_it_is_the_model(name, changes, tmp_path):
    path = compressed(name, tmp_path, **changes)
    with bstk.open(path) as file:
        budget = (file.base.budget + file.complete.budget) // 2
        done = export_gguf(file, tmp_path / "out.gguf", kind="f32", budget=budget)
        assert done.cut == file.fit(budget=budget) and done.file_bytes == (tmp_path / "out.gguf").stat().st_size
    dense, _ = bstack.load(path, budget=budget)
    skeleton = Skeleton(open_checkpoint(tmp_path / "out.gguf"))
    with skeleton.loaded(skeleton.model.state_dict()), torch.no_grad():
        theirs = skeleton.model(IDS).logits
    ours = logits(dense)
    # The epsilon and the frequencies are float32 there.
    assert float((ours - theirs).abs().max()) < 1e-4 * float(ours.std())


@pytest.mark.parametrize("kind", TYPES)
def test_types(tiny, tmp_path, kind):
    with bstk.open(tiny) as file:
        done = export_gguf(file, tmp_path / "out.gguf", kind=kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    dense = bstack.load(tiny)[0].state_dict()
    assert done.parameters == sum(tensor.numel() for tensor in dense.values())
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == TYPES[kind][0]
    assert tensors["token_embd.weight"].tensor_type.name == (
        "Q8_0" if kind.startswith(("q4", "q5")) else TYPES[kind][0]
    )
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    # 100 is no multiple of the blocks' 32 values.
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == ("F16" if kind.startswith("q") else TYPES[kind][0])
    up = tensors["blk.0.ffn_up.weight"]
    found = gguf.quants.dequantize(up.data, up.tensor_type).reshape(100, 64)
    expected = dense["model.layers.0.mlp.up_proj.weight"].numpy()
    levels = {"f32": 2**24, "f16": 2**10, "bf16": 2**7, "q8_0": 127, "q5_1": 31, "q5_0": 15, "q4_1": 15, "q4_0": 7}[
        kind
    ]
    assert np.abs(found - expected).max() <= 2 * np.abs(expected).max() / levels


def test_the_tokenizer(tiny, tmp_path):
    with bstk.open(tiny) as file:
        export_gguf(file, tmp_path / "out.gguf", kind="f16")
        content = json.loads(file.file("tokenizer.json"))
    values = fields(tmp_path / "out.gguf")
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == "gpt-2"
    vocabulary = Tokenizer.from_str(json.dumps(content)).get_vocab(with_added_tokens=True)
    tokens = values["tokenizer.ggml.tokens"]
    assert len(tokens) == tiny_models.VOCABULARY
    assert {token: tokens.index(token) for token in vocabulary} == vocabulary
    types = values["tokenizer.ggml.token_type"]
    assert [types[vocabulary[token]] for token in ("<pad>", "<s>", "</s>", "t")] == [3, 3, 3, 1]
    assert all(kind == 5 for kind in types[len(vocabulary) :])
    assert [merge.split(" ") for merge in values["tokenizer.ggml.merges"]] == [
        list(m) for m in content["model"]["merges"]
    ]
    ids = [values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert ids == [1, 2, 0]
    assert not values["tokenizer.ggml.add_bos_token"] and not values["tokenizer.ggml.add_eos_token"]


def _split(*steps, **changes):
    model = {"type": "BPE", "ignore_merges": False, "byte_fallback": False, **changes.pop("model", {})}
    return {"model": model, "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}, **changes}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_ALONE = {**_BYTES, "use_regex": False}


def _pattern(text):
    return {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"model": {"type": "BPE"}, "pre_tokenizer": _BYTES}, "gpt-2"),
        (_split({"type": "Digits", "individual_digits": True}, _BYTES), "smollm"),
        (_split(_pattern(_WORDS % ""), _ALONE, normalizer={"type": "NFC"}), "qwen2"),
        (_split(_pattern(_WORDS % "{1,3}"), _ALONE, model={"ignore_merges": True}), "llama-bpe"),
        (_split(_pattern(_WORDS % "{1,3}"), _ALONE), "smaug-bpe"),
        (_split(_pattern(_WORDS % "{1,3}"), _BYTES), None),
        (_split(_pattern(r"\w+"), _ALONE), None),
        (_split(_pattern(r"\d{1,3}(?=(?:\d{3})*\b)"), _pattern(_WORDS % ""), _ALONE), None),
        (_split({**_pattern(""), "pattern": {"String": "x"}}, _pattern(_WORDS % ""), _ALONE), None),
        (_split(_pattern(_WORDS % ""), {"type": "Digits", "individual_digits": True}, _ALONE), None),
        (_split(), None),
        (_split(_BYTES, model={"continuing_subword_prefix": "##"}), None),
        (_split(_BYTES, model={"end_of_word_suffix": "</w>"}), None),
        (_split(_BYTES, model={"byte_fallback": True}), None),
        (_split({**_BYTES, "add_prefix_space": True}), None),
        (_split({"type": "Whitespace"}, _BYTES), None),
        (_split(_BYTES, normalizer={"type": "Lowercase"}), None),
        ({"model": {"type": "BPE"}, "pre_tokenizer": None}, None),
    ],
)
def test_names_of_splits(content, name):
    assert _split_name(content) == name


def test_what_has_no_gguf_form_is_refused_before_anything_is_written(tmp_path):
    cases = [
        ("gpt2", {}, "its architecture is 'gpt2'"),
        ("olmo2", {}, "its architecture is 'olmo2'"),
        ("mistral", {}, "window"),
        ("qwen3", {"attention_bias": True}, "bias"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rotary positions are of kind 'llama3'"),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "activation"),
    ]
    for number, (name, changes, words) in enumerate(cases):
        path = compressed(name, tmp_path / str(number), **changes)
        with bstk.open(path) as file, pytest.raises(UnsupportedModelError, match=re.escape(words)) as refused:
            export_gguf(file, tmp_path / "out.gguf")
        assert "safetensors" in str(refused.value)
    assert not list(tmp_path.glob("*out*"))


def of_changed(tiny, tmp_path, **files):
    """Export a copy of a file in which JSON files have other values (None: the file is left out)."""

    def change(about, raw):
        if (key := about["name"].removesuffix(".json")) not in files:
            return raw
        return None if files[key] is None else json.dumps({**json.loads(raw), **files[key]}).encode()

    rewritten(tiny, tmp_path / "changed.bstk", change)
    with bstk.open(tmp_path / "changed.bstk") as file:
        export_gguf(file, tmp_path / "changed.gguf", kind="f16")
    return fields(tmp_path / "changed.gguf")


def test_tokens_that_end_and_begin_a_text(tiny, tmp_path):
    found = of_changed(tiny, tmp_path, config={"eos_token_id": [-1, 5], "bos_token_id": -1}, generation_config=None)
    assert found["tokenizer.ggml.eos_token_id"] == 5 and "tokenizer.ggml.eot_token_id" not in found
    assert found["tokenizer.ggml.bos_token_id"] == 1, "that of the tokenizer"
    (tmp_path / "changed.gguf").unlink()
    with pytest.warns(bstack.errors.ModelWarning, match=r"ends at 4 tokens.*left out: '.+'\.$"):
        of_changed(tiny, tmp_path, config={"eos_token_id": [3, 4, 5, 6]}, generation_config=None)


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
    settings = bstack.Settings(codec="sign", planes=1, samples=2, sequence_length=16, tokenizer=False)
    bstack.compress(tiny_models.save("llama", tmp_path / "model"), tmp_path / "tiny.bstk", settings=settings)
    with bstk.open(tmp_path / "tiny.bstk") as file, pytest.raises(UnsupportedModelError, match="no tokenizer"):
        export_gguf(file, tmp_path / "out.gguf")


def test_weights_that_half_precision_does_not_hold():
    values = np.full((2, 64), 65520, np.float32)
    for sign in (1, -1):
        for kind in ("f16", "q8_0", "q4_1"):
            with pytest.raises(bstk.UsageError, match="beyond 65504"):
                _encoded("w", sign * values, kind, "file")
        _encoded("w", sign * values, "bf16", "file")
        with pytest.raises(bstk.UsageError, match="beyond 65504, which F16"):
            _encoded("w", sign * values[:, :33], "q8_0", "file")


def test_progress_adds_up_to_the_weights(tiny, tmp_path):
    done = []
    with bstk.open(tiny) as file:
        export_gguf(file, tmp_path / "out.gguf", progress=done.append)
        assert sum(done) == sum(chunk.stored_length for chunk in file.chunks if chunk.is_weight)


def test_the_command(tiny, tmp_path):
    assert tuple(TYPES) == OFFERED
    run = ("export", tiny, "out.gguf", "--to", "gguf")
    done = in_process.bstack(*run, "--type", "q4_0", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["type"] == "q4_0" and report["weight_bytes"] == (tmp_path / "out.gguf").stat().st_size
    before = (tmp_path / "out.gguf").read_bytes()
    assert in_process.bstack(*run, cwd=tmp_path).returncode == 2
    assert (tmp_path / "out.gguf").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert in_process.bstack(*run, "--dtype", "bf16", cwd=tmp_path).returncode == 2
    assert in_process.bstack("export", tiny, "no", "--type", "f16", cwd=tmp_path).returncode == 2
