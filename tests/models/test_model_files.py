"""Putting a model's files into a folder: names that are none, and disks that refuse."""

import errno
import os

import pytest

import bstack
import bstk
from bstack.errors import UnsupportedModelError
from bstack.models.files import put_files


def test_files_in_folders(tmp_path):
    put_files([("a.json", [b"1", b"", b"23"]), ("templates/b.jinja", [b"2"]), ("templates/c.jinja", [])], tmp_path, "x")
    assert (tmp_path / "a.json").read_bytes() == b"123" and (tmp_path / "templates" / "b.jinja").read_bytes() == b"2"


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a"], ["x" * 300]])
def test_a_name_that_is_none_here_is_damage_of_where_it_comes_from(tmp_path, names):
    with pytest.raises(bstk.DamagedError, match=r"^x\.bstk: its file '[a/bx]+' cannot be put into a folder here: "):
        put_files([(name, [b""]) for name in names], tmp_path, "x.bstk")


@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, bstk.ResourceError), (errno.EIO, bstk.OutputError)])
def test_a_disk_that_refuses_is_no_damage(tmp_path, monkeypatch, code, expected):
    def refuse(sink, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("bstack.models.files.Sink.write", refuse)
    with pytest.raises(expected) as caught:
        put_files([("a", [b"1"])], tmp_path, "x.bstk")
    assert type(caught.value) is expected and str(tmp_path / "a") in str(caught.value)


def test_files_that_no_container_takes_are_refused_before_anything_is_computed(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("bstk.limits.MAX_FILES_LENGTH", 1000)
    with pytest.raises(UnsupportedModelError, match="configuration and tokenizer take .* at most"):
        bstack.compress(
            tiny_llama,
            tmp_path / "x.bstk",
            settings=bstack.Settings(codec="sign", planes=1, rank=1, samples=2, sequence_length=16),
        )
    assert not (tmp_path / "x.bstk").exists()
