"""What is fetched from the hub: the weights once, in the format that transformers takes, and the files beside them."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny_models
from hub_server import COMMIT

import bstk
from bstack.errors import ModelWarning
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton

# What public repositories hold beside the weights that transformers reads.
MORE = [
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "tf_model.h5",
    "tiny-Q4_K_M.gguf",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/model.safetensors",
    "onnx/model.onnx",
    "onnx/config.json",
    "README.md",
    "modeling_own.py",
]


@pytest.fixture
def repository(tiny_llama, tmp_path):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "repository"))
    for name in MORE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return folder


BESIDE = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
BESIDE |= {"additional_chat_templates/tools.jinja"}


def test_one_file(hub, repository):
    server = hub(repository)
    checkpoint = open_checkpoint("owner/name")
    Skeleton(checkpoint)
    assert sorted(server.fetched) == sorted(BESIDE | {"model.safetensors"})
    assert checkpoint.folder.name == COMMIT and checkpoint.name == "owner/name"
    open_checkpoint("owner/name@main")
    assert len(server.fetched) == len(BESIDE) + 1


@pytest.mark.parametrize("whole", [True, False])
def test_shards(hub, repository, tmp_path, whole):
    if not whole:
        (repository / "model.safetensors").unlink()
    for file in tiny_models.save("llama", tmp_path / "sharded", shard="50KB").glob("model*"):
        shutil.copy(file, repository)
    server = hub(repository)
    with pytest.warns(ModelWarning) if whole else nullcontext():
        open_checkpoint("owner/name")
    shards = {"model.safetensors"} if whole else {p.name for p in repository.glob("model-*-of-*.safetensors")}
    assert sorted(server.fetched) == sorted(BESIDE | {"model.safetensors.index.json"} | shards)


@pytest.mark.parametrize(
    ("missing", "words"), [("model.safetensors", "has no model.safetensors"), ("config.json", "has no config.json")]
)
def test_no_weights_are_fetched_when_there_is_no_model(hub, repository, missing, words):
    (repository / missing).unlink()
    server = hub(repository)
    with pytest.raises(bstk.BstkError, match=words):
        open_checkpoint("owner/name")
    assert {name for name in server.fetched if "safetensors" in name} == set()


def test_an_adapter(hub, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    hub(tmp_path / "adapter")
    with pytest.raises(bstk.BstkError, match="owner/base"):
        open_checkpoint("owner/name")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("owner/other", "The hub answers: .*404"),
        ("owner/name@gone", "The hub answers: .*404"),
        ("a/b/c", "It is no hub id"),
    ],
)
def test_a_repository_that_is_not_there(hub, repository, model, words):
    server = hub(repository)
    with pytest.raises(bstk.UsageError, match=words):
        open_checkpoint(model)
    assert server.fetched == []


def test_without_a_list_of_files_nothing_is_fetched(hub, repository, monkeypatch):
    from huggingface_hub import HfApi

    def too_many(*arguments, **options):
        raise ConnectionError("429 Too Many Requests")

    server = hub(repository)
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "model_info", too_many)
        with pytest.raises(bstk.UsageError, match="cannot be reached, and its cache holds no copy"):
            open_checkpoint("owner/name")
        assert server.fetched == []
    open_checkpoint("owner/name")
    fetched = len(server.fetched)
    monkeypatch.setattr(HfApi, "model_info", too_many)
    checkpoint = open_checkpoint("owner/name")  # the copy
    Skeleton(checkpoint)
    assert checkpoint.folder.name == COMMIT and len(server.fetched) == fetched
