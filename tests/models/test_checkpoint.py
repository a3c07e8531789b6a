"""What bstack reads from a folder is what transformers reads from it, or a refusal by name; every tensor is accounted for."""

from __future__ import annotations

import json
import shutil
import struct
import warnings

import pytest
import tiny_models
import torch
import transformers
from compressing import reconfigure, rewrite
from safetensors.torch import load_file, save_file

import bstack
import bstk
from bstack.compression.layers import model_files
from bstack.engine.export import export_safetensors
from bstack.engine.native.load import load as load_native
from bstack.errors import ModelWarning, UnsupportedModelError, one_line, user_message
from bstack.eval.streamed import run_streamed
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton
from bstack.models.tokenizer import export_tokenizer

IDS = torch.randint(3, tiny_models.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = ["llama-tied", "gemma2", "gpt2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model of an architecture; nobody writes into it."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tiny_models.save(name, tmp_path_factory.mktemp("saved") / name)
        return made[name]

    return get


@pytest.fixture
def model(saved, tmp_path):
    """A copy of such a folder that a test may change."""
    return lambda name: shutil.copytree(saved(name), tmp_path / name)


def noise(like, seed=9):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def theirs(folder, ids=IDS):
    """The logits of transformers."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return loaded(ids).logits


def ours(folder, ids=IDS):
    """The logits of the original as bstack reads it, layer by layer, as for ``bench --original``."""
    found = []
    run_streamed(Skeleton(open_checkpoint(folder)), ids, lambda _, logits: found.append(logits.clone()))
    return torch.stack(found)


def same(folder):
    return torch.allclose(ours(folder), theirs(folder), atol=1e-5, rtol=1e-5)


def refusal(folder, kind=bstk.BstkError):
    with pytest.raises(kind) as caught:
        Skeleton(open_checkpoint(folder))
    return str(caught.value)


# Tied in the configuration, and what the checkpoint holds beside that.


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_with_other_values_is_kept_as_transformers_keeps_it(model, name):
    folder = model(name)
    head, embedding = names(name)
    before = theirs(folder)
    rewrite(folder, lambda tensors: tensors.update({head: noise(tensors[embedding])}))
    assert not torch.allclose(theirs(folder), before, atol=0.1)
    assert same(folder)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_with_the_same_values_stays_tied(model, name):
    folder = model(name)
    head, embedding = names(name)
    rewrite(folder, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    skeleton = Skeleton(open_checkpoint(folder))
    assert skeleton.input_name == skeleton.output_name and same(folder)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_without_the_embedding_fills_it(model, name):
    folder = model(name)
    head, embedding = names(name)
    rewrite(folder, lambda tensors: tensors.update({head: tensors.pop(embedding)}))
    assert same(folder)


def test_a_head_that_differs_in_one_value_far_down(model):
    def change(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += 1

    folder = model("llama-tied")
    rewrite(folder, change)
    skeleton = Skeleton(open_checkpoint(folder))
    assert skeleton.output_name == HEAD and same(folder)
    Skeleton(skeleton.checkpoint)  # again, from the same configuration
    assert json.loads(model_files(skeleton.checkpoint, False)["config.json"]).get("tie_word_embeddings") is not True


def test_tied_without_either(model):
    folder = model("llama-tied")
    rewrite(folder, lambda tensors: tensors.pop(EMBEDDING))
    assert f"lacks {EMBEDDING}" in refusal(folder, UnsupportedModelError)


def test_an_untied_model_without_its_head(model):
    folder = model("llama")
    rewrite(folder, lambda tensors: tensors.pop(HEAD))
    assert f"lacks {HEAD}" in refusal(folder, UnsupportedModelError)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_a_head_of_its_own_goes_through_every_stage(model, name, tmp_path):
    """Compressed, loaded, packed, exported and read by transformers again."""
    folder = model(name)
    rewrite(folder, lambda tensors: tensors.update({HEAD: noise(tensors[EMBEDDING])}))
    bstack.compress(
        folder,
        tmp_path / "x.bstk",
        settings=bstack.Settings(codec="sign", planes=12, rank=6, samples=4, sequence_length=32),
    )
    dense, _ = bstack.load(tmp_path / "x.bstk")
    packed, _ = bstack.load(tmp_path / "x.bstk", mode="packed")
    with bstk.open(tmp_path / "x.bstk") as file:
        export_safetensors(file, tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = dense(IDS).logits
        assert distance(packed(IDS).logits, found) < 0.01
    assert distance(found, theirs(folder)) < 0.05
    assert torch.equal(theirs(tmp_path / "out"), found)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    native, _ = load_native(tmp_path / "x.bstk")
    read = torch.from_numpy(native.read(native.sequence(), IDS[0].tolist()))
    assert distance(read, found[0, -1]) < 0.01
    assert dense.get_output_embeddings().weight is not dense.get_input_embeddings().weight


def names(name):
    return (HEAD, "transformer.wte.weight") if name == "gpt2" else (HEAD, EMBEDDING)


def distance(a, b):
    """Relative error, the median over the positions."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


# Tensors that no parameter takes.


@pytest.mark.parametrize("key", ["lm_head.bias", "model.layers.2.mlp.up_proj.weight", "v_head.summary.weight"])
def test_a_tensor_that_belongs_nowhere_is_refused_by_name(model, key):
    folder = model("llama")
    rewrite(folder, lambda tensors: tensors.update({key: torch.ones(48)}))
    message = refusal(folder, UnsupportedModelError)
    assert f"holds {key}, for which LlamaForCausalLM has no place" in message and "config.json" in message


def test_fewer_layers_than_weights(model):
    folder = model("llama")
    reconfigure(folder, num_hidden_layers=1, layer_types=None)
    assert "holds model.layers.1." in refusal(folder, UnsupportedModelError)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gpt2", "transformer.h.0.attn.bias", torch.ones(1, 1, 8, 8).tril()),
        ("gpt2", "transformer.h.1.attn.masked_bias", torch.tensor(-1e4)),
        ("gpt-neox", "gpt_neox.layers.0.attention.bias", torch.ones(1, 1, 8, 8).tril().bool()),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(6)),
        ("llama", "model.layers.1.self_attn.rotary_emb.cos_cached", torch.ones(1, 1, 8, 12)),
    ],
)
def test_masks_and_tables_of_old_checkpoints_are_left_out_with_a_warning(model, name, key, value):
    folder = model(name)
    rewrite(folder, lambda tensors: tensors.update({key: value}))
    with pytest.warns(ModelWarning, match=f"does not use {key} for"):
        assert same(folder)


def test_layers_that_predict_several_tokens_are_left_out_with_a_warning(tmp_path):
    """In a file of their own, as GLM has them; the class in transformers lists them as unneeded."""
    sizes = {
        "vocab_size": tiny_models.VOCABULARY,
        "hidden_size": 48,
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 2}
    config = transformers.Glm4MoeConfig(**sizes, **heads, n_routed_experts=4, num_experts_per_tok=2)
    transformers.Glm4MoeForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "main.safetensors")
    places = dict.fromkeys(load_file(tmp_path / "main.safetensors"), "main.safetensors")
    more = "model.layers.92.eh_proj.weight"
    save_file({more: torch.ones(48, 96)}, tmp_path / "mtp.safetensors")
    index = {"metadata": {}, "weight_map": {**places, more: "mtp.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(ModelWarning, match=f"does not use {more} for Glm4MoeForCausalLM"):
        assert same(tmp_path)


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.bias", "model.layers.0.self_attn.rotary_emb.weight"])
def test_what_only_looks_like_a_mask_or_a_table_is_refused(model, key):
    folder = model("llama")
    rewrite(folder, lambda tensors: tensors.update({key: torch.ones(48)}))
    assert key in refusal(folder, UnsupportedModelError)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_with_the_prefix_of_a_wrapper(model, prefix):
    """As torch.compile, data parallel training and unmerged adapters leave them."""
    folder = model("llama")
    rewrite(folder, lambda tensors: [tensors.update({prefix + key: tensors.pop(key)}) for key in list(tensors)])
    message = refusal(folder, UnsupportedModelError)
    assert "lacks lm_head.weight" in message and f"it holds {prefix}lm_head.weight" in message


def test_a_tied_head_of_another_shape(model):
    """As of a vocabulary that was extended in one of the two places."""
    folder = model("llama-tied")
    rewrite(folder, lambda tensors: tensors.update({HEAD: torch.ones(200, 48)}))
    assert "lm_head.weight has shape (200, 48)" in refusal(folder, bstk.DamagedError)


def test_two_names_of_one_parameter(model):
    folder = model("llama")
    rewrite(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(48)}))
    message = refusal(folder, UnsupportedModelError)
    assert "model.norm.weight and norm.weight are both model.norm.weight" in message


def test_names_without_the_prefix_of_the_model(model):
    folder = model("llama")
    rewrite(folder, lambda t: [t.update({k.removeprefix("model."): t.pop(k)}) for k in list(t)])
    assert same(folder)


# Which files.


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


# Parameters of several pieces.


@pytest.mark.parametrize("piece", ["w1", "w2", "w3"])
def test_an_expert_that_is_missing_is_named(model, piece):
    folder = model("mixtral")
    key = f"model.layers.1.block_sparse_moe.experts.2.{piece}.weight"
    rewrite(folder, lambda tensors: tensors.pop(key))
    assert f"lacks {key}, a part of model.layers.1.mlp.experts" in refusal(folder, UnsupportedModelError)


def test_experts_of_which_all_lack_a_piece(model):
    folder = model("mixtral")
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1." in key and "w3" in key])
    assert "lacks .experts.*.w3.weight, a part of model.layers.1." in refusal(folder, UnsupportedModelError)


def test_an_expert_too_many_is_named(model):
    folder = model("mixtral")
    key = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    rewrite(folder, lambda tensors: tensors.update({key.format(4): tensors[key.format(1)].clone()}))
    message = refusal(folder, UnsupportedModelError)
    assert f"holds {key.format(4)}, but model.layers.0.mlp.experts.down_proj has 4 parts" in message


# Values.


@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.1.mlp.up_proj.weight", "model.norm.weight", HEAD])
@pytest.mark.parametrize("value", [1e5, -1e30, 3e38])
def test_weights_beyond_half_precision_are_refused_when_they_are_read(model, name, value):
    folder = model("llama")
    rewrite(folder, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    skeleton = Skeleton(open_checkpoint(folder))
    with pytest.raises(UnsupportedModelError, match=f"^llama: {name} holds weights up to"), skeleton.loaded([name]):
        pass


def test_matrices_of_zeros_are_told_once(model, recwarn):
    """They may be meant, as in layers that were added to a model, or come from a file that was not fetched whole."""
    folder = model("llama")
    found = [f"model.layers.1.{name}.weight" for name in ("mlp.down_proj", "self_attn.o_proj")]
    rewrite(folder, lambda tensors: [tensors[name].zero_() for name in [*found, "model.norm.weight"]])
    assert same(folder) and not ours(folder).any()
    (said,) = {str(warning.message) for warning in recwarn if warning.category is ModelWarning}
    assert said.startswith(f"Zeros alone are in {', '.join(found)}, as in")


def test_large_weights_are_read(model):
    folder = model("llama")
    rewrite(folder, lambda tensors: tensors[EMBEDDING].view(-1)[:1].fill_(65504.0))
    assert same(folder)


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
