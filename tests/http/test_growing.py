"""Growing a cut: byte for byte a larger cut, and bytes that are there are not read again."""

import os

import pytest
from served_files import cut_sizes

import bstk


@pytest.mark.parametrize("which", ["model", "long_head"])
@pytest.mark.parametrize("remote", [True, False])
def test_fetches_what_is_missing(which, remote, request, serve, cut, tmp_path):
    data = request.getfixturevalue(which)
    sizes = cut_sizes(data)
    small, large = cut(data, sizes[21]), cut(data, sizes[25], "large.bstk")
    server = serve(data)
    before, seen = small.stat().st_size, []
    source = server.url if remote else tmp_path / "source.bstk"
    found = bstk.grow(small, sizes[25], source, progress=seen.append)
    assert small.read_bytes() == large.read_bytes() and found.file_bytes == large.stat().st_size
    assert sum(seen) == found.file_bytes - before
    assert {path.name for path in tmp_path.iterdir()} == {"small.bstk", "large.bstk", "source.bstk"}
    if remote:
        assert server.ranges_asked()[-1] == (before, found.file_bytes - 1) and len(server.asked) <= 3


def test_to_the_end_gives_the_file_itself(model, serve, cut):
    small = cut(model, cut_sizes(model)[0])
    bstk.grow(small, 1000, serve(model).url)
    assert small.read_bytes() == model


def test_from_a_sealed_file_as_far_as_it_goes(model, cut):
    sizes = cut_sizes(model)
    small, middle = cut(model, sizes[1]), cut(model, sizes[4], "middle.bstk")
    bstk.grow(small, 1000, middle)
    assert small.read_bytes() == middle.read_bytes()


def test_a_partial_file_goes_on_within_a_block(model, serve, cut, tmp_path):
    sizes = cut_sizes(model)
    large = cut(model, sizes[20], "large.bstk")
    server = serve(model)
    for extra in (0, 1, 1000):
        small = tmp_path / "partial.bstk"
        small.write_bytes(model[: round(sizes[18] * bstk.MB) + extra])
        server.asked.clear()
        length = small.stat().st_size
        bstk.grow(small, sizes[20], server.url)
        assert server.ranges_asked()[-1] == (max(length, 65536), large.stat().st_size - 1)
        assert small.read_bytes() == large.read_bytes()
    # All blocks are there, and only the seal is missing; or there is the beginning of one that does not fit.
    for extra in (0, 1000):
        small.write_bytes(model[: large.stat().st_size + extra])
        bstk.grow(small, sizes[20], server.url)
        assert small.read_bytes() == large.read_bytes()


def test_refusals_change_nothing(model, other, serve, cut, tmp_path, vector):
    sizes = cut_sizes(model)
    small = cut(model, sizes[5])
    before = small.read_bytes()
    server, strange = serve(model), serve(other)
    with pytest.raises(bstk.UsageError, match="belongs to another model") as caught:
        bstk.grow(small, 1000, strange.url)
    assert caught.value.exit_code == 2 and len(strange.asked) == 1
    for mb in (sizes[5], sizes[3]):
        with pytest.raises(bstk.UsageError, match=r"nothing to add: it takes .* MB already"):
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
    with pytest.raises(bstk.RemoteError, check=lambda error: error.missing):
        bstk.grow(small, 1000, server.url)
    assert small.read_bytes() == before
    with pytest.raises(bstk.NotBstkError):
        bstk.grow(vector("bad-html.bstk"), 1000, server.url)
    with pytest.raises(bstk.UnsupportedVersionError, match="not rewrite"):
        bstk.grow(vector("read-only-compatible-flag.bstk"), 1000, server.url)


def test_nothing_is_changed_before_the_first_bytes_are_here(long_head, serve, cut):
    small = cut(long_head, cut_sizes(long_head)[5])
    before = small.read_bytes()
    server = serve(long_head, statuses=[0, 0] + [503] * 6)
    with pytest.raises(bstk.RemoteError, check=lambda error: error.resumable):
        bstk.grow(small, 1000, server.url)
    assert small.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("remote", [True, False])
def test_permissions_and_links_stay(remote, model, cut, serve, tmp_path):
    small = cut(model, cut_sizes(model)[3])
    small.chmod(0o600)
    (tmp_path / "link.bstk").symlink_to(small)
    bstk.grow(tmp_path / "link.bstk", 1000, serve(model).url if remote else tmp_path / "source.bstk")
    assert (
        small.read_bytes() == model and small.stat().st_mode & 0o777 == 0o600 and (tmp_path / "link.bstk").is_symlink()
    )


def test_leftovers_of_stopped_runs_go_when_a_growth_or_a_cut_succeeds(long_head, cut, serve, tmp_path):
    small = cut(long_head, cut_sizes(long_head)[3])
    part, killed = tmp_path / "small.bstk.part", tmp_path / ".small.bstk.0123abcd.part"
    (tmp_path / ".small.bstk.original.part").write_text("somebody's")
    ways = {
        "grow": lambda: bstk.grow(small, 1000, tmp_path / "source.bstk"),
        "grow from a URL": lambda: bstk.grow(small, 1000, serve(long_head).url),
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


def test_the_source_is_replaced_meanwhile(long_head, model, serve, cut):
    small = cut(long_head, cut_sizes(long_head)[5])
    length = small.stat().st_size
    server = serve(long_head, then={2: {"etag": '"two"'}})  # the same bytes again
    bstk.grow(small, 1000, server.url)
    assert small.read_bytes() == long_head and server.ranges_asked()[-1] == (length, len(long_head) - 1)
    small = cut(long_head, cut_sizes(long_head)[5])
    before = small.read_bytes()
    server = serve(long_head, then={2: {"etag": '"two"', "data": model}})
    with pytest.raises(bstk.UsageError, match="belongs to another model"):
        bstk.grow(small, 1000, server.url)
    assert small.read_bytes() == before


@pytest.mark.parametrize("deleted", [True, False])
def test_a_file_that_goes_away_while_it_grows_from_a_url(deleted, long_head, cut, serve, tmp_path):
    small = cut(long_head, cut_sizes(long_head)[3])

    def meanwhile(count):
        if deleted:
            small.unlink(missing_ok=True)
        else:
            (tmp_path / "other").write_bytes(b"other")
            (tmp_path / "other").replace(small)

    with pytest.raises(bstk.UsageError, match="replaced or deleted it meanwhile"):
        bstk.grow(small, cut_sizes(long_head)[9], serve(long_head).url, progress=meanwhile)
    assert small.exists() != deleted and (deleted or small.read_bytes() == b"other")
