"""Growing a cut: byte for byte what a larger cut would have been, and nothing is read that is there already."""

import errno
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from range_server import RangeServer
from served_files import cut_sizes

import bstk


@pytest.mark.parametrize("which", ["model", "long_head"])
@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_fetches_what_is_missing(which, remote, in_place, request, serve, cut, tmp_path):
    data = request.getfixturevalue(which)
    sizes = cut_sizes(data)
    small, large = cut(data, sizes[21]), cut(data, sizes[25], "large.bstk")
    server = serve(data)
    before, seen = small.stat().st_size, []
    source = server.url if remote else tmp_path / "source.bstk"
    found = bstk.grow(small, sizes[25], source, progress=seen.append, in_place=in_place)
    assert small.read_bytes() == large.read_bytes() and found.file_bytes == large.stat().st_size
    assert sum(seen) == found.file_bytes - before * in_place
    assert {path.name for path in tmp_path.iterdir()} == {"small.bstk", "large.bstk", "source.bstk"}
    if remote:
        assert server.ranges_asked()[-1] == (before, found.file_bytes - 1) and len(server.asked) <= 3


@pytest.mark.parametrize("in_place", [True, False])
def test_to_the_end_gives_the_file_itself(model, serve, cut, in_place):
    small = cut(model, cut_sizes(model)[0])
    bstk.grow(small, 1000, serve(model).url, in_place=in_place)
    assert small.read_bytes() == model


def test_from_a_sealed_file_as_far_as_it_goes(model, cut):
    sizes = cut_sizes(model)
    small, middle = cut(model, sizes[1]), cut(model, sizes[4], "middle.bstk")
    bstk.grow(small, 1000, middle)
    assert small.read_bytes() == middle.read_bytes()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_partial_file_goes_on_within_a_block(model, serve, cut, tmp_path, in_place):
    sizes = cut_sizes(model)
    large = cut(model, sizes[20], "large.bstk")
    server = serve(model)
    for extra in (0, 1, 1000):
        small = tmp_path / "partial.bstk"
        small.write_bytes(model[: round(sizes[18] * bstk.MB) + extra])
        server.asked.clear()
        length = small.stat().st_size
        bstk.grow(small, sizes[20], server.url, in_place=in_place)
        assert server.ranges_asked()[-1] == (max(length, 65536), large.stat().st_size - 1)
        assert small.read_bytes() == large.read_bytes()
    # All blocks are there, and only the seal is missing.
    small.write_bytes(model[: large.stat().st_size])
    bstk.grow(small, sizes[20], server.url, in_place=in_place)
    assert small.read_bytes() == large.read_bytes()


def test_refusals_change_nothing(model, other, serve, cut, tmp_path, vector):
    sizes = cut_sizes(model)
    small = cut(model, sizes[5])
    before = small.read_bytes()
    server, strange = serve(model), serve(other)
    with pytest.raises(bstk.OtherModelError, match="belongs to another model") as caught:
        bstk.grow(small, 1000, strange.url)
    assert caught.value.exit_code == 2 and len(strange.asked) == 1
    for mb in (sizes[5], sizes[3]):
        with pytest.raises(bstk.UsageError, match="nothing to add: it takes .* MB already"):
            bstk.grow(small, mb, server.url)
    with pytest.raises(bstk.UsageError, match="has no more than it"):
        bstk.grow(small, 1000, cut(model, sizes[5], "as-small.bstk"))
    with pytest.raises(bstk.UsageError, match="from itself"):
        bstk.grow(small, 1000, small)
    with pytest.raises(bstk.BudgetError):
        bstk.grow(small, 0.001, server.url)
    with pytest.raises(bstk.UsageError):
        bstk.grow(small, -1, server.url)
    server.statuses = [404]
    with pytest.raises(bstk.RemoteNotFoundError):
        bstk.grow(small, 1000, server.url)
    assert small.read_bytes() == before
    with pytest.raises(bstk.NotBstkError):
        bstk.grow(vector("bad-html.bstk"), 1000, server.url)
    with pytest.raises(bstk.UnsupportedVersionError, match="not rewrite"):
        bstk.grow(vector("read-only-compatible-flag.bstk"), 1000, server.url)


@pytest.mark.parametrize("in_place", [True, False])
def test_nothing_is_changed_before_the_first_bytes_are_here(long_head, serve, cut, in_place):
    small = cut(long_head, cut_sizes(long_head)[5])
    before = small.read_bytes()
    server = serve(long_head, statuses=[0, 0] + [503] * 6)
    with pytest.raises(bstk.TransferError):
        bstk.grow(small, 1000, server.url, in_place=in_place)
    assert small.read_bytes() == before


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_broken_transfer_leaves_the_old_file_and_goes_on(long_head, cut, tmp_path, monkeypatch, data):
    sizes = cut_sizes(long_head)
    start, stop = sorted(data.draw(st.lists(st.sampled_from(sizes), min_size=2, max_size=2, unique=True)))
    small, large = cut(long_head, start), cut(long_head, stop, "large.bstk").read_bytes()
    before, part = small.read_bytes(), tmp_path / "small.bstk.part"
    with RangeServer(long_head) as server, monkeypatch.context() as patch:
        patch.setattr("bstk.http.RETRIES_IN_ALL", 0)
        with bstk.open(server.url) as source:
            server.drop_after = data.draw(st.integers(0, 100_000))
            try:
                bstk.grow(small, stop, source)
            except bstk.TransferError:
                assert small.read_bytes() == before and len(before) <= part.stat().st_size < len(large)
                kept, server.drop_after = part.stat().st_size, None
                bstk.grow(small, stop, source)
                assert server.ranges_asked()[-1] == (kept, len(large) - 1)
    assert small.read_bytes() == large and not part.exists()


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize("damaged", ["small.bstk", "source.bstk"])
def test_a_damaged_block_of_either_file_leaves_the_old_file(damaged, remote, model, cut, serve, tmp_path):
    sizes = cut_sizes(model)
    small, large = cut(model, sizes[3]), cut(model, sizes[20], "large.bstk").read_bytes()
    with bstk.open(small) as file:
        chunk = file.chunks[-1] if damaged == "small.bstk" else file.all_chunks[len(file.chunks) + 2]
    data = bytearray((tmp_path / damaged).read_bytes())
    data[chunk.offset] ^= 1
    (tmp_path / damaged).write_bytes(data)
    before, source = small.read_bytes(), tmp_path / "source.bstk"
    told = (
        "Give the same command again"
        if remote and damaged == "source.bstk"
        else "The file is damaged: make or fetch it anew"
    )
    with pytest.raises(bstk.DamagedError, match=told) as caught:
        bstk.grow(small, sizes[20], serve(source.read_bytes()).url if remote else source)
    assert caught.value.chunk == chunk and small.read_bytes() == before
    # The advice. What was good of it is in the part and not fetched again; nor are the first 64 KiB, which came with the header.
    server = serve(model)
    bstk.truncate(server.url, small, sizes[20])
    assert small.read_bytes() == large
    assert {path.name for path in tmp_path.iterdir()} == {"small.bstk", "large.bstk", "source.bstk"}
    assert not remote or server.ranges_asked()[-1] == (max(chunk.offset, 65536), len(large) - 1)


@pytest.mark.parametrize("remote", [True, False])
def test_no_room_for_a_second_copy(remote, model, cut, serve, tmp_path, monkeypatch):
    """Says how much both ways take, and which file keeps what has arrived."""
    sizes = cut_sizes(model)
    small = cut(model, sizes[3])
    before = small.read_bytes()

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("bstk.descriptors.Sink.write", refuse)
        with pytest.raises(bstk.ResourceError, match="beside it; growing in place") as caught:
            bstk.grow(small, sizes[20], serve(model).url if remote else tmp_path / "source.bstk")
    with bstk.open(tmp_path / "source.bstk") as file:
        size = file.fit(sizes[20]).file_bytes
    for figure in (size, size - len(before)):
        assert f" {bstk.mb_ceil(figure)} MB" in str(caught.value)
    assert small.read_bytes() == before


@pytest.mark.parametrize("deleted", [True, False])
def test_a_file_that_goes_away_while_it_grows_from_a_url(deleted, long_head, cut, serve, tmp_path):
    small = cut(long_head, cut_sizes(long_head)[3])
    part = tmp_path / "small.bstk.part"

    def meanwhile(count):
        if deleted:
            small.unlink(missing_ok=True)
        else:
            (tmp_path / "other").write_bytes(b"other")
            (tmp_path / "other").replace(small)

    mb = cut_sizes(long_head)[9]
    with pytest.raises(bstk.BusyError, match="replaced or deleted it meanwhile"):
        bstk.grow(small, mb, serve(long_head).url, progress=meanwhile)
    assert small.exists() != deleted and (deleted or small.read_bytes() == b"other")
    # What has arrived is what a stopped download leaves, and goes like it.
    assert part.stat().st_size > 100_000
    bstk.truncate(tmp_path / "source.bstk", small, mb)
    assert not part.exists()


def test_a_renaming_that_fails_leaves_no_sealed_part(long_head, cut, serve, tmp_path, monkeypatch):
    """Which would be somebody's own file to the next command."""
    small = cut(long_head, cut_sizes(long_head)[3])
    before, part, mb = small.read_bytes(), tmp_path / "small.bstk.part", cut_sizes(long_head)[9]

    def refuse(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(bstk.OutputError, match="Operation not permitted.*growing in place"):
            bstk.grow(small, mb, serve(long_head).url)
    assert small.read_bytes() == before
    with bstk.open(part.read_bytes(), warn=False) as file:
        assert file.state == "partial"
    bstk.grow(small, mb, tmp_path / "source.bstk", in_place=True)
    assert not part.exists()


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("remote", [True, False])
def test_the_new_file_has_the_permissions_of_the_old_one(remote, model, cut, serve, tmp_path):
    small = cut(model, cut_sizes(model)[3])
    small.chmod(0o600)
    (tmp_path / "link.bstk").symlink_to(small)
    bstk.grow(tmp_path / "link.bstk", 1000, serve(model).url if remote else tmp_path / "source.bstk")
    assert (
        small.read_bytes() == model and small.stat().st_mode & 0o777 == 0o600 and (tmp_path / "link.bstk").is_symlink()
    )


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("remote", [True, False])
def test_a_private_file_is_private_while_it_is_written(remote, model, cut, serve, tmp_path, monkeypatch):
    small = cut(model, cut_sizes(model)[3])
    small.chmod(0o400)  # this user may be root, who writes it all the same
    if not os.access(small, os.W_OK):
        small.chmod(0o600)
    modes, create = set(), os.open

    def look(count):
        modes.update(path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.name.endswith(".part"))

    def watched(path, flags, mode=0o777, **more):
        descriptor = create(path, flags, mode, **more)
        look(0)
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    bstk.grow(small, 1000, serve(model).url if remote else tmp_path / "source.bstk", progress=look)
    assert modes == {0o600}


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_permissions_that_cannot_be_given_are_an_error(model, cut, tmp_path, monkeypatch):
    small = cut(model, cut_sizes(model)[3])
    small.chmod(0o644)
    before = small.read_bytes()

    def refuse(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchmod", refuse)
    with pytest.raises(bstk.OutputError, match="cannot write: Operation not permitted"):
        bstk.grow(small, 1000, tmp_path / "source.bstk")
    assert small.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"small.bstk", "source.bstk"}


@pytest.mark.parametrize("kind", ["whole", "sealed"])
def test_a_file_of_its_own_in_the_way_of_the_part(kind, model, other, cut, serve, tmp_path):
    small = cut(model, cut_sizes(model)[3])
    before, part = small.read_bytes(), tmp_path / "small.bstk.part"
    theirs = other if kind == "whole" else cut(other, cut_sizes(other)[1], "theirs.bstk").read_bytes()
    part.write_bytes(theirs)
    for mb in (1000, cut_sizes(model)[9]):
        with pytest.raises(bstk.OutputError, match="part: in the way: it is a .bstk file of its own. Move it"):
            bstk.grow(small, mb, serve(model).url)
    assert small.read_bytes() == before and part.read_bytes() == theirs
    part.write_bytes(other[:-1])  # what a stopped download of another model may have left
    bstk.grow(small, 1000, serve(model).url)
    assert small.read_bytes() == model and not part.exists()


@pytest.mark.parametrize("in_place", [True, False])
def test_what_a_stopped_growth_left_goes_when_another_way_succeeds(in_place, long_head, cut, serve, tmp_path):
    small = cut(long_head, cut_sizes(long_head)[3])
    part, killed = tmp_path / "small.bstk.part", tmp_path / ".small.bstk.0123abcd.part"
    (tmp_path / ".small.bstk.original.part").write_text("somebody's")
    ways = {
        "grow": lambda: bstk.grow(small, 1000, tmp_path / "source.bstk", in_place=in_place),
        "grow from a URL": lambda: bstk.grow(small, 1000, serve(long_head).url, in_place=in_place),
        "cut": lambda: bstk.truncate(small, None, cut_sizes(long_head)[3]),
    }
    for name in ("grow", "cut", "grow from a URL"):
        part.write_bytes(long_head[:-7])
        killed.write_bytes(long_head[:100])
        ways[name]()
        assert {path.name for path in tmp_path.iterdir()} == {
            "small.bstk",
            "source.bstk",
            ".small.bstk.original.part",
        }, name
    assert small.read_bytes() == long_head


@pytest.mark.parametrize("what", ["a link", "a folder", "no part of a .bstk file"])
def test_something_else_in_the_way_of_the_part(what, model, cut, serve, tmp_path):
    small = cut(model, cut_sizes(model)[3])
    before, part = small.read_bytes(), tmp_path / "small.bstk.part"
    if what == "a link":
        part.symlink_to(tmp_path / "precious")
        (tmp_path / "precious").write_bytes(model)
    elif what == "a folder":
        part.mkdir()
    else:
        part.write_text("notes")
    with pytest.raises(bstk.OutputError, match=f"small.bstk.part: in the way: it is {what}. Move it away"):
        bstk.grow(small, 1000, serve(model).url)
    assert small.read_bytes() == before
    assert what != "a link" or (tmp_path / "precious").read_bytes() == model


@pytest.mark.parametrize("where", [0, 110_000])
def test_a_full_disk_says_what_takes_room(where, long_head, cut, serve, tmp_path, monkeypatch):
    small = cut(long_head, cut_sizes(long_head)[3])
    part = tmp_path / "small.bstk.part"
    part.write_bytes(long_head[:where])

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("bstk.descriptors.Sink.write", refuse)
    with pytest.raises(bstk.ResourceError) as caught:
        bstk.grow(small, 1000, serve(long_head).url)
    assert ("delete it to have its room back" in str(caught.value)) == (where > 0)
    with pytest.raises(bstk.ResourceError, match="small.bstk.part is of an earlier run and takes room too"):
        bstk.grow(small, 1000, serve(long_head).url, in_place=True)


@pytest.mark.parametrize("in_place", [True, False])
def test_the_source_is_replaced_meanwhile(long_head, model, serve, cut, in_place):
    small = cut(long_head, cut_sizes(long_head)[5])
    length = small.stat().st_size
    server = serve(long_head, then={2: {"etag": '"two"'}})  # the same bytes again
    bstk.grow(small, 1000, server.url, in_place=in_place)
    assert small.read_bytes() == long_head and server.ranges_asked()[-1] == (length, len(long_head) - 1)
    small = cut(long_head, cut_sizes(long_head)[5])
    before = small.read_bytes()
    server = serve(long_head, then={2: {"etag": '"two"', "data": model}})
    with pytest.raises(bstk.OtherModelError):
        bstk.grow(small, 1000, server.url, in_place=in_place)
    assert small.read_bytes() == before
