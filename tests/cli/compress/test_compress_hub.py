"""``bstack compress``: models of the hub, from a cache as the hub's own client leaves it; no network."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from compressing import QUICK, rewrite

import bstk

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tiny_llama, tmp_path):
    """A folder for HF_HOME that holds the tiny model as owner/tiny, a revision called old, and a model of pickles."""
    for name, revision in (("owner--tiny", "main"), ("owner--tiny", "old"), ("owner--pickled", "main")):
        home = tmp_path / "home" / "hub" / f"models--{name}"
        commit = {"main": "1" * 40, "old": "2" * 40}[revision]
        snapshot = home / "snapshots" / commit
        shutil.copytree(tiny_llama, snapshot)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(commit)
        if revision == "old":
            rewrite(snapshot, lambda tensors: tensors["model.norm.weight"].mul_(2))
        if name == "owner--pickled":
            (snapshot / "model.safetensors").unlink()
            (snapshot / "pytorch_model.bin").write_bytes(b"\x80\x02")
    return tmp_path / "home"


def test_hub_ids(run, hub, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub / "hub"))
    norms = {}
    for name in ("owner/tiny", "owner/tiny@old"):
        code, _, err = run(name, "-o", "out.bstk", "--force", *QUICK)
        assert code == 0, err
        with bstk.open(tmp_path / "out.bstk") as file:
            assert file.metadata["model"]["name"] == name
            norms[name] = file.read(next(c for c in file.chunks if c.name == "model.norm.weight"))
    doubled = torch.frombuffer(bytearray(norms["owner/tiny"]), dtype=torch.float32) * 2
    assert doubled.numpy().tobytes() == norms["owner/tiny@old"]
    assert run("owner/pickled", "-o", "p.bstk", *QUICK)[0] == 1
    assert run("owner/other", "-o", "p.bstk", *QUICK)[0] == 2


def test_hub_id_with_the_command_as_installed(bstack, hub, tmp_path):
    done = bstack(
        "compress", "owner/tiny", "-o", "out.bstk", "--json", "-q", *QUICK, HF_HOME=str(hub), HF_HUB_OFFLINE="1"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["linears"] == 16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out.bstk"]
