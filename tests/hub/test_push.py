"""``bstack push``: what lies in the repository afterwards, from a stand-in for the hub, and what is refused."""

import json
import re
import shutil

import in_process
import pytest
import tiny_models

import bstack
import bstk
from bstack.hub.card import base_model_of, model_card
from bstack.hub.push import push

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow

TOKEN = "hf_secret"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    source = tiny_models.add_tokenizer(tiny_models.save("llama", folder / "model"))
    bstack.compress(source, folder / "tiny.bstk", settings=bstack.Settings(codec="sign", samples=2, sequence_length=16))
    return folder / "tiny.bstk"


@pytest.fixture
def repository(hub, tmp_path):
    """An empty repository that takes commits with the token."""
    (tmp_path / "repository").mkdir()
    server = hub(tmp_path / "repository", token=TOKEN, licence="apache-2.0")
    server.folder = tmp_path / "repository"
    return server


def command(*args, cwd, **environment):
    return in_process.bstack("push", *args, cwd=cwd, **environment)


def test_what_lies_there_afterwards(repository, model, tmp_path):
    done = command(model, "owner/name", "--json", "-q", cwd=tmp_path, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    there = {path.name: path.stat().st_size for path in repository.folder.iterdir()}
    assert (
        report["schema"] == "bstack.push/1" and report["files"] == there and report["url"].startswith(repository.base)
    )
    assert there.keys() >= {"README.md", "curve.png", "tiny.bstk", "config.json", "tokenizer.json"}
    assert (repository.folder / "tiny.bstk").read_bytes() == model.read_bytes() and len(repository.commits) == 1
    assert (repository.folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    # What the card promises: a name without a file, a cut, the root.
    card = (repository.folder / "README.md").read_text(encoding="utf-8")
    with bstk.open("hf://owner/name") as file, bstk.open(model) as same:
        assert file.root == same.root and same.root.hex() in card
        assert card.count(same.root.hex()) == 2
        rows = re.findall(r"^\| [\d.,]+ \| ([\d.]+) \|", card, re.MULTILINE)
        assert rows == [f"{point['bits_per_weight']:.2f}" for point in same.metadata["quality"]]
    for line in re.findall(r"^\$ (bstack .*?)(?:    #.*)?$", card, re.MULTILINE):
        assert "hf://owner/name" in line or line.startswith("bstack verify")
    # Again: the same commit replaces nothing else.
    assert command(model, "owner/name", "-q", cwd=tmp_path, HF_TOKEN=TOKEN).returncode == 0


def test_a_dry_run_writes_the_same_and_sends_nothing(repository, model, tmp_path):
    done = command(model, "owner/name", "--dry-run", "out", "--license", "mit", cwd=tmp_path)
    assert done.returncode == 0 and "nothing was uploaded" in done.stdout, done.stderr
    assert not any(repository.folder.iterdir())
    dry = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert command(model, "owner/name", "--license", "mit", cwd=tmp_path, HF_TOKEN=TOKEN).returncode == 0
    sent = {path.name: path.read_bytes() for path in repository.folder.iterdir()}
    assert sent.pop("tiny.bstk") and dry == sent


def test_the_original_is_named(repository, model, tmp_path):
    run = ("owner/mine", "--dry-run", "out", "--base-model", "owner/name", "--json")
    report = json.loads(command(model, *run, cwd=tmp_path).stdout)
    assert (report["base_model"], report["license"]) == ("owner/name", "apache-2.0")
    header = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert "base_model: owner/name\n" in header and "license: apache-2.0\n" in header
    done = command(model, "owner/mine", "--dry-run", "without", cwd=tmp_path)
    assert "names no licence" in done.stderr and "license" not in (tmp_path / "without" / "README.md").read_text(
        "utf-8"
    )


@pytest.mark.parametrize(
    ("name", "base"),
    [("owner/name", "owner/name"), ("owner/name@v1", "owner/name"), ("folder", None), ("a/b/c", None), (7, None)],
)
def test_the_hub_id_that_a_file_records(model, name, base):
    with bstk.open(model) as file:
        file.metadata["model"]["name"] = name
        assert base_model_of(file) == base


def test_texts_of_the_metadata_stay_text(model):
    with bstk.open(model) as file:
        file.metadata["model"] |= {"name": "a|b](x) <b>\n# c", "architecture": None, "source": {"files": [3]}}
        file.metadata["quality_text"] = "*text*"
        file.metadata["quality"] += [{"file_bytes": 1, "kld": None}, 5]
        card = model_card(file, "x.bstk", "owner/name", None, None)
    assert "<b>" not in card.replace("\\<b\\>", "") and "\n# c" not in card and "\\*text\\*" in card


def test_refusals(repository, model, tmp_path, monkeypatch):
    for bad in ("name", "owner/name/more", "owner//name", "owner/na me"):
        assert command(model, bad, "--dry-run", "no", cwd=tmp_path).returncode == 2
    done = command(model, "owner/name", cwd=tmp_path, HF_TOKEN="")
    assert done.returncode == 1 and "HF_TOKEN" in done.stderr and "Traceback" not in done.stderr
    done = command(model, "owner/name", "--license", "bad", cwd=tmp_path, HF_TOKEN=TOKEN)
    assert done.returncode == 1 and "no such license" in done.stderr and not any(repository.folder.iterdir())
    (tmp_path / "part.bstk").write_bytes(model.read_bytes()[:-5])
    done = command("part.bstk", "owner/name", "--dry-run", "no", cwd=tmp_path)
    assert done.returncode == 2 and "partial" in done.stderr
    damaged = bytearray(model.read_bytes())
    damaged[-9] ^= 1
    (tmp_path / "damaged.bstk").write_bytes(damaged)
    assert command("damaged.bstk", "owner/name", cwd=tmp_path, HF_TOKEN=TOKEN).returncode == 5
    assert not any(repository.folder.iterdir()) and not (tmp_path / "no").exists()
    shutil.copy(model, repository.folder / "other.bstk")
    done = command(model, "owner/name", cwd=tmp_path, HF_TOKEN=TOKEN)
    assert done.returncode == 2 and "another .bstk file, other.bstk" in done.stderr
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with bstk.open(model) as file, pytest.raises(bstk.RemoteError, match="owner/name"):
        push(file, "owner/name")


def test_a_file_without_a_curve(model):
    with bstk.open(model) as file:
        del file.metadata["quality"]
        card = model_card(file, "x.bstk", "owner/name", None, None)
        assert "was not measured" in card and "curve.png" not in card
