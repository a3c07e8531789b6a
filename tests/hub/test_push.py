"""``bstack push``: what lies in the repository afterwards, from a stand-in for the hub, and what is refused."""

import json
import re
import shutil

import in_process
import pytest
import tiny_models

import bstack
import bstk
from bstack.hub.card import base_model_of, draw_curve, model_card
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
    shutil.copy(model, repository.folder / "OTHER.BSTK")
    done = command(model, "owner/name", cwd=tmp_path, HF_TOKEN=TOKEN)
    assert done.returncode == 2 and "another .bstk file, OTHER.BSTK" in done.stderr
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with bstk.open(model) as file, pytest.raises(bstk.RemoteError, match="owner/name"):
        push(file, "owner/name")


def test_private_repositories(repository, model, tmp_path):
    with_token = {"cwd": tmp_path, "HF_TOKEN": TOKEN}
    assert command(model, "owner/name", "-q", **with_token).returncode == 0
    assert not {"private", "visibility"} & repository.asked[-1].keys(), "the owner's default"
    before = len(repository.commits)
    done = command(model, "owner/name", "--private", **with_token)
    assert done.returncode == 2 and "there already, and public" in done.stderr and len(repository.commits) == before
    repository.private = True
    assert command(model, "owner/name", "--private", "-q", **with_token).returncode == 0
    asked = repository.asked[-1]  # of either version of the hub's client
    assert asked.get("private") is True or asked.get("visibility") == "private"


def test_files_of_an_earlier_model_go(repository, model, tmp_path):
    for name in (
        "chat_template.jinja",
        "added_tokens.json",
        "vocab.txt",
        "tokenizer.model",
        "notes.txt",
        "results.json",
    ):
        (repository.folder / name).write_text("{}")
    (repository.folder / "additional_chat_templates").mkdir()
    (repository.folder / "additional_chat_templates" / "rag.jinja").write_text("")
    assert command(model, "owner/name", "-q", cwd=tmp_path, HF_TOKEN=TOKEN).returncode == 0
    names = {path.relative_to(repository.folder).as_posix() for path in repository.folder.rglob("*") if path.is_file()}
    report = json.loads(command(model, "owner/name", "--dry-run", "out", "--json", cwd=tmp_path).stdout)
    assert names == {*report["files"], "notes.txt", "results.json"}


def test_an_upload_that_stops_goes_on(repository, model, tmp_path):
    repository.most = model.stat().st_size - 1
    done = command(model, "owner/name", cwd=tmp_path, HF_TOKEN=TOKEN)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "owner/name" in done.stderr
    assert not any(repository.folder.iterdir()), "nothing of a commit that is not whole"
    repository.most, first = 2**60, list(repository.puts)
    assert command(model, "owner/name", "-q", cwd=tmp_path, HF_TOKEN=TOKEN).returncode == 0
    assert sorted(repository.puts) == sorted({*first, model.stat().st_size}), "each file arrives once"


def test_the_card_of_an_exact_file(tmp_path):
    source = tiny_models.save("llama", tmp_path / "model", hidden_size=96, intermediate_size=1000, num_hidden_layers=4)
    settings = bstack.Settings(samples=2, sequence_length=16, exact=True, tokenizer=False)
    bstack.compress(source, tmp_path / "tiny.bstk", settings=settings)
    with bstk.open(tmp_path / "tiny.bstk") as file:
        card = model_card(file, "x.bstk", "owner/name", None, None)
        assert f"to {bstk.mb_ceil(file.model.budget)} MB" in card and file.length > file.model.budget
        assert f"The complete file, {bstk.mb_ceil(file.length)} MB" in card
        assert "bstack export hf://owner/name original/" in card
        grown = re.search(r"bstack grow small.bstk --mb (\d+)", card)
        assert grown and int(grown[1]) <= -(-file.model.budget // 2**20)
        bstk.truncate(file, tmp_path / "base.bstk", budget=file.base.budget)
    with bstk.open(tmp_path / "base.bstk") as file:
        card = model_card(file, "x.bstk", "owner/name", None, None)
        assert "bstack grow" not in card and "complete file" not in card


def test_names_and_digests_are_text_in_code(model):
    with bstk.open(model) as file:
        file.metadata["model"] |= {
            "name": "see https://x.org",
            "source": {"files": [{"name": "a", "sha256": "``[x](y)"}]},
        }
        file.metadata["quality"][0]["kld_se"] = -1.0
        card = model_card(file, "my `model`.bstk", "owner/name", None, None)
        assert draw_curve(file)
    assert "[`` my `model`.bstk ``](./my%20%60model%60.bstk)" in card
    assert "SHA-256 ``` ``[x](y) ```." in card and "https://x.org" not in card


def test_a_file_without_a_curve(model):
    with bstk.open(model) as file:
        del file.metadata["quality"]
        card = model_card(file, "x.bstk", "owner/name", None, None)
        assert "was not measured" in card and "curve.png" not in card
