"""Several processes and one file: each combination has a defined outcome, and none of them a broken file."""

import os
import random
import subprocess
import sys
import threading
import warnings

import pytest

import bstk
from bstk.atomic import LockedFile, replacing

POSIX = pytest.mark.skipif(os.name != "posix", reason="other rules elsewhere")


@pytest.fixture
def sizes(good):
    with bstk.open(good) as f:
        return [chunk.end / bstk.MB for chunk in f.chunks[f.base_count - 1 : -1]]


def in_threads(*functions):
    """Run functions side by side; raise what one of them raised."""
    failures = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


@POSIX
def test_cuts_to_one_output_at_once(good, good_path, tmp_path, sizes):
    """The last to finish has its cut there; at no moment is there anything but a whole cut."""
    out = tmp_path / "out.bstk"
    bstk.truncate(good_path, out, sizes[0])

    def cut(mb):
        for _ in range(60):
            bstk.truncate(good_path, out, mb)

    def look():
        for _ in range(200):
            with bstk.open(out, strict=True) as f:
                assert f.state == "sealed"
                f.verify()

    in_threads(*[lambda mb=mb: cut(mb) for mb in sizes], look, look)
    assert sorted(os.listdir(tmp_path)) == ["good.bstk", "out.bstk"]


@POSIX
def test_a_reader_keeps_the_file_it_opened_when_another_takes_its_place(good, good_path, tmp_path, sizes):
    out = tmp_path / "out.bstk"
    out.write_bytes(good)
    with bstk.open(out) as f:
        bstk.truncate(good_path, out, sizes[0])
        f.verify()
        assert f.state == "whole" and len(f.chunks) == len(f.all_chunks)
    assert bstk.open(out).state == "sealed"


@POSIX
def test_a_file_that_is_open_is_cut_in_place(good_path, sizes):
    """Its reader goes on with what is left; a block that is gone is an error that says so."""
    with bstk.open(good_path) as f:
        cut = bstk.truncate(good_path, None, sizes[1])
        for chunk in f.chunks[: cut.chunks]:
            f.read(chunk)
        with pytest.raises(bstk.DamagedError, match="became shorter after it was opened; open it again"):
            f.read(f.chunks[-1])


def test_a_file_that_is_open_grows(good, good_path, tmp_path, sizes):
    small = tmp_path / "small.bstk"
    bstk.truncate(good_path, small, sizes[0])
    with bstk.open(small) as f:
        bstk.grow(small, 1, good_path)
        f.verify()
        assert f.length == round(sizes[0] * bstk.MB)
    assert small.read_bytes() == good


def test_one_process_at_a_time_changes_a_file(good, good_path, tmp_path, sizes):
    small = tmp_path / "small.bstk"
    bstk.truncate(good_path, small, sizes[1])
    before = small.read_bytes()
    with LockedFile(small):
        with pytest.raises(bstk.UsageError, match="another process is writing this file") as caught:
            bstk.truncate(small, None, sizes[0])
        with pytest.raises(bstk.UsageError, match="another process is writing this file"):
            bstk.grow(small, 1, good_path)
        bstk.truncate(small, tmp_path / "out.bstk", sizes[0])  # reading is not held up
    assert caught.value.exit_code == 2 and small.read_bytes() == before
    bstk.truncate(small, None, sizes[0])


def test_nobody_else_changes_a_file_that_grows(good, good_path, tmp_path, sizes):
    small = tmp_path / "small.bstk"
    refused = []

    def meanwhile(count):
        for change in (lambda: bstk.truncate(small, None, sizes[0]), lambda: bstk.grow(small, sizes[2], good_path)):
            with pytest.raises(bstk.UsageError, match="another process is writing this file"):
                change()
            refused.append(change)

    bstk.truncate(good_path, small, sizes[1])
    bstk.grow(small, 1, good_path, progress=meanwhile)
    assert small.read_bytes() == good and len(refused) >= 2


@POSIX
@pytest.mark.parametrize("by", ["truncate", "another program", "deleting"])
def test_a_file_that_is_replaced_while_it_grows(by, good_path, tmp_path, sizes):
    """Who replaces or deletes a file asks for no lock. What they did stays, and it is said that nothing grew."""
    small = tmp_path / "small.bstk"
    bstk.truncate(good_path, small, sizes[1])

    def meanwhile(count):
        if by == "truncate":
            bstk.truncate(good_path, small, sizes[0])
        elif by == "deleting":
            small.unlink(missing_ok=True)
        else:
            (tmp_path / "other").write_bytes(b"other")
            (tmp_path / "other").replace(small)

    with pytest.raises(bstk.UsageError, match="replaced or deleted it meanwhile") as caught:
        bstk.grow(small, 1, good_path, progress=meanwhile)
    assert caught.value.exit_code == 2
    if by == "truncate":
        with bstk.open(small) as f:
            assert f.length == round(sizes[0] * bstk.MB)
    else:
        assert (small.read_bytes() if small.exists() else None) == (None if by == "deleting" else b"other")
    assert {path.name for path in tmp_path.iterdir()} <= {"small.bstk", good_path.name}


@POSIX
def test_growing_cutting_and_reading_one_file_at_once(good, good_path, tmp_path, sizes):
    path = tmp_path / "x.bstk"
    path.write_bytes(good)

    def change(seed):
        draw = random.Random(seed)
        for _ in range(150):
            try:
                if draw.random() < 0.5:
                    bstk.truncate(path, None, draw.choice(sizes))
                else:
                    bstk.grow(path, draw.choice([*sizes, 1]), good_path)
            except bstk.UsageError:  # busy, or nothing to do
                pass

    def look():
        for _ in range(300):
            with bstk.open(path) as f:
                try:
                    f.verify()
                except bstk.DamagedError as error:
                    assert "became shorter" in str(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bstk.PartialWarning)
        in_threads(lambda: change(1), lambda: change(2), lambda: change(3), look, look)
        with bstk.open(path) as f:
            f.verify()
            assert path.read_bytes()[256:] == good[256 : f.length] and f.state in ("whole", "sealed")


_KILLED = """
import os, sys
from bstk.atomic import replacing
with replacing(sys.argv[1]) as (sink, temporary):
    sink.write(b"half")
    print(flush=True)
    sys.stdin.read()
"""


@POSIX
# 245 bytes in 85 letters: what the temporary name adds to it would be too much.
@pytest.mark.parametrize("name", ["out.bstk", "語" * 80 + ".bstk"], ids=["short", "long"])
def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_writes_is_not(
    good, good_path, tmp_path, sizes, name
):
    out = tmp_path / name
    processes = [
        subprocess.Popen([sys.executable, "-c", _KILLED, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in processes:
        process.stdout.readline()
    parts = {name for name in os.listdir(tmp_path) if name.endswith(".part")}
    assert len(parts) == 2
    processes[0].kill()
    processes[0].communicate()
    bstk.truncate(good_path, out, sizes[0])
    assert len(left := {name for name in os.listdir(tmp_path) if name.endswith(".part")}) == 1 and left < parts
    processes[1].communicate(b"")
    assert processes[1].returncode == 0 and out.read_bytes() == b"half"
    assert sorted(os.listdir(tmp_path)) == ["good.bstk", name]


@POSIX
def test_the_lock_is_on_the_file_that_is_there(tmp_path):
    """Whoever waits for a file that was meanwhile replaced gets the new one."""
    path = tmp_path / "x"
    path.write_bytes(b"old")
    found = []
    with LockedFile(path) as first:
        waiting = threading.Thread(target=lambda: found.append(_content(path)))
        waiting.start()
        with replacing(path) as (sink, _):
            sink.write(b"new")
        assert first.read(0, 3) == b"old" and not found
    waiting.join()
    assert found == [b"new"]


def _content(path):
    with LockedFile(path, wait=True) as file:
        return file.read(0, 100)


def test_a_damaged_block_does_not_pass_into_a_cut(good, good_path, tmp_path, sizes):
    with bstk.open(good) as f:
        chunk = f.chunks[f.base_count]
    data = bytearray(good)
    data[chunk.offset + 1] ^= 1
    good_path.write_bytes(data)
    out = tmp_path / "out.bstk"
    with pytest.raises(bstk.DamagedError, match="SHA-256 does not match") as caught:
        bstk.truncate(good_path, out, sizes[2])
    assert caught.value.chunk == chunk and sorted(os.listdir(tmp_path)) == ["good.bstk"]
    bstk.truncate(good_path, out, sizes[0])
    with bstk.open(out, strict=True) as f:
        f.verify()


@POSIX
def test_a_file_that_is_cut_while_it_is_opened_is_what_it_is_now(good_path, sizes):
    source = bstk.FileSource(good_path)
    bstk.truncate(good_path, None, sizes[1])  # the seal will be that of a length the source does not know of
    with bstk.open(source, strict=True) as f:
        assert (f.state, f.length) == ("sealed", round(sizes[1] * bstk.MB))
        f.verify()
