"""Code on the hub: what runs is what was announced, and an export says where it is."""

import json
import shutil

import pytest
from own_code import MAP, SETTINGS, Marker, edit, put_modules
from transformers import AutoModelForCausalLM

import bstack
import bstk
from bstack.errors import ForeignCodeError, ForeignCodeWarning
from bstack.models.files import hub_snapshot
from bstack.models.open import open_checkpoint

pytestmark = pytest.mark.slow


def test_code_of_the_hub(model, hub, tmp_path, marker):
    """Compressed from the hub, a file knows where the code is, and at which commit."""
    with pytest.raises(ForeignCodeError):
        open_checkpoint("owner/own")
    with pytest.warns(ForeignCodeWarning, match=f"owner/own@{'1' * 40}"):
        bstack.compress("owner/own", tmp_path / "own.bstk", settings=SETTINGS, trust_remote_code=True)
    with pytest.raises(ForeignCodeError):
        bstack.load(tmp_path / "own.bstk")
    marker.taken()
    with pytest.warns(ForeignCodeWarning, match=f"from owner/own@{'1' * 40}"):
        loaded, _ = bstack.load(tmp_path / "own.bstk", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    # A folder that borrows some of its code from there.
    borrowed = tmp_path / "borrowed"
    shutil.copytree(model, borrowed, ignore=shutil.ignore_patterns("*.py"))
    edit(borrowed / "config.json", auto_map={auto: f"owner/own--{name}" for auto, name in MAP.items()})
    with pytest.raises(bstk.BstkError, match="2 places"):
        open_checkpoint(borrowed, trust_remote_code=True)
    with pytest.raises(ForeignCodeError):
        open_checkpoint(borrowed)


def test_the_code_that_runs_is_the_code_that_was_announced(hub, borrowed, tmp_path, marker, monkeypatch):
    """The hub has another commit as soon as the first one is fetched."""
    stranger = Marker(tmp_path / "stranger")
    put_modules(hub / "snapshots" / ("2" * 40), stranger)

    def fetched(*arguments):
        folder = hub_snapshot(*arguments)
        (hub / "refs" / "main").write_text("2" * 40)
        return folder

    monkeypatch.setattr("bstack.models.code.hub_snapshot", fetched)
    with pytest.warns(ForeignCodeWarning, match=f"owner/own@{'1' * 40}"):
        bstack.compress(borrowed, tmp_path / "own.bstk", settings=SETTINGS, trust_remote_code=True)
    assert (marker.taken(), stranger.taken()) == ({"configuration", "model", "tokenizer"}, set())
    with bstk.open(tmp_path / "own.bstk") as file:
        assert file.metadata["model"]["code"]["from"] == f"owner/own@{'1' * 40}"
    assert b"bstack-" not in (tmp_path / "own.bstk").read_bytes()


@pytest.mark.parametrize("place", ["owner/own", "borrowed"])
def test_an_exported_folder_says_where_on_the_hub_its_code_is(place, hub, borrowed, tmp_path, marker, run):
    source = borrowed if place == "borrowed" else place
    with pytest.warns(ForeignCodeWarning):
        bstack.compress(source, tmp_path / "own.bstk", settings=SETTINGS, trust_remote_code=True)
    arguments = ["export", tmp_path / "own.bstk", "--to", "safetensors", tmp_path / "out", "--trust-remote-code"]
    status, out, err = run(*arguments, "--json")
    assert status == 0 and json.loads(out)["code"] == [], err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == {
        auto: f"owner/own--{name}" for auto, name in MAP.items()
    }
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["auto_map"]["AutoTokenizer"]
    assert "owner/own--tokenization_own.OwnTokenizerFast" in found
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"


def test_an_exported_folder_needs_the_code_of_a_folder_beside_it(packed, model, tmp_path, run):
    arguments = ["export", packed, "--to", "safetensors", tmp_path / "out", "--trust-remote-code", "--code", model]
    status, out, _ = run(*arguments)
    modules = ["configuration_own.py", "helper.py", "modeling_own.py", "tokenization_own.py"]
    assert status == 0 and f"copy its Python code there: {', '.join(modules)}" in out
    assert not list((tmp_path / "out").glob("*.py"))
    for name in modules:
        shutil.copy(model / name, tmp_path / "out")
    assert (
        type(AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)).__name__
        == "OwnForCausalLM"
    )
