"""``bstack compress``: models that it refuses, in which words and with which exit code."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from compressing import QUICK, reconfigure, rewrite

import bstk

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "nobody/nothing@main"])
def test_no_such_model(refused, name):
    refused(2, [f"No model '{name}'", "no such folder or file", "cannot be reached", "hub id"], name)


@pytest.mark.parametrize("name", ["./nothing/of/this/kind", "/nothing", "no spaces allowed"])
def test_no_such_model_and_no_hub_id_either(refused, name):
    refused(2, [f"No model '{name}'", "It is no hub id"], name)


def test_a_file_that_is_no_checkpoint(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refused(1, ["notes.txt is not a GGUF file", "config.json and the safetensors"], "notes.txt")
    (tmp_path / "empty").touch()
    refused(1, "empty is not a GGUF file", "empty")


def test_a_single_safetensors_file_is_no_folder(refused, model):
    refused(2, f"Give the folder: {model}", model / "model.safetensors")


@pytest.mark.parametrize("keep", [8, 100, 3000])
def test_truncated_gguf(refused, tmp_path, keep):
    (tmp_path / "x.gguf").write_bytes((b"GGUF" + bytes([3, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 9]) + b"\1" * 4000)[:keep])
    refused(5, ["x.gguf is not a whole GGUF file", "Fetch it again"], "x.gguf")


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(2, "has no config.json", "empty")


def test_no_weights(refused, model):
    (model / "model.safetensors").unlink()
    refused(2, "has no model.safetensors", "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(refused, model, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")
    refused(1, [name, "never unpickles", "save_pretrained"], "model")


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_safetensors(refused, model, keep):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(5, ["model.safetensors is not a whole safetensors file", "Fetch it again"], "model")


def test_safetensors_that_are_something_else(refused, model):
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 20)
    refused(5, ["model.safetensors is a pointer of git LFS", "git lfs pull"], "model")
    (model / "model.safetensors").write_bytes(b"<!DOCTYPE html>" * 20)
    refused(5, "is not a whole safetensors file", "model")


def test_missing_shard(refused, tmp_path):
    tiny_models.save("llama", tmp_path / "model", shard="50KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    shards[1].unlink()
    refused(5, [f"lacks 1 of {len(shards)} shards", shards[1].name], "model")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index_of_shards(refused, tmp_path, text):
    tiny_models.save("llama", tmp_path / "model", shard="50KB")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(text)
    refused(5, ["model.safetensors.index.json", "weight_map"], "model")


def test_missing_tensors(refused, model):
    rewrite(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(1, ["lacks model.layers.1.mlp.up_proj.weight", "LlamaForCausalLM", "config.json"], "model")


def test_more_layers_than_weights(refused, model):
    reconfigure(model, num_hidden_layers=3, layer_types=None)
    refused(1, ["lacks model.layers.2.", "more"], "model")


def test_shapes_that_contradict_the_configuration(refused, model):
    reconfigure(model, intermediate_size=101)
    refused(5, ["(48, 100)", "(48, 101)", "config.json"], "model")


@pytest.mark.parametrize(
    "text", ["", "{", '"llama"', "[1]", "{}", '{"model_type": "nosuchthing"}', '{"model_type": 7}', "\xff"]
)
def test_damaged_configuration(refused, model, text):
    (model / "config.json").write_text(text, encoding="latin-1")
    refused(1, "config.json", "model")


def test_configuration_with_impossible_sizes(refused, model):
    reconfigure(model, num_attention_heads=0)
    refused(1, "config.json cannot be used", "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
)
def test_weights_that_are_no_numbers(refused, model, name, value):
    def change(tensors):
        tensors[name].view(-1)[[3, 7]] = value

    rewrite(model, change)
    refused(1, [f"{name} holds 2 values that are NaN or infinite"], "model")


def test_infinities_that_cancel(refused, model):
    def change(tensors):
        tensors["model.norm.weight"][0], tensors["model.norm.weight"][1] = float("inf"), float("-inf")

    rewrite(model, change)
    refused(1, "model.norm.weight holds 2 values", "model")


def test_quantised_checkpoints(refused, model):
    reconfigure(model, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    refused(1, ["already quantised (gptq)", "before quantisation"], "model")


def test_weights_of_eight_bits(refused, model):
    rewrite(model, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items() if v.dim() == 2}))
    refused(1, ["F8_E4M3", "before quantisation"], "model")


def test_encoder_decoders(refused, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    refused(1, ["encoder-decoder (t5)", "causal language models"], "t5")


def test_models_that_are_no_language_models(refused, tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    refused(1, ["(vit)", "not a causal language model"], "vit")


def test_dense_tensors_that_no_chunk_can_hold(refused, model, monkeypatch):
    monkeypatch.setattr(bstk.limits, "MAX_RAW_LENGTH", 40_000)
    # 211 x 48 float32.
    words = ["model.embed_tokens.weight takes", "kept dense", "Set embeddings to stack"]
    refused(1, words, "model", "--embeddings", "dense")


def test_large_tensors_that_are_split_are_no_trouble(run, model, monkeypatch):
    monkeypatch.setattr(bstk.limits, "MAX_RAW_LENGTH", 40_000)
    assert run("model", "-o", "out.bstk", *QUICK)[0] == 0


def test_what_is_left_out_is_said(run, model):
    rewrite(model, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    code, _, err = run("model", "-o", "out.bstk", *QUICK)
    assert (
        code == 0
        and "Warning: model: transformers does not use model.layers.0.self_attn.rotary_emb.inv_freq for" in err
    )
    code, _, err = run("model", "-o", "out.bstk", "--force", "-q", *QUICK)
    assert (code, err) == (0, "")


def test_names_with_control_characters(refused, model):
    rewrite(model, lambda tensors: tensors.update({"x\x1b[2J\nError: y": torch.ones(1)}))
    refused(1, "holds x\\x1b[2J\\x0aError: y, for which", "model")


def test_huge_weights(refused, model):
    rewrite(model, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e30))
    refused(1, "model.layers.1.mlp.up_proj.weight holds weights up to", "model")
