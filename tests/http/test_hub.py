"""hf:// without a file: the only .bstk file of a repository, from a stand-in for the hub."""

import json

import pytest
from hub_server import HubServer
from served_files import cut_sizes

import bstk
from bstk.http import HEAD


@pytest.fixture
def hub(tmp_path, monkeypatch, long_head):
    """The stand-in, whose repository ``owner/name`` has one .bstk file among others."""
    folder = tmp_path / "repository"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "more" / "model.bstk").write_bytes(long_head)
    with HubServer(folder) as server:
        server.folder = folder
        monkeypatch.setenv("HF_ENDPOINT", server.base)
        yield server


@pytest.mark.parametrize("url", ["hf://owner/name", "hf://owner/name/", "hf://owner/name@main", "HF://owner/name"])
def test_the_only_file_needs_no_name(hub, long_head, url):
    with bstk.open(url) as file, bstk.open(long_head) as same:
        assert file.root == same.root and file.source.name == f"hf{url[2:].rstrip('/')}/more/model.bstk"
        assert bstk.is_url(file.source.name)
    assert set(hub.fetched) == {"more/model.bstk"}


def test_a_cut_of_it_is_fetched_alone(hub, long_head, tmp_path):
    mb = cut_sizes(long_head)[3]
    bstk.truncate("hf://owner/name", tmp_path / "out.bstk", mb)
    with bstk.open(tmp_path / "out.bstk") as file:
        assert file.state == "sealed" and hub.sent <= HEAD + file.length
        bstk.grow(tmp_path / "out.bstk", cut_sizes(long_head)[9], "hf://owner/name")


def test_several_files_or_none(hub):
    (hub.folder / "other.BSTK").write_bytes(b"")
    with pytest.raises(bstk.RemoteError, check=lambda error: error.missing, match="has 2") as e:
        bstk.open("hf://owner/name")
    assert "files: more/model.bstk, other.BSTK." in str(e.value) and "hf://owner/name/more/model.bstk" in str(e.value)
    for name in ("more/model.bstk", "other.BSTK"):
        (hub.folder / name).unlink()
    with pytest.raises(bstk.RemoteError, check=lambda error: error.missing, match="has no"):
        bstk.open("hf://owner/name")
    assert hub.fetched == []


def test_no_such_repository_or_revision(hub):
    with pytest.raises(bstk.RemoteError, check=lambda error: error.missing, match="no such repository or revision"):
        bstk.open("hf://owner/other")


@pytest.mark.parametrize("answer", [b"<html>", b"[]", json.dumps({"siblings": [{"rfilename": 1}, 2]}).encode()])
def test_an_answer_that_is_no_list(serve, monkeypatch, answer):
    monkeypatch.setenv("HF_ENDPOINT", serve(answer).base)
    with pytest.raises(bstk.RemoteError, match=r"cannot be read|has no"):
        bstk.open("hf://owner/name")


def test_the_list_is_asked_for_again_after_a_disorder(model, serve, monkeypatch):
    listing = json.dumps({"siblings": [{"rfilename": "a.bstk"}]}).encode()
    server = serve(listing, statuses=[503, -1], then={3: {"data": model}})
    monkeypatch.setenv("HF_ENDPOINT", server.base)
    with bstk.open("hf://owner/name@v1"):
        pass
    paths = ["/api/models/owner/name/revision/v1"] * 3 + ["/owner/name/resolve/v1/a.bstk"]
    assert [asked.path for asked in server.asked] == paths
