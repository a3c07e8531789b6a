"""Putting a model's files into a folder: names that are none, and disks that refuse."""

import errno
import os
from pathlib import Path

import bstk
import pytest
from bstack.models.files import put_files


def test_files_in_folders(tmp_path):
    put_files([("a.json", b"1"), ("templates/b.jinja", b"2"), ("templates/c.jinja", b"")], tmp_path, "x")
    assert (tmp_path / "a.json").read_bytes() == b"1" and (tmp_path / "templates" / "b.jinja").read_bytes() == b"2"


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a"], ["x" * 300]])
def test_a_name_that_is_none_here_is_damage_of_where_it_comes_from(tmp_path, names):
    with pytest.raises(bstk.DamagedError, match=r"^x\.bstk: its file '[a/bx]+' cannot be put into a folder here: "):
        put_files([(name, b"") for name in names], tmp_path, "x.bstk")


@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, bstk.ResourceError), (errno.EIO, bstk.OutputError)])
def test_a_disk_that_refuses_is_no_damage(tmp_path, monkeypatch, code, expected):
    def refuse(path, data):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(expected) as caught:
        put_files([("a", b"1")], tmp_path, "x.bstk")
    assert type(caught.value) is expected and str(tmp_path / "a") in str(caught.value)
