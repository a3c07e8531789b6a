"""Packed weights through transformers' own from_pretrained: the model of bstack.load, in either order of imports, from the hub too."""

import json
import shutil
import subprocess
import sys

import in_process
import pytest
import tiny_models
import torch
from packed_models import IDS, budgets, logits
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AutoHfQuantizer

import bstack
import bstk
from bstack.engine.folder import PLACEHOLDER, export_packed

pytestmark = pytest.mark.slow


def compressed(name, folder, **changes):
    model = tiny_models.add_tokenizer(tiny_models.save(name, folder / "model", **changes))
    settings = bstack.Settings(codec="trellis", planes=2, samples=2, sequence_length=16)
    bstack.compress(model, folder / "tiny.bstk", settings=settings)
    return folder / "tiny.bstk"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compressed("llama", tmp_path_factory.mktemp("quantizer"))


@pytest.fixture(scope="module")
def folder(tiny):
    with bstk.open(tiny) as file:
        export_packed(file, tiny.parent / "packed")
    return tiny.parent / "packed"


def load(place, **settings):
    config = {"quant_method": "bstack", **settings}
    model, found = AutoModelForCausalLM.from_pretrained(place, quantization_config=config, output_loading_info=True)
    assert not any(found.values()), found
    return model


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "opt-projected"])
def test_the_model_of_load(name, tmp_path):
    path = compressed(name, tmp_path)
    with bstk.open(path) as file:
        export_packed(file, tmp_path / "packed")
    for mb in (budgets(path)[0], None):
        ours, theirs = load(tmp_path / "packed", mb=mb), bstack.load(path, mb=mb, mode="packed")[0]
        assert torch.equal(logits(ours), logits(theirs)) and ours.bstack_unfused == theirs.bstack_unfused
        assert bstack.resident(ours) == bstack.resident(theirs)
        assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


def test_generation_and_resizing(folder, tiny):
    small, middle, _ = budgets(tiny)
    model, other = load(folder, mb=small), bstack.load(tiny, mb=middle, mode="packed")[0]
    bstack.resize(model, mb=middle)
    new = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **new), other.generate(IDS, **new))
    assert model.dtype == torch.float32
    with pytest.raises(bstk.UsageError, match="packed"):
        model.save_pretrained(tiny.parent / "no")
    half = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config={"quant_method": "bstack"}, dtype="bfloat16"
    )
    assert half.dtype == torch.bfloat16 and logits(half).dtype == torch.bfloat16


def test_a_repository_on_the_hub_gives_the_budget_alone(hub, folder, tiny):
    server, mb = hub(folder), budgets(tiny)[1]
    model = load("owner/name", mb=mb)
    assert torch.equal(logits(model), logits(load(folder, mb=mb)))
    assert AutoTokenizer.from_pretrained("owner/name")("the river").input_ids
    assert PLACEHOLDER in server.fetched and "tiny.bstk" in server.fetched


def test_the_exact_top_is_not_fetched(hub, tmp_path):
    model = tiny_models.add_tokenizer(tiny_models.save("llama", tmp_path / "model"))
    settings = bstack.Settings(codec="trellis", planes=2, samples=2, sequence_length=16, exact=True)
    path = tmp_path / "tiny.bstk"
    bstack.compress(model, path, settings=settings)
    with bstk.open(path) as file:
        export_packed(file, tmp_path / "packed")
        wanted, whole = file.model.file_bytes, file.length
    shutil.copy(path, tmp_path / "packed" / "tiny.bstk")
    server = hub(tmp_path / "packed")
    AutoTokenizer.from_pretrained("owner/name")
    beside = server.sent
    load("owner/name")
    assert server.sent - beside < wanted + 2**17 < whole


def test_a_folder_of_the_hubs_cache_and_no_network(hub, folder, tmp_path, monkeypatch):
    hub(folder)
    load("owner/name", mb=1)
    (found,) = tmp_path.glob("cache/models--owner--name/snapshots/*")
    assert bstack.resident(load(found)).blocks
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(bstk.UsageError, match="HF_HUB_OFFLINE is set"):
        load(found)


def test_settings_in_the_configuration(folder, tiny, tmp_path):
    copy, mb = shutil.copytree(folder, tmp_path / "copy"), budgets(tiny)[1]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bstack", "mb": mb}})
    )
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.tie_weights()  # as lm-eval does
    assert torch.equal(logits(model), logits(load(folder, mb=mb)))


@pytest.mark.parametrize("first", ["bstack", "transformers.quantizers.auto"])
def test_the_order_of_imports_does_not_matter(first):
    code = (
        f"import sys; import {first}; import bstack\n"
        f"assert {first!r} != 'bstack' or not {{'torch', 'transformers', 'numpy'}} & set(sys.modules)\n"
        "from transformers.quantizers.auto import AutoHfQuantizer\n"
        "AutoHfQuantizer.from_config({'quant_method': 'bstack'})\n"
        "import bstack.engine.registry as r; r.register()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_refusals(folder, tiny, tmp_path):
    # Without bstack's quantizer no random weights run.
    with pytest.raises(ValueError, match=r"tiny\.bstk"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(bstk.BudgetError):
        load(folder, mb=0.001)
    with pytest.raises(bstk.UsageError, match="positive"):
        load(folder, mb=-3)
    with pytest.raises(TypeError, match="mbs"):
        load(folder, mbs=3)
    with pytest.raises(bstk.UsageError, match=r"names no \.bstk file"):
        load(tiny.parent / "model")
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tiny.bstk").unlink()
    with pytest.raises(bstk.UsageError, match="no such file"):
        load(copy)


def test_one_device():
    """transformers takes a device map only where accelerate is installed, so the quantizer is asked itself."""
    quantizer = AutoHfQuantizer.from_config({"quant_method": "bstack"})
    for device_map in (None, "auto", "cpu", {"": "cpu"}, {"": torch.device("cpu")}):
        if device_map != "auto" or not torch.cuda.is_available():
            quantizer.update_device_map(device_map)
            assert quantizer._device == torch.device("cpu")
    for device_map in ({"model": "cpu", "lm_head": "disk"}, "balanced", "sequential", {"": "disk"}, {"": None}):
        with pytest.raises(bstk.UsageError, match="one device"):
            quantizer.update_device_map(device_map)


def test_the_command(tiny, tmp_path):
    mb = budgets(tiny)[1]
    done = in_process.bstack("export", tiny, "--to", "transformers", "out", "--mb", mb, "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert report["to"] == "transformers" and report["files"] == sorted(p.name for p in (tmp_path / "out").iterdir())
    with bstk.open(tmp_path / "out" / "tiny.bstk") as file:
        assert file.state == "sealed" and file.length == report["cut"]["file_bytes"]
    assert torch.equal(logits(load(tmp_path / "out")), logits(bstack.load(tiny, mb=mb, mode="packed")[0]))
    done = in_process.bstack("export", tiny, "--to", "transformers", "no", "--dtype", "bf16", cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "no").exists()
    done = in_process.bstack("export", tiny, "--to", "transformers", "whole", cwd=tmp_path)
    assert "packed weights" in done.stdout and (tmp_path / "whole" / "tiny.bstk").read_bytes() == tiny.read_bytes()
