"""Which files of a folder are read, and which types of tensors: those that transformers takes, or a refusal by name."""

from __future__ import annotations

import json
import shutil
import struct
import warnings

import pytest
import tiny_models
import torch
import transformers
from checkpoints import IDS, refusal, same
from compressing import reconfigure, rewrite
from safetensors.torch import load_file, save_file

import bstack
import bstk
from bstack.errors import ModelWarning, UnsupportedModelError, one_line, user_message
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton
from bstack.models.tokenizer import export_tokenizer

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def both(model, tmp_path):
    """A folder with a whole file and, with other values, shards of it."""
    folder = model("llama")
    other = tiny_models.save("llama", tmp_path / "other", shard="50KB", seed=3)
    for file in other.glob("model*"):
        shutil.copy(file, folder)
    return folder


def test_one_file_goes_before_shards(both):
    with pytest.warns(ModelWarning, match=r"model\.safetensors and model\.safetensors\.index\.json"):
        assert same(both)


def test_shards_alone_and_a_tensor_that_the_index_does_not_know(both):
    (both / "model.safetensors").unlink()
    index = both / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    assert same(both)


def test_a_shard_of_any_name(both):
    (both / "model.safetensors").unlink()
    first = min(both.glob("model-*.safetensors"))
    first.rename(both / "mtp.safetensors")
    index = both / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first.name, "mtp.safetensors"))
    assert same(both)


def test_a_stale_index(both):
    (both / "model.safetensors").rename(both / "model-00001-of-00001.safetensors")
    shards = sorted(both.glob("model-*-of-*.safetensors"))
    shards[-1].unlink()
    assert "shards" in refusal(both, bstk.DamagedError)


def test_a_tensor_in_two_shards(both):
    (both / "model.safetensors").unlink()
    first, second, *_ = sorted(both.glob("model-*.safetensors"))
    save_file({**load_file(second), **load_file(first)}, second)
    assert f"is in {first.name} and in {second.name}" in refusal(both, bstk.DamagedError)


@pytest.mark.parametrize("value", [3, "../other/x.safetensors", None])
def test_an_index_with_names_that_are_none(both, value):
    (both / "model.safetensors").unlink()
    (both / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": value}}))
    assert "weight_map" in refusal(both, bstk.DamagedError)


def test_other_formats_beside_it_change_nothing(model):
    folder = model("llama")
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "x.gguf", "model.onnx"):
        (folder / name).write_bytes(b"anything")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"anything")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelWarning)
        assert same(folder)


def test_the_file_that_the_configuration_names(model, tmp_path):
    folder = model("llama")
    tiny_models.save("llama", tmp_path / "other", seed=3)
    shutil.copy(tmp_path / "other" / "model.safetensors", folder / "chosen.safetensors")
    reconfigure(folder, transformers_weights="chosen.safetensors")
    assert same(folder)
    assert "transformers_weights" not in open_checkpoint(folder).config.to_json_string()
    reconfigure(folder, transformers_weights="chosen.bin")
    assert "'chosen.bin'" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("consolidated.safetensors", "transformers does not read"),
        ("consolidated-00001-of-00002.safetensors", "transformers does not read"),
        ("model.fp16.safetensors", "variant='fp16'"),
        ("model.fp16-00001-of-00002.safetensors", "variant='fp16'"),
        ("model-00001-of-00002.safetensors", "Fetch model.safetensors.index.json too"),
        ("weights.safetensors", "call it model.safetensors"),
        ("tiny.Q4_K.gguf", "Give that file"),
        ("pytorch_model.bin", "never unpickles"),
        ("inside/model.safetensors", "Give that folder"),
        ("shard-00000-model-00001-of-00002.safetensors", "distributed checkpoint"),
    ],
)
def test_weights_that_transformers_does_not_look_for(model, name, words):
    folder = model("llama")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    message = refusal(folder)
    assert name in message and words in message and str(folder) in message


@pytest.mark.parametrize("name", ["tiny.gguf", "consolidated.safetensors", "checkpoint-500/config.json"])
def test_a_folder_without_a_configuration_says_what_it_has(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert "has no config.json" in message and name in message


def test_an_adapter_names_its_base(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    message = refusal(tmp_path, UnsupportedModelError)
    assert "owner/base" in message and "merge_and_unload" in message


def test_an_adapter_beside_whole_weights(model):
    """Whether transformers adds it depends on whether peft is installed."""
    folder = model("llama")
    (folder / "adapter_config.json").write_text("{}")
    assert "out of the folder" in refusal(folder, UnsupportedModelError)


def test_pointers_of_git_lfs(model, tmp_path):
    """Those of files that are read; others, as of formats that were not fetched, are left alone."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n"
    folder = tiny_models.add_tokenizer(model("llama"))
    (folder / "pytorch_model.bin").write_text(pointer)
    assert same(folder)
    (folder / "tokenizer.json").write_text(pointer)
    with pytest.raises(UnsupportedModelError, match=r"cannot be read: tokenizer.json is a pointer of git LFS"):
        export_tokenizer(folder, folder)
    (folder / "model.safetensors").write_text(pointer)
    assert "model.safetensors is a pointer of git LFS" in refusal(folder, bstk.DamagedError)
    (tmp_path / "model.gguf").write_text(pointer)
    assert "model.gguf is a pointer of git LFS" in refusal(tmp_path / "model.gguf", bstk.DamagedError)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_file_of_a_folder(model, name):
    folder = model("llama")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert f"Give the folder: {folder}" in refusal(folder / name, bstk.UsageError)


# Types of tensors: the table of the format.

BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
}
WEIGHTS = {"F64", "F32", "F16", "BF16"}


def retype(file, key, dtype):
    """Write zeros of another type in the place of a tensor, in a file of the format's own bytes."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data, tensors = json.loads(raw[8 : 8 + length]), raw[8 + length :], {}
    header.pop("__metadata__", None)
    body = b""
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        piece = data[start:end]
        if name == key:
            entry["dtype"] = dtype
            piece = bytes(torch.Size(entry["shape"]).numel() * BITS[dtype] // 8)
        tensors[name] = {**entry, "data_offsets": [len(body), len(body) + len(piece)]}
        body += piece
    text = json.dumps(tensors).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("dtype", BITS)
def test_types_of_weights(model, dtype):
    folder = model("llama")
    retype(folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight", dtype)
    if dtype in WEIGHTS:
        assert same(folder)
    else:
        assert f"model.layers.1.mlp.up_proj.weight is stored as {dtype}" in refusal(folder, UnsupportedModelError)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", {"": "float32"}, "float64", None])
def test_the_type_that_the_configuration_names_is_none_of_the_weights(model, tmp_path, dtype):
    """transformers loads in it, or in none where the weights are of another; a file of such a model is loaded in theirs."""
    folder = model("llama")
    reconfigure(folder, torch_dtype=dtype, dtype=dtype)
    bstack.compress(folder, tmp_path / "model.bstk", settings=bstack.Settings(planes=1, samples=2, sequence_length=16))
    loaded, _ = bstack.load(tmp_path / "model.bstk", mode="dense")
    with torch.no_grad():
        assert loaded.dtype == torch.float32 and loaded(IDS).logits.isfinite().all()


@pytest.mark.parametrize("value", [{}, {"quant_method": "gptq"}, {"load_in_4bit": True}])
def test_a_quantisation_in_the_configuration(model, value):
    folder = model("llama")
    reconfigure(folder, quantization_config=value)
    said = refusal(folder, UnsupportedModelError)
    assert "is already quantised" in said and "remove quantization_config" in said


def test_a_value_of_a_wrong_type_in_the_configuration_is_named(model):
    folder = model("llama")
    reconfigure(folder, rms_norm_eps="1e-5")
    said = refusal(folder, UnsupportedModelError)
    assert "'rms_norm_eps'" in said and "'1e-5'" in said


def test_quantised_weights_under_names_of_their_own(model):
    """As AutoGPTQ writes them, without the configuration that says so."""

    def change(tensors):
        tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.ones(6, 100, dtype=torch.int32)

    folder = model("llama")
    rewrite(folder, change)
    assert "up_proj.qweight is stored as I32" in refusal(folder, UnsupportedModelError)


@pytest.mark.parametrize("ending", ["weight_scale", "weight_scale_inv", "scales", "weight.absmax", "qzeros", "SCB"])
def test_a_scale_beside_a_weight(model, ending):
    """As weights of 8 bits come with; the weight alone would be another model, which transformers makes and saves."""
    folder = model("llama")
    rewrite(folder, lambda t: t.update({f"model.layers.0.mlp.up_proj.{ending}": torch.ones(1)}))
    message = refusal(folder, UnsupportedModelError)
    assert f"up_proj.{ending}, as quantised weights do" in message and "before quantisation" in message
    assert "save_pretrained" not in message


@pytest.mark.parametrize(
    ("dtype", "columns", "scale"),
    [
        (torch.float8_e4m3fn, 48, "weight_scale_inv"),  # as DeepSeek
        (torch.uint32, 6, "scales"),  # as MLX: eight of 4 bits in one
        (torch.uint8, 24, "weight.absmax"),  # as bitsandbytes: two in one
    ],
)
def test_quantised_weights_under_the_name_of_weights(model, dtype, columns, scale):
    """Their type is named first: packed ones have another shape, and scales beside them no place."""

    def change(tensors):
        name = "model.layers.0.mlp.up_proj"
        tensors[f"{name}.weight"] = torch.zeros(100, columns, dtype=dtype)
        tensors[f"{name}.{scale}"] = torch.ones(100)

    folder = model("llama")
    rewrite(folder, change)
    message = refusal(folder, UnsupportedModelError)
    assert "up_proj.weight is stored as" in message and "before quantisation" in message


def test_a_quantisation_that_transformers_does_not_know(model):
    folder = model("llama")
    reconfigure(folder, quantization={"group_size": 64, "bits": 4})  # as MLX
    assert "already quantised (no method named), as its config.json says (quantization)" in refusal(
        folder, UnsupportedModelError
    )


# What is given as the model.


def test_a_gguf_file_for_big_endian_machines(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "big-endian" in refusal(tmp_path / "x.gguf", UnsupportedModelError)


def test_a_model_of_pictures_and_text(tmp_path):
    config = transformers.LlavaConfig(
        text_config=tiny_models.make("llama").config, vision_config={"model_type": "clip_vision_model"}
    )
    config.save_pretrained(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    message = refusal(tmp_path, UnsupportedModelError)
    assert "(llava)" in message and "language model alone" in message


def test_names_cannot_steer_the_terminal(model):
    folder = model("llama")
    rewrite(folder, lambda tensors: tensors.update({"x\x1b[2J\nError: y": torch.ones(1)}))
    with pytest.raises(UnsupportedModelError) as caught:
        Skeleton(open_checkpoint(folder))
    message, code = user_message(caught.value)
    assert "x\\x1b[2J\\x0aError: y" in message and message.isprintable() and code == 1


def test_messages_of_other_libraries_cannot_either():
    assert one_line(ValueError("a\x1b[2J\u202eb\nc")) == "a\\x1b[2J\\x202eb"
    message, _ = user_message(FileNotFoundError(2, "No such file", "a\nb"))
    assert message == "a\\x0ab: No such file."
