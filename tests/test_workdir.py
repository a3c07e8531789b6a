"""The work directory: kept parts that are damaged, and a removal that is struck at any point."""

from __future__ import annotations

import os
import shutil
import stat

import pytest
import tiny_models
import torch

import bstk
from bstack.cli import main
from bstack.workdir import WorkDirectory
from bstk.errors import UsageError

pytestmark = pytest.mark.slow

QUICK = ["--codec", "sign", "--planes", "2", "--rank", "2", "--samples", "2", "--sequence-length", "16", "-q"]
SETTINGS = {"seed": 0}
PARTS = ["files", "layer-00000", "layer-00001"]
# What `filled` puts into the directory, file by file, and the two folders.
REMOVALS = 13


def compress(*arguments) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main.main(["compress", *map(str, arguments)])
    return caught.value.code


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save("llama-tied", tmp_path_factory.mktemp("workdir") / "model")


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out.bstk"
    assert compress(model, "-o", output, *QUICK) == 0
    return output.read_bytes()


@pytest.fixture(scope="module")
def unwritten(model, tmp_path_factory):
    """The work directory of a run that was interrupted before it wrote the file."""

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    output = tmp_path_factory.mktemp("unwritten") / "out.bstk"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bstk, "write", interrupt)
        assert compress(model, "-o", output, *QUICK) == 75
    return output.with_name("out.bstk.work")


@pytest.mark.parametrize(
    ("damaged", "marker"),
    [
        ("layer-00000.bin", "layer-00000.json"),
        ("layer-00001.json", "layer-00001.json"),
        ("files.bin", None),  # written anew in every run
        ("outside.bin", "outside.json"),
        ("embedding-model.embed_tokens.weight.bin", "embedding-model.embed_tokens.weight.json"),
        ("head.safetensors", "head.safetensors"),
        ("windows.safetensors", "windows.safetensors"),
        ("sensitivity.safetensors", "sensitivity.safetensors"),
        ("curve.json", "curve.json"),
    ],
)
@pytest.mark.parametrize("how", ["cut", "other"])
def test_a_damaged_part_says_what_to_delete_and_is_made_anew(
    model, uninterrupted, unwritten, tmp_path, capsys, damaged, marker, how
):
    output, work = tmp_path / "out.bstk", shutil.copytree(unwritten, tmp_path / "out.bstk.work")
    file = work / damaged
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if how == "cut" else b"\xff" * len(data))
    capsys.readouterr()
    if marker is not None:
        assert compress(model, "-o", output, *QUICK) == 5
        err = capsys.readouterr().err
        assert f"{file} is damaged" in err and f"Delete {work / marker} and give the same command again" in err
        assert not output.exists()
        (work / marker).unlink()
    assert compress(model, "-o", output, *QUICK) == 0 and not work.exists()
    assert output.read_bytes() == uninterrupted


def test_running_out_of_memory_is_no_damage(tmp_path, monkeypatch):
    work = filled(tmp_path / "work")

    def fail(*_arguments):
        raise MemoryError

    monkeypatch.setattr("bstack.workdir.json.loads", fail)
    with pytest.raises(MemoryError):
        work.records("files")


def filled(path) -> WorkDirectory:
    """A work directory with something of every kind in it."""
    work = WorkDirectory(path, SETTINGS)
    for name in PARTS:
        with work.part(name) as part:
            part.add(name.encode(), name=name, kind=bstk.FILE)
    work.value("curve", lambda: [1, 2])
    work.tensors("head", lambda: {"hessian": torch.ones(3)})
    (work.scratch() / "left.tmp").write_bytes(b"x")
    return work


@pytest.mark.parametrize("point", range(REMOVALS + 1))
def test_a_removal_struck_at_any_point_leaves_nothing_or_something_to_resume_from(tmp_path, monkeypatch, point):
    work = filled(tmp_path / "work")
    left = [point]

    def striking(original):
        def call(*arguments, **named):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return original(*arguments, **named)

        return call

    with monkeypatch.context() as patched:
        for name in ("unlink", "rmdir"):
            patched.setattr(os, name, striking(getattr(os, name)))
        if point < REMOVALS:
            with pytest.raises(KeyboardInterrupt):
                work.remove()
            work.release()  # as the end of the process does
        else:
            work.remove()
    assert (tmp_path / "work").exists() == (point < REMOVALS)
    again = WorkDirectory(tmp_path / "work", SETTINGS)
    for name in PARTS:
        if again.has(name):
            (record,) = again.records(name)
            assert bstk.frames.unpack(record.read(), len(name)) == name.encode()
    assert again.value("curve", lambda: [1, 2]) == [1, 2]
    again.remove()
    assert not (tmp_path / "work").exists()


def test_a_lock_that_was_removed_meanwhile_is_not_taken_for_the_directorys(tmp_path, monkeypatch):
    first = filled(tmp_path / "work")
    second = filled(tmp_path / "second")

    def lock_the_removed(_descriptor):
        first.remove()
        (tmp_path / "second").rename(tmp_path / "work")  # a third process has made it anew
        return True

    monkeypatch.setattr("bstack.workdir.atomic.try_lock", lock_the_removed)
    with pytest.raises(UsageError, match="in use"):
        WorkDirectory(tmp_path / "work", SETTINGS)
    second.release()


@pytest.mark.skipif(os.name == "nt", reason="folders are not synced there")
def test_a_power_cut_leaves_no_records_without_their_bytes_and_no_finished_part_undone(tmp_path, monkeypatch):
    """The bytes and their name reach the disk before the records get theirs, and that does before the part counts as done."""
    work = WorkDirectory(tmp_path / "work", SETTINGS)
    events, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(source, target):
        events.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with work.part("layer-00000") as part:
        part.add(b"data", name="x", kind=bstk.FILE)
    assert events == ["file", "folder", "file", "layer-00000.json", "folder"]
    events.clear()
    work.value("curve", lambda: [1])
    assert events == ["file", "curve.json", "folder"]
    work.release()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("error", [KeyboardInterrupt, bstk.UsageError, None])
def test_a_full_disk_does_not_hide_what_ended_a_part(tmp_path, error):
    work = WorkDirectory(tmp_path / "work", SETTINGS)
    os.symlink("/dev/full", tmp_path / "work" / "p.bin")
    with pytest.raises(error or bstk.ResourceError), work.part("p") as part:
        part.add(b"data", name="x", kind=bstk.FILE)
        if error is not None:
            raise error
    assert part._stream.closed and not work.has("p")
    work.release()


def test_a_first_write_that_was_killed_is_no_stranger(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ".settings.json.0123abcd.part").write_bytes(b"{")
    WorkDirectory(tmp_path / "work", SETTINGS).remove()
    assert not (tmp_path / "work").exists()
