"""Cutting a file behind a URL: the bytes are those of cutting it on disk, and no others are fetched."""

import errno
import os
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from range_server import RangeServer
from served_files import cut_sizes, make

import bstk
from bstk.atomic import LockedFile
from bstk.http import HEAD


def expected(data, mb, folder, seal=True):
    (folder / "whole.bstk").write_bytes(data)
    bstk.truncate(folder / "whole.bstk", folder / "expected.bstk", mb, seal=seal)
    return (folder / "expected.bstk").read_bytes()


@pytest.mark.parametrize("which", ["model", "long_head"])
def test_three_requests_and_no_byte_twice(which, request, serve, tmp_path):
    data = request.getfixturevalue(which)
    server = serve(data)
    mb = cut_sizes(data)[20]
    seen = []
    cut = bstk.truncate(server.url, tmp_path / "out.bstk", mb, progress=seen.append)
    result = (tmp_path / "out.bstk").read_bytes()
    assert result == expected(data, mb, tmp_path) and cut.file_bytes == len(result) == sum(seen)
    ranges = server.ranges_asked()
    with bstk.open(data) as file:
        header = file.preamble.header_length
    if which == "model":
        assert ranges == [(0, HEAD - 1), (HEAD, len(result) - 1)] and header < HEAD
    else:
        assert ranges == [(0, HEAD - 1), (HEAD, header - 1), (header, len(result) - 1)]
    assert server.sent == len(result)
    assert all(asked.headers["Accept-Encoding"] == "identity" for asked in server.asked)
    assert [asked.headers.get("If-Range") for asked in server.asked] == [None] + ['"one"'] * (len(ranges) - 1)
    assert not (tmp_path / "out.bstk.part").exists()


def test_reading_the_header_takes_two_requests(long_head, serve):
    server = serve(long_head)
    with bstk.open(server.url) as file, bstk.open(long_head) as local:
        assert (file.root, file.metadata, file.chunks, file.state) == (
            local.root,
            local.metadata,
            local.chunks,
            "whole",
        )
        assert file.source.requests == 2
        # The server counts after it has sent, in a thread of its own.
        deadline = time.monotonic() + 300
        while server.sent < file.preamble.header_length and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.sent == file.preamble.header_length
        assert [file.read(chunk) for chunk in file.chunks[:3]] == [local.read(chunk) for chunk in local.chunks[:3]]
        file.verify()
    assert len(server.asked) > 30 and len({asked.connection for asked in server.asked}) == 1


def test_without_seal_and_all_of_it(model, serve, tmp_path):
    server = serve(model)
    mb = cut_sizes(model)[3]
    bstk.truncate(server.url, tmp_path / "out.bstk", mb, seal=False)
    assert (tmp_path / "out.bstk").read_bytes() == expected(model, mb, tmp_path, seal=False)
    bstk.truncate(server.url, tmp_path / "out.bstk", 1000)
    assert (tmp_path / "out.bstk").read_bytes() == model
    server.data = sealed = expected(model, mb, tmp_path)
    server.etag = '"two"'
    bstk.truncate(server.url, tmp_path / "out.bstk", 1000)
    assert (tmp_path / "out.bstk").read_bytes() == sealed


def test_not_in_place(model, serve):
    with pytest.raises(bstk.UsageError, match="Name an output"):
        bstk.truncate(serve(model).url, None, 1)


@pytest.mark.parametrize("etag", ['"one"', 'W/"weak"', None])
@pytest.mark.parametrize("chunked", [False, True])
def test_kinds_of_tags_and_bodies(model, serve, tmp_path, etag, chunked):
    server = serve(model, etag=etag, chunked=chunked, modified="Mon, 01 Jan 2024 00:00:00 GMT", drop_after=30_000)
    mb = cut_sizes(model)[25]
    bstk.truncate(server.url, tmp_path / "out.bstk", mb)
    assert (tmp_path / "out.bstk").read_bytes() == expected(model, mb, tmp_path)
    assert ("If-Range" in server.asked[-1].headers) == (etag == '"one"')


def test_a_server_without_ranges_is_read_to_the_end_of_the_cut(tmp_path, serve):
    """In one request, and no further but for what the system had on its way already."""
    entries = []
    for level in range(24):
        raw = os.urandom(2048 * 4096 // 8 + 4 * (2048 + 4096))
        frame = bstk.pack(raw)
        entries.append(
            bstk.Entry(
                name="a",
                kind=bstk.SIGN,
                raw_length=len(raw),
                stored_length=frame.stored_length,
                digest=frame.digest,
                stored=frame.stored,
                level=level,
                shape=(2048, 4096),
                dtype="f16",
                rank=2,
                importance=1.0,
                error=0.5,
            )
        )
    bstk.write(tmp_path / "large.bstk", {}, entries, 1)
    data = (tmp_path / "large.bstk").read_bytes()
    server = serve(data, ranges=False, pause=0.0001)
    mb = cut_sizes(data)[0]
    bstk.truncate(server.url, tmp_path / "out.bstk", mb)
    assert (tmp_path / "out.bstk").read_bytes() == expected(data, mb, tmp_path)
    time.sleep(0.2)
    assert len(server.asked) == 1 and server.sent < len(data) * 3 // 4


def test_without_ranges_nothing_is_read_backwards(model, serve, tmp_path):
    server = serve(model, ranges=False)
    with bstk.open(server.url) as file:
        file.verify()  # from start to end
        with pytest.raises(bstk.RemoteError, match=r"from start to end only. Fetch it with bstack truncate"):
            file.read(file.chunks[-2])
    assert len(server.asked) == 1


def test_without_ranges_a_broken_connection_starts_over(model, serve, tmp_path):
    server = serve(model, ranges=False, drop_after=90_000, drops=1)
    bstk.truncate(server.url, tmp_path / "out.bstk", 1000)
    assert (tmp_path / "out.bstk").read_bytes() == model and len(server.asked) == 2


@pytest.mark.parametrize("every", [1500, 4096, 20_000, 65_535, 65_536, 65_537])
def test_dropped_at_every_nth_byte(long_head, serve, tmp_path, every):
    server = serve(long_head, drop_after=every)
    notes = []
    with bstk.open(bstk.HttpSource(server.url, notes.append)) as source:
        bstk.truncate(source, tmp_path / "out.bstk", cut_sizes(long_head)[-1])
    data = (tmp_path / "out.bstk").read_bytes()
    assert data == expected(long_head, cut_sizes(long_head)[-1], tmp_path)
    assert server.sent == len(data), "nothing is fetched twice"
    assert len(notes) >= len(data) // every - 3 and "broke off" in notes[0] and "retry 1 of 5" in notes[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_over_any_broken_transfer_is_the_cut_on_disk(long_head, tmp_path, monkeypatch, data):
    """Sizes of cuts, breaks, and an earlier transfer that was given up, all at random."""
    sizes = cut_sizes(long_head)
    first, second = data.draw(st.sampled_from(sizes)), data.draw(st.sampled_from(sizes))
    drops = data.draw(st.integers(0, 4))
    out = tmp_path / "out.bstk"
    out.with_name("out.bstk.part").unlink(missing_ok=True)
    with RangeServer(long_head, drop_after=data.draw(st.integers(700, 150_000)), drops=drops) as server:
        with monkeypatch.context() as patch:
            patch.setattr("bstk.http.RETRIES_IN_ALL", data.draw(st.integers(0, 3)))
            try:
                bstk.truncate(server.url, out, first)
            except bstk.RemoteError as error:
                assert not error.missing
        bstk.truncate(server.url, out, second)
    assert out.read_bytes() == expected(long_head, second, tmp_path)


@pytest.mark.parametrize("given_up_at", [10, 70_000, 100_001, 130_000, 150_000])
def test_resumes_with_what_is_missing(long_head, serve, tmp_path, monkeypatch, given_up_at):
    server = serve(long_head)
    mb = cut_sizes(long_head)[-1]
    monkeypatch.setattr("bstk.http.RETRIES_IN_ALL", 0)
    out, part = tmp_path / "out.bstk", tmp_path / "out.bstk.part"
    server.drop_after = None
    with bstk.open(server.url) as file:
        header = file.preamble.header_length
        server.drop_after = given_up_at - HEAD if given_up_at > HEAD else given_up_at
        with pytest.raises(
            bstk.RemoteError, check=lambda error: error.resumable, match="Give the same command again"
        ) as caught:
            bstk.truncate(file, out, mb)
    assert caught.value.exit_code == 75 and not out.exists()
    kept = part.stat().st_size
    assert kept == header + server.drop_after
    server.drop_after = None
    server.asked.clear()
    seen = []
    bstk.truncate(server.url, out, mb, progress=seen.append)
    assert out.read_bytes() == expected(long_head, mb, tmp_path) and not part.exists()
    assert seen[0] == kept and sum(seen) == out.stat().st_size
    assert server.ranges_asked()[-1] == (kept, out.stat().st_size - 1)


def interrupted(server, out, mb, monkeypatch):
    """Leave a part of a transfer that broke off after 40,000 bytes of blocks."""
    with monkeypatch.context() as patch:
        patch.setattr("bstk.http.RETRIES_IN_ALL", 0)
        server.drop_after = None
        with bstk.open(server.url) as file:
            server.drop_after = 40_000
            with pytest.raises(bstk.RemoteError, check=lambda error: error.resumable):
                bstk.truncate(file, out, mb)
        server.drop_after = None


def test_a_part_of_another_file_is_not_used(model, other, serve, tmp_path, monkeypatch):
    server = serve(model)
    out = tmp_path / "out.bstk"
    mb = cut_sizes(other)[-1]
    interrupted(server, out, mb, monkeypatch)
    server.data, server.etag = other, '"two"'
    bstk.truncate(server.url, out, mb)
    assert out.read_bytes() == expected(other, mb, tmp_path)


@pytest.mark.parametrize("place", [200, 5000, 20_000, -1])
def test_a_damaged_part_is_mended(long_head, serve, tmp_path, monkeypatch, place):
    server = serve(long_head)
    out, part = tmp_path / "out.bstk", tmp_path / "out.bstk.part"
    mb = cut_sizes(long_head)[-1]
    interrupted(server, out, mb, monkeypatch)
    data = bytearray(part.read_bytes())
    with bstk.open(long_head) as file:
        place = {-1: len(data) - 1, 20_000: file.preamble.header_length + 20_000}.get(place, place)
    data[place] ^= 1
    part.write_bytes(data)
    # The last byte is within a chunk that is not complete: found when the rest of it has arrived.
    bstk.truncate(server.url, out, mb)
    assert out.read_bytes() == expected(long_head, mb, tmp_path)


def test_a_sealed_part_and_a_longer_one_are_used(model, serve, tmp_path):
    server = serve(model)
    out, part = tmp_path / "out.bstk", tmp_path / "out.bstk.part"
    sizes = cut_sizes(model)
    part.write_bytes(expected(model, sizes[-1], tmp_path))
    bstk.truncate(server.url, out, sizes[4])
    assert out.read_bytes() == expected(model, sizes[4], tmp_path)
    assert len(server.asked) == 1  # the header alone


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="the system opens links as what they point to")
def test_a_link_in_the_place_of_the_part_is_not_followed(model, serve, tmp_path):
    other = tmp_path / "other.bstk"
    other.write_bytes(model)
    (tmp_path / "out.bstk.part").symlink_to(other)
    with pytest.raises(bstk.OutputError):
        bstk.truncate(serve(model).url, tmp_path / "out.bstk", cut_sizes(model)[4])
    assert other.read_bytes() == model and not (tmp_path / "out.bstk").exists()


def test_a_stranger_in_the_place_of_the_part_is_left_alone(model, serve, tmp_path):
    (tmp_path / "out.bstk.part").write_text("my notes")
    with pytest.raises(bstk.OutputError, match="in the way"):
        bstk.truncate(serve(model).url, tmp_path / "out.bstk", 1)
    assert (tmp_path / "out.bstk.part").read_text() == "my notes"


@pytest.mark.parametrize("how", ["truncate", "write"])
def test_a_part_goes_when_the_output_comes_from_elsewhere(how, model, serve, tmp_path, monkeypatch):
    out, part, source = tmp_path / "out.bstk", tmp_path / "out.bstk.part", tmp_path / "source.bstk"
    source.write_bytes(model)
    mb = cut_sizes(model)[3]

    def succeed(source=source):
        if how == "truncate":
            bstk.truncate(source, out, mb)
        else:
            make(out, blocks=2)

    interrupted(serve(model), out, 1000, monkeypatch)
    assert part.exists()
    with LockedFile(part):  # a download that still runs
        succeed()
        assert part.exists()
    succeed()
    assert not part.exists()
    part.touch()
    succeed()
    assert not part.exists()
    # A whole or a sealed file of that name is no stopped download, nor is one that nobody can read.
    broken = model[:60] + bytes(200)
    for content in (model, expected(model, mb, tmp_path), broken, expected(model, mb, tmp_path)[:-1]):
        part.write_bytes(content)
        succeed()
        assert part.read_bytes() == content
    # Not ours, or the source itself.
    part.write_text("my notes")
    succeed()
    assert part.read_text() == "my notes"
    part.unlink()
    part.symlink_to(source)
    succeed()
    assert part.is_symlink() and source.read_bytes() == model
    if how == "truncate":
        part.unlink()
        part.write_bytes(model[:-10])
        succeed(part)
        assert part.read_bytes() == model[:-10]


@pytest.mark.parametrize("remote", [True, False])
def test_an_output_that_appears_meanwhile_is_not_replaced(remote, long_head, serve, tmp_path):
    out, source, sizes = tmp_path / "out.bstk", tmp_path / "source.bstk", cut_sizes(long_head)
    source.write_bytes(long_head)
    server = serve(long_head)
    place = server.url if remote else source
    with pytest.raises(bstk.UsageError, match=r"the output exists. Name another output"):
        bstk.truncate(place, out, sizes[-1], overwrite=False, progress=lambda count: out.write_text("of somebody else"))
    assert out.read_text() == "of somebody else"
    with pytest.raises(bstk.UsageError, match="the output exists"):
        bstk.truncate(place, out, sizes[-1], overwrite=False)
    assert (tmp_path / "out.bstk.part").exists() == remote
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    server.asked.clear()
    bstk.truncate(place, out, sizes[-1])
    assert out.read_bytes() == expected(long_head, sizes[-1], tmp_path)
    if remote:  # what had arrived was kept
        with bstk.open(long_head) as file:
            assert max(last for _, last in server.ranges_asked()) < file.preamble.header_length


def test_damage_on_the_server(model, serve, tmp_path):
    with bstk.open(model) as file:
        chunk = file.chunks[7]
    data = bytearray(model)
    data[chunk.offset + 5] ^= 1
    server = serve(bytes(data))
    out, part = tmp_path / "out.bstk", tmp_path / "out.bstk.part"
    for _ in range(2):
        with pytest.raises(bstk.DamagedError, match="SHA-256 does not match") as caught:
            bstk.truncate(server.url, out, 1000)
        assert caught.value.chunk == chunk and not out.exists() and part.stat().st_size == chunk.offset
    bstk.truncate(server.url, out, chunk.offset / bstk.MB)  # a cut that ends before it
    with bstk.open(out, strict=True) as file:
        file.verify()


@pytest.mark.parametrize("kind", ["whole", "sealed"])
def test_a_file_of_its_own_in_the_way_of_the_part(kind, model, other, serve, tmp_path):
    out, part = tmp_path / "out.bstk", tmp_path / "out.bstk.part"
    theirs = other if kind == "whole" else expected(other, cut_sizes(other)[1], tmp_path)
    part.write_bytes(theirs)
    for mb in (1000, cut_sizes(model)[9]):
        with pytest.raises(bstk.OutputError, match=r"part: in the way: it is a \.bstk file of its own\. Move it"):
            bstk.truncate(serve(model).url, out, mb)
    assert not out.exists() and part.read_bytes() == theirs
    part.write_bytes(other[:-1])  # what a stopped download of another model may have left
    bstk.truncate(serve(model).url, out, 1000)
    assert out.read_bytes() == model and not part.exists()


@pytest.mark.parametrize("what", ["a link", "a folder", "not the beginning of a .bstk file"])
def test_something_else_in_the_way_of_the_part(what, model, serve, tmp_path):
    out, part = tmp_path / "out.bstk", tmp_path / "out.bstk.part"
    if what == "a link":
        part.symlink_to(tmp_path / "precious")
        (tmp_path / "precious").write_bytes(model)
    elif what == "a folder":
        part.mkdir()
    else:
        part.write_text("notes")
    with pytest.raises(bstk.OutputError, match=rf"out\.bstk\.part: in the way: it is {re.escape(what)}\. Move it away"):
        bstk.truncate(serve(model).url, out, 1000)
    assert not out.exists()
    assert what != "a link" or (tmp_path / "precious").read_bytes() == model


@pytest.mark.parametrize("where", [0, 110_000])
def test_a_full_disk_says_what_takes_room(where, long_head, serve, tmp_path, monkeypatch):
    out, part = tmp_path / "out.bstk", tmp_path / "out.bstk.part"
    part.write_bytes(long_head[:where])

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("bstk.atomic.Sink.write", refuse)
    with pytest.raises(bstk.ResourceError, match="Free some space") as caught:
        bstk.truncate(serve(long_head).url, out, 1000)
    assert (f"{part}, where the same command continues; delete it" in str(caught.value)) == (where > 0)
    assert not out.exists()


def test_a_renaming_that_fails_leaves_no_sealed_part(long_head, serve, tmp_path, monkeypatch):
    """A sealed part would be the user's own file to the next command."""
    out, part, mb = tmp_path / "out.bstk", tmp_path / "out.bstk.part", cut_sizes(long_head)[9]

    def refuse(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(bstk.OutputError, match="Operation not permitted"):
            bstk.truncate(serve(long_head).url, out, mb)
    assert not out.exists()
    with bstk.open(part.read_bytes(), warn=False) as file:
        assert file.state == "partial"
    (tmp_path / "source.bstk").write_bytes(long_head)
    bstk.truncate(tmp_path / "source.bstk", out, mb)
    assert not part.exists()


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("remote", [True, False])
def test_a_private_file_is_private_while_its_replacement_is_written(remote, model, serve, tmp_path, monkeypatch):
    (tmp_path / "source.bstk").write_bytes(model)
    out = tmp_path / "out.bstk"
    out.write_bytes(b"private")
    out.chmod(0o600)
    modes, create = set(), os.open

    def look(count):
        modes.update(path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.name.endswith(".part"))

    def watched(path, flags, mode=0o777, **more):
        descriptor = create(path, flags, mode, **more)
        look(0)
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    place = serve(model).url if remote else tmp_path / "source.bstk"
    bstk.truncate(place, out, cut_sizes(model)[9], progress=look)
    assert modes == {0o600} and out.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("remote", [True, False])
def test_permissions_that_cannot_be_given_are_an_error(remote, model, serve, tmp_path, monkeypatch):
    (tmp_path / "source.bstk").write_bytes(model)
    out = tmp_path / "out.bstk"
    out.write_bytes(b"old")
    out.chmod(0o640)

    def refuse(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchmod", refuse)
    with pytest.raises(bstk.OutputError, match="cannot write: Operation not permitted"):
        bstk.truncate(serve(model).url if remote else tmp_path / "source.bstk", out, cut_sizes(model)[9])
    assert out.read_bytes() == b"old"


def test_a_chunk_is_not_kept_with_the_head(model, serve):
    """A chunk that begins in the first request and ends behind it is not held for the life of the source."""
    with bstk.open(serve(model).url) as file:
        chunk = next(chunk for chunk in file.chunks if chunk.offset < HEAD < chunk.end)
        file.read(chunk)
        assert len(file.source._head) == HEAD
