"""Embedded files are put into their folder and nowhere else, whatever they are called."""

import os
import tempfile
from pathlib import Path

import pytest
import samples

import bstk
from bstack.engine.container import embedded_files
from bstack.engine.export import export_safetensors


def with_files(tmp_path, *names):
    chunks = [samples.entry(name, bstk.FILE, name.encode()) for name in names]
    bstk.write(tmp_path / "files.bstk", {}, chunks, len(chunks))
    return bstk.open(tmp_path / "files.bstk")


def test_files_land_in_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    os.mkdir(tmp_path / "temporary")
    names = [
        "config.json",
        "a/b/c.json",
        "...",
        "~",
        "~root/x",
        "$HOME",
        "-rf",
        "%2e%2e/x",
        "a b",
        "con",
        "é",
        "x" * 200,
    ]
    with with_files(tmp_path, *names) as file:
        before = set(tmp_path.rglob("*"))
        with embedded_files(file) as folder:
            assert folder.parent.parent == tmp_path / "temporary"
            found = set(tmp_path.rglob("*")) - before - {folder.parent}
            assert {path.relative_to(folder).as_posix() for path in found if path.is_file()} == set(names)
            assert all(path == folder or folder in path.parents for path in found)
            assert all((folder / name).read_bytes() == name.encode() for name in names)
        assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "names", [("a", "a/b"), ("a/b", "a"), ("x" * 1000,), ("/".join(["x" * 250] * 4) + "/" + "y" * 20,)]
)
def test_names_that_cannot_stand_beside_each_other(tmp_path, names, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        with with_files(tmp_path, *names) as file, embedded_files(file) as folder:
            assert all((folder / name).read_bytes() == name.encode() for name in names)
    except bstk.DamagedError as error:
        assert "cannot be written" in str(error)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["files.bstk"]


@pytest.mark.parametrize(
    "name",
    [
        ".git/config",
        "a/.hidden.json",
        "~/.bashrc",
        "~x.json",
        "pytorch_model.bin",
        "modeling_x.py",
        "adapter_config.json",
        "Model.safetensors.index.json",
        "model.safetensors",
        "model-00001.safetensors",
        "a.part",
        "noending",
    ],
)
def test_an_exported_folder_gets_no_file_that_other_programs_act_on(tmp_path, name):
    with (
        with_files(tmp_path, "config.json", name) as file,
        pytest.raises(bstk.DamagedError, match="beside its weights"),
    ):
        export_safetensors(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
