"""A model with code of its own, as a folder, on a hub, and compressed."""

import shutil

import pytest
from own_code import MAP, SETTINGS, Marker, edit, forget, put_modules

import bstack
from bstack.cli import main
from bstack.errors import ForeignCodeWarning


@pytest.fixture
def marker(tmp_path):
    return Marker(tmp_path / "marker")


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where transformers copies code that it runs; nothing of an earlier test is in it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    forget()


@pytest.fixture
def model(tiny_llama, tmp_path, marker):
    """A folder as `save_pretrained` leaves it for a model with code of its own."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_llama, folder)
    put_modules(folder, marker)
    edit(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=MAP)
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]},
    )
    return folder


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            main.main(list(map(str, arguments)))
        return (caught.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def packed(model, tmp_path, marker):
    """The model, compressed by a user who trusts it."""
    with pytest.warns(
        ForeignCodeWarning, match="configuration_own.py, helper.py, modeling_own.py, tokenization_own.py"
    ):
        bstack.compress(model, tmp_path / "own.bstk", settings=SETTINGS, trust_remote_code=True)
    assert marker.taken() == {"configuration", "model", "tokenizer"}
    return tmp_path / "own.bstk"


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """A cache of the hub in which owner/own is the model; its folder."""
    home = tmp_path / "hub" / "models--owner--own"
    shutil.copytree(model, home / "snapshots" / ("1" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return home


@pytest.fixture
def borrowed(model, tmp_path):
    """A folder that borrows all its code from there."""
    folder = tmp_path / "borrowed"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.py"))
    edit(folder / "config.json", auto_map={auto: f"owner/own--{name}" for auto, name in MAP.items()})
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "owner/own--tokenization_own.OwnTokenizerFast"]},
    )
    return folder
