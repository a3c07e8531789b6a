"""Cutting: what is kept, that only the preamble changes, and that no crash breaks the file."""

import os
import subprocess
import sys
import tracemalloc

import pytest
import samples

import bstk
from bstk import atomic


def ends(good):
    with bstk.open(good) as f:
        return [chunk.end for chunk in f.chunks[f.base_count - 1 : -1]]


def mb(size):
    return size / bstk.MB


def test_a_cut_differs_in_the_seal_alone(good, good_path, tmp_path):
    out = tmp_path / "cut.bstk"
    for end in ends(good):
        cut = bstk.truncate(good_path, out, mb=mb(end))
        data = out.read_bytes()
        assert cut.file_bytes == len(data) == end
        assert data[256:] == good[256:end]
        assert [i for i in range(256) if data[i] != good[i]] and data[:48] == good[:48] and data[56:252] == good[56:252]
        with bstk.open(data, strict=True) as f, bstk.open(good) as whole:
            assert f.state == "sealed" and f.seal == end
            assert (len(f.chunks), f.memory_bytes) == (cut.chunks, cut.memory_bytes)
            assert f.root == whole.root
            assert samples.content(f) == samples.content(whole)[: cut.chunks]
        assert good_path.read_bytes() == good


@pytest.mark.filterwarnings("ignore::bstk.PartialWarning")
def test_without_seal_it_is_the_prefix(good, good_path, tmp_path):
    sealed, prefix = tmp_path / "sealed.bstk", tmp_path / "prefix.bstk"
    for end in ends(good):
        bstk.truncate(good_path, prefix, mb=mb(end), seal=False)
        assert prefix.read_bytes() == good[:end]
    # Also of a sealed file: a shorter file under the old seal could not be opened.
    bstk.truncate(good_path, sealed, mb=mb(ends(good)[1]))
    bstk.truncate(sealed, prefix, mb=mb(ends(good)[0]), seal=False)
    assert prefix.read_bytes() == good[: ends(good)[0]]


def test_cut_of_a_cut_is_the_cut(good, good_path, tmp_path):
    first, second, direct = (tmp_path / name for name in ("1", "2", "direct"))
    small, middle, _ = ends(good)
    bstk.truncate(good_path, first, mb=mb(middle))
    bstk.truncate(first, second, mb=mb(small))
    bstk.truncate(good_path, direct, mb=mb(small))
    assert second.read_bytes() == direct.read_bytes()


@pytest.mark.parametrize("seal", [True, False])
def test_in_place_gives_the_same(good, good_path, tmp_path, seal):
    for end in ends(good):
        path = tmp_path / "x.bstk"
        path.write_bytes(good)
        bstk.truncate(good_path, tmp_path / "out.bstk", mb=mb(end), seal=seal)
        bstk.truncate(path, None, mb=mb(end), seal=seal)
        assert path.read_bytes() == (tmp_path / "out.bstk").read_bytes()


@pytest.mark.parametrize("in_place", [True, False])
def test_partial_file_is_cut_to_its_last_whole_chunk(good, tmp_path, in_place):
    path, out = tmp_path / "partial.bstk", tmp_path / "out.bstk"
    end = ends(good)[1]
    path.write_bytes(good[: end + 3])
    bstk.truncate(path, None if in_place else out, mb=1)  # nothing of it is too large, but it gets its seal
    with bstk.open(path if in_place else out, strict=True) as f:
        assert f.state == "sealed" and f.length == end
        f.verify()


def test_nothing_to_cut(good, good_path, tmp_path):
    for size in (len(good), 2 * len(good)):
        with pytest.raises(bstk.UsageError, match=r"nothing to cut: all of it fits in 0.01 MB"):
            bstk.truncate(good_path, tmp_path / "out.bstk", mb=mb(size))
    assert not (tmp_path / "out.bstk").exists()


def test_refusals_change_nothing(good, good_path, tmp_path):
    with pytest.raises(bstk.BudgetError):
        bstk.truncate(good_path, None, mb="0.0001")
    with pytest.raises(bstk.UsageError):
        bstk.truncate(good_path, None, mb=-1)
    os.link(good_path, tmp_path / "same.bstk")
    (tmp_path / "link.bstk").symlink_to(good_path)
    for same in (good_path, tmp_path / "same.bstk", tmp_path / "link.bstk"):
        with pytest.raises(bstk.UsageError, match="the output is the input"):
            bstk.truncate(good_path, same, mb=mb(ends(good)[0]))
    assert good_path.read_bytes() == good
    good_path.write_bytes(good[:1000])
    with pytest.raises(bstk.TruncatedError):
        bstk.truncate(good_path, None, mb=1)
    assert good_path.read_bytes() == good[:1000]


_SYNCS = 3  # unseal, shorten, seal


@pytest.mark.filterwarnings("ignore::bstk.PartialWarning")
@pytest.mark.parametrize("fail_at", range(_SYNCS))
@pytest.mark.parametrize("sealed", [True, False])
def test_in_place_is_valid_after_every_step(good, good_path, tmp_path, monkeypatch, sealed, fail_at):
    path = tmp_path / "x.bstk"
    small, _, large = ends(good)
    path.write_bytes(good)
    if sealed:
        bstk.truncate(good_path, path, mb=mb(large))

    class Os:
        calls = 0

        def __getattr__(self, name):
            return getattr(os, name)

        def fsync(self, descriptor):
            if self.calls == fail_at:
                raise OSError(28, "No space left on device")
            self.calls += 1

    monkeypatch.setattr(atomic, "os", Os())
    steps = _SYNCS if sealed else _SYNCS - 1
    if fail_at < steps:
        with pytest.raises(bstk.ResourceError):
            bstk.truncate(path, None, mb=mb(small))
    else:
        bstk.truncate(path, None, mb=mb(small))
    with bstk.open(path) as f:
        f.verify()
        assert f.state == ("sealed" if fail_at >= steps - 1 else "partial")


_KILLED = """
import os, sys
import bstk
from bstk import atomic
class Os:
    calls = 0
    def __getattr__(self, name):
        return getattr(os, name)
    def fsync(self, descriptor):
        if self.calls == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
        self.calls += 1
atomic.os = Os()
bstk.truncate(sys.argv[1], None, mb=float(sys.argv[3]))
"""


@pytest.mark.filterwarnings("ignore::bstk.PartialWarning")
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.parametrize("step", range(_SYNCS))
def test_killed_while_cutting_in_place(good, good_path, tmp_path, step):
    path = tmp_path / "x.bstk"
    small, _, large = ends(good)
    bstk.truncate(good_path, path, mb=mb(large))
    done = subprocess.run([sys.executable, "-c", _KILLED, path, str(step), repr(mb(small))])
    assert done.returncode == -9
    with bstk.open(path) as f:
        f.verify()
        assert f.length == (large if step == 0 else small)
    if step < 2:
        bstk.truncate(path, None, mb=mb(small))  # the same command again finishes the job
    assert bstk.open(path, strict=True).seal == small


def test_needs_little_memory(tmp_path):
    chunks = [samples.sign("a", 0)]
    chunks.append(samples.entry("big", bstk.TENSOR, os.urandom(24 * 2**20), shape=(24 * 2**20,), dtype="u8"))
    chunks.append(samples.sign("a", 1))
    bstk.write(tmp_path / "x.bstk", {}, chunks, 2)
    del chunks
    tracemalloc.start()
    cut = bstk.truncate(tmp_path / "x.bstk", tmp_path / "y.bstk", mb=mb((tmp_path / "x.bstk").stat().st_size - 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cut.chunks == 2 and peak < 10 * 2**20
