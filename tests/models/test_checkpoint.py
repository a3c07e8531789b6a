"""Every tensor of a checkpoint is accounted for: used as transformers uses it, left out by a rule, or refused by name."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
import transformers
from checkpoints import IDS, noise, ours, refusal, same, theirs
from compressing import reconfigure, rewrite
from safetensors.torch import load_file, save_file

import bstack
import bstk
from bstack.compression.layers import model_files
from bstack.engine.export import export_safetensors
from bstack.engine.native.load import load as load_native
from bstack.errors import ModelWarning, UnsupportedModelError
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = ["llama-tied", "gemma2", "gpt2"]


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
