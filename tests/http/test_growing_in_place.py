"""A stopped growth leaves a valid file that is at least as large as before, and the same call continues from there."""

import errno
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from range_server import RangeServer
from served_files import cut_sizes, make

import bstk


@pytest.mark.filterwarnings("ignore::bstk.PartialWarning")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_broken_transfer_leaves_a_valid_file_that_grows_on(long_head, cut, tmp_path, monkeypatch, data):
    sizes = cut_sizes(long_head)
    start, stop = sorted(data.draw(st.lists(st.sampled_from(sizes), min_size=2, max_size=2, unique=True)))
    small, large = cut(long_head, start), cut(long_head, stop, "large.bstk")
    with RangeServer(long_head) as server, monkeypatch.context() as patch:
        patch.setattr("bstk.http.RETRIES_IN_ALL", 0)
        with bstk.open(server.url) as source:
            server.drop_after = data.draw(st.integers(0, 100_000))
            try:
                bstk.grow(small, stop, source)
            except bstk.RemoteError as error:
                assert error.resumable
                with bstk.open(small.read_bytes(), strict=server.drop_after == 0) as file:
                    file.verify()
            server.drop_after = None
            if small.read_bytes() != large.read_bytes():
                missing = (small.stat().st_size, large.stat().st_size - 1)
                bstk.grow(small, stop, source)
                assert missing[0] > missing[1] or server.ranges_asked()[-1] == missing
    assert small.read_bytes() == large.read_bytes()


@pytest.mark.parametrize("remote", [True, False])
def test_a_damaged_block_is_not_appended(remote, model, cut, serve, tmp_path):
    with bstk.open(model) as file:
        chunk = file.chunks[10]
    small = cut(model, cut_sizes(model)[0])
    before = small.read_bytes()
    data = bytearray(model)
    data[chunk.offset] ^= 1
    (tmp_path / "source.bstk").write_bytes(data)
    with pytest.raises(bstk.DamagedError) as caught:
        bstk.grow(small, 1000, serve(bytes(data)).url if remote else tmp_path / "source.bstk")
    assert caught.value.chunk == chunk
    assert small.read_bytes()[256:] == model[256 : chunk.offset] and chunk.offset > len(before)
    with pytest.warns(bstk.PartialWarning), bstk.open(small) as file:
        file.verify()
    # The advice: what is good is not fetched again.
    server = serve(model)
    bstk.grow(small, 1000, server.url)
    assert small.read_bytes() == model and server.ranges_asked()[-1] == (max(chunk.offset, 65536), len(model) - 1)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize("index", [0, -1])
def test_a_damaged_file_does_not_grow(sealed, remote, index, model, cut, serve, tmp_path):
    small = cut(model, cut_sizes(model)[2])
    with bstk.open(small) as file:
        chunk = file.chunks[index]
    before = bytearray(small.read_bytes() if sealed else model[: file.length])
    before[chunk.end - 1] ^= 1
    small.write_bytes(before)
    (tmp_path / "source.bstk").write_bytes(model)
    with pytest.raises(bstk.DamagedError) as caught:
        bstk.grow(small, 1000, serve(model).url if remote else tmp_path / "source.bstk")
    assert caught.value.chunk == chunk and str(small) in str(caught.value)
    assert small.read_bytes() == before


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize("damaged", [0, 1], ids=["the block", "its own end and the next block"])
def test_a_partial_file_that_ends_within_a_block_keeps_its_whole_blocks(damaged, remote, model, serve, tmp_path):
    with bstk.open(model) as file:
        chunks = file.chunks[10:12]
    small = tmp_path / "small.bstk"
    before = bytearray(model[: chunks[0].offset + 7])
    before[-1] ^= damaged
    small.write_bytes(before)
    data = bytearray(model)
    data[chunks[damaged].offset + 20] ^= 1
    (tmp_path / "source.bstk").write_bytes(data)
    with pytest.raises(bstk.DamagedError) as caught:
        bstk.grow(small, 1000, serve(bytes(data)).url if remote else tmp_path / "source.bstk")
    assert caught.value.chunk == chunks[damaged]
    assert small.read_bytes() == model[: chunks[damaged].offset]
    bstk.grow(small, 1000, serve(model).url)
    assert small.read_bytes() == model


def test_an_interrupted_transfer_and_a_full_disk_leave_a_valid_file(long_head, serve, cut, monkeypatch):
    small = cut(long_head, cut_sizes(long_head)[2])
    before = small.read_bytes()
    server = serve(long_head)
    arrived = []

    def stop(count):
        arrived.append(count)
        if len(arrived) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bstk.grow(small, 1000, server.url, progress=stop)
    kept = small.read_bytes()
    assert len(kept) == len(before) + sum(arrived)
    with pytest.warns(bstk.PartialWarning), bstk.open(small) as file:
        file.verify()

    def full(count):  # after something was written by this call
        monkeypatch.setattr("bstk.atomic.LockedFile.write", refuse)

    def refuse(file, offset, data):
        monkeypatch.undo()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(bstk.ResourceError):
        bstk.grow(small, 1000, server.url, progress=full)
    assert small.stat().st_size > len(kept) and long_head.startswith(small.read_bytes())
    with pytest.warns(bstk.PartialWarning), bstk.open(small) as file:
        file.verify()
    bstk.grow(small, 1000, server.url)
    assert small.read_bytes() == long_head


_KILLED = """
import os, sys
import bstk
from bstk import atomic
class Os:
    calls = 0
    def __getattr__(self, name):
        return getattr(os, name)
    def write(self, descriptor, data):
        if self.calls == int(sys.argv[3]):
            if len(data) > 256:  # the preamble lies in one sector, which is written whole or not
                os.write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), 9)
        self.calls += 1
        return os.write(descriptor, data)
atomic.os = Os()
bstk.grow(sys.argv[1], 1000, sys.argv[2])
"""


@pytest.mark.filterwarnings("ignore::bstk.PartialWarning")
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.parametrize("call", [1, 2, 5, 7])
def test_killed_while_growing(tmp_path, call):
    """Killed in the middle of a write of blocks, the file is a valid partial one, and the same call finishes it."""
    data = make(tmp_path / "source.bstk", blocks=6)
    bstk.truncate(tmp_path / "source.bstk", tmp_path / "small.bstk", cut_sizes(data)[0])
    done = subprocess.run([sys.executable, "-c", _KILLED, tmp_path / "small.bstk", tmp_path / "source.bstk", str(call)])
    assert done.returncode == -9
    with bstk.open(tmp_path / "small.bstk") as file:
        file.verify()
    if (tmp_path / "small.bstk").read_bytes() != data:  # the last call only repeats a seal of 0
        bstk.grow(tmp_path / "small.bstk", 1000, tmp_path / "source.bstk")
    assert (tmp_path / "small.bstk").read_bytes() == data
