"""Growing a cut in place: what is left when it is stopped, and that the same call goes on from there."""

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
                bstk.grow(small, stop, source, in_place=True)
            except bstk.TransferError:
                with bstk.open(small.read_bytes(), strict=server.drop_after == 0) as file:
                    file.verify()
            server.drop_after = None
            if small.read_bytes() != large.read_bytes():
                missing = (small.stat().st_size, large.stat().st_size - 1)
                bstk.grow(small, stop, source, in_place=True)
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
        bstk.grow(small, 1000, serve(bytes(data)).url if remote else tmp_path / "source.bstk", in_place=True)
    assert caught.value.chunk == chunk
    if remote:  # what was fetched before it is kept
        assert small.stat().st_size == chunk.offset
        with pytest.warns(bstk.PartialWarning), bstk.open(small) as file:
            file.verify()
    else:
        assert small.read_bytes() == before


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize("damaged", [0, 1], ids=["the block", "its own end and the next block"])
def test_a_partial_file_that_ends_within_a_block_is_as_before(damaged, remote, model, serve, tmp_path):
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
        bstk.grow(small, 1000, serve(bytes(data)).url if remote else tmp_path / "source.bstk", in_place=True)
    assert caught.value.chunk == chunks[damaged]
    if remote and damaged:  # the block that arrived whole is worth more
        assert small.read_bytes() == model[: chunks[0].end]
    else:
        assert small.read_bytes() == before


def test_an_interrupted_transfer_is_kept_and_a_full_disk_is_not(long_head, serve, cut, monkeypatch):
    sizes = cut_sizes(long_head)
    small = cut(long_head, sizes[2])
    before = small.read_bytes()
    server = serve(long_head)
    arrived = []

    def stop(count):
        arrived.append(count)
        if len(arrived) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bstk.grow(small, 1000, server.url, progress=stop, in_place=True)
    kept = small.read_bytes()
    assert len(kept) == len(before) + sum(arrived)
    with pytest.warns(bstk.PartialWarning), bstk.open(small) as file:
        file.verify()

    def full(count):  # once something was written of this call
        monkeypatch.setattr("bstk.locked.LockedFile.write", refuse)

    def refuse(file, offset, data):
        monkeypatch.undo()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(bstk.ResourceError):
        bstk.grow(small, 1000, server.url, progress=full, in_place=True)
    assert small.read_bytes() == kept
    bstk.grow(small, 1000, server.url, in_place=True)
    assert small.read_bytes() == long_head


_KILLED = """
import os, sys
import bstk
from bstk import descriptors
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
descriptors.os = Os()
bstk.grow(sys.argv[1], 1000, sys.argv[2], in_place=True)
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
        bstk.grow(tmp_path / "small.bstk", 1000, tmp_path / "source.bstk", in_place=True)
    assert (tmp_path / "small.bstk").read_bytes() == data
