"""bstack.load of a URL: what is kept, and that nothing is fetched twice."""

import os
import threading
import time
from functools import partial

import pytest
from served_files import cut_sizes

import bstk
from bstk.atomic import LockedFile
from bstk.http import HEAD

cache = pytest.importorskip("bstack.engine.url_cache")


def load(url, mb=None, strict=False):
    """What bstack.load reads: chunks of the kept file."""
    with cache.cached(url, None if mb is None else bstk.budget_bytes(mb), strict) as (file, chunks):
        return [file.read(chunk) for chunk in chunks]


def local(data, mb=None):
    with bstk.open(data) as file:
        return [file.read(chunk) for chunk in file.chunks[: file.fit(mb).chunks]]


def packed_or_native(name):
    """A function that loads a model with packed weights, with one of the engines."""
    if name == "native":
        return pytest.importorskip("bstack.engine.native.load").load
    return partial(pytest.importorskip("bstack").load, mode=name)


def until(condition):
    """Wait for something that must come; long enough for the slowest machine."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def kept(long_head):
    with bstk.open(long_head) as file:
        return cache.kept_path(file.root)


def test_grows_and_never_fetches_twice(long_head, serve, kept):
    server = serve(long_head)
    sizes = cut_sizes(long_head)
    longest = 0
    for mb in (sizes[3], sizes[1], sizes[12], sizes[12], sizes[0], None, sizes[3], None):
        server.asked.clear()
        assert load(server.url, mb) == local(long_head, mb)
        with bstk.open(long_head) as file:
            end = file.fit(mb).file_bytes
        missing = max(0, end - max(longest, HEAD))
        assert server.sent == HEAD + missing, "beside the fixed first request"
        longest = max(longest, end)
        assert kept.read_bytes() == long_head[:longest]


def test_one_model_at_two_addresses_is_kept_once(long_head, serve, tmp_path, kept):
    (tmp_path / "whole.bstk").write_bytes(long_head)
    bstk.truncate(tmp_path / "whole.bstk", tmp_path / "cut.bstk", cut_sizes(long_head)[20])
    sealed = (tmp_path / "cut.bstk").read_bytes()
    first, second = serve(long_head), serve(sealed)
    load(first.url)
    assert load(second.url) == local(sealed)  # not more than that file has, though more is kept
    assert second.sent == HEAD and os.listdir(kept.parent) == [kept.name]


def test_another_model_at_the_same_address(model, other, serve):
    server = serve(model)
    assert load(server.url) == local(model)
    server.data, server.etag = other, '"two"'
    assert load(server.url) == local(other)


def test_stopped_and_changed(long_head, model, serve, kept, monkeypatch):
    server = serve(long_head, drop_after=70_000)
    monkeypatch.setattr("bstk.http.RETRIES_IN_ALL", 0)
    with pytest.raises(bstk.RemoteError, check=lambda error: error.resumable):
        load(server.url)
    length = kept.stat().st_size
    server.drop_after = None
    server.asked.clear()
    assert load(server.url) == local(long_head)
    assert server.ranges_asked() == [(0, HEAD - 1), (length, len(long_head) - 1)]
    server = serve(long_head, then={1: {"data": model, "etag": '"two"'}})
    kept.unlink()
    assert load(server.url) == local(model)


def chunk_7(data):
    with bstk.open(data) as file:
        return file.chunks[7]


def damage(path, place):
    """Change a byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", ["preamble", "tables", "chunk"])
def test_a_damaged_copy_is_mended(long_head, serve, kept, place):
    server, chunk = serve(long_head), chunk_7(long_head)
    load(server.url)
    damage(kept, {"preamble": 60, "tables": 70_000, "chunk": chunk.offset + 3}[place])
    if place == "chunk":
        with pytest.raises(cache.KeptCopyError, match="Load again to fetch it"):
            load(server.url)
        assert kept.stat().st_size == chunk.offset
    assert load(server.url) == local(long_head) and kept.read_bytes() == long_head


@pytest.mark.parametrize("mended", [False, True])
def test_two_readers_of_a_damaged_copy_both_may_load_again(long_head, serve, kept, mended):
    """The one that comes second finds the damaged block gone, or whole again."""
    server, chunk = serve(long_head), chunk_7(long_head)
    load(server.url)
    damage(kept, chunk.offset + 3)
    with (
        pytest.raises(cache.KeptCopyError, match="matches its digest now" if mended else "Load again to fetch it"),
        cache.cached(server.url, None, False) as (file, _),
    ):
        try:
            file.read(chunk)
        finally:
            with pytest.raises(cache.KeptCopyError, match="Load again to fetch it"):
                load(server.url)
            if mended:
                load(server.url)
    assert load(server.url) == local(long_head) and kept.read_bytes() == long_head


def test_a_copy_whose_end_is_dropped_before_it_is_opened(long_head, serve, kept, monkeypatch):
    server = serve(long_head)
    load(server.url)
    with bstk.open(long_head) as file:
        chunk = file.chunks[7]

    def fetch_and_drop(*what, fetch=cache._fetch):
        found = fetch(*what)
        os.truncate(kept, chunk.offset)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_fetch", fetch_and_drop)
        with pytest.raises(cache.KeptCopyError, match="another process found the kept copy damaged"):
            load(server.url)
    assert load(server.url) == local(long_head)


def test_a_damaged_end_of_a_stopped_transfer_is_fetched_anew(long_head, serve, kept, monkeypatch):
    server = serve(long_head, drop_after=70_000)
    with monkeypatch.context() as patch:
        patch.setattr("bstk.http.RETRIES_IN_ALL", 0)
        with pytest.raises(bstk.RemoteError, check=lambda error: error.resumable):
            load(server.url)
    server.drop_after = None
    data = bytearray(kept.read_bytes())
    with bstk.open(long_head) as file:
        assert len(data) not in [chunk.end for chunk in file.chunks]
    data[-1] ^= 1
    kept.write_bytes(data)
    assert load(server.url) == local(long_head) and kept.read_bytes() == long_head


@pytest.mark.parametrize("mode", ["dense", "packed", "native"])
def test_a_model_is_loaded_though_its_copy_is_damaged(tiny_llama, serve, tmp_path, mode):
    bstack = pytest.importorskip("bstack")
    settings = bstack.Settings(codec="sign", planes=2, rank=1, samples=2, sequence_length=16)
    bstack.compress(tiny_llama, tmp_path / "x.bstk", settings=settings)
    data = (tmp_path / "x.bstk").read_bytes()
    server = serve(data)
    with bstk.open(data) as file:
        kept, chunk = cache.kept_path(file.root), file.chunks[-3]
    bstack.load(server.url)
    damaged = bytearray(data)
    damaged[chunk.offset + 9] ^= 1
    kept.write_bytes(damaged)
    load_model = packed_or_native(mode)
    load_model(server.url)
    assert kept.read_bytes() == data
    # What the server itself sends wrongly is an error, and not asked for again and again.
    server.data, server.etag = bytes(damaged), '"two"'
    kept.unlink()
    server.asked.clear()
    with pytest.raises(bstk.DamagedError, match="SHA-256 does not match"):
        load_model(server.url)
    assert len(server.asked) <= 3


def test_a_copy_is_not_dropped_for_what_the_server_sends(long_head, serve, kept):
    server = serve(long_head)
    load(server.url)
    damaged = bytearray(long_head)
    damaged[70_000] ^= 1  # in the tables
    kept.write_bytes(damaged)
    server.data, server.etag = bytes(damaged), '"two"'
    with pytest.raises(bstk.DamagedError):
        load(server.url)
    assert kept.read_bytes() == damaged
    server.data, server.etag = long_head, '"three"'
    assert load(server.url) == local(long_head) and kept.read_bytes() == long_head


def test_a_damaged_copy_is_left_alone_while_another_process_has_it(long_head, serve, kept):
    server = serve(long_head)
    load(server.url)
    damaged = bytearray(long_head)
    damaged[70_000] ^= 1
    kept.write_bytes(damaged)
    server.asked.clear()
    found = []
    loading = threading.Thread(target=lambda: found.append(load(server.url)))
    with LockedFile(kept):
        loading.start()
        until(lambda: len(server.asked) >= 2)  # it has met the damage and asked the server for the tables
        time.sleep(0.05)
        assert kept.read_bytes() == damaged
    loading.join(300)
    assert found == [local(long_head)] and kept.read_bytes() == long_head


def test_several_at_once(long_head, serve, kept):
    server = serve(long_head, pause=0.002)
    found = []
    threads = [threading.Thread(target=lambda: found.append(load(server.url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [local(long_head)] * 4
    with bstk.open(long_head) as file:
        assert server.sent <= 4 * file.preamble.header_length + len(long_head)


@pytest.mark.filterwarnings("ignore::bstk.PartialWarning")
def test_partial_and_budgets(long_head, serve):
    server = serve(long_head[:-10])
    assert load(server.url) == local(long_head)[:-1]
    with pytest.raises(bstk.PartialError):
        load(server.url, strict=True)
    with pytest.raises(bstk.BudgetError):
        load(server.url, mb=0.001)
    with pytest.raises(bstk.NotBstkError):
        load(serve(b"<html>").url)


def test_a_cache_that_cannot_be_written(long_head, serve, kept):
    kept.parent.parent.parent.mkdir(parents=True)
    kept.parent.parent.write_text("a file where a folder should be")
    with pytest.raises(bstk.OutputError, match="cannot write"):
        load(serve(long_head).url)


def test_loading_a_url_is_loading_the_file(tiny_llama, serve, tmp_path):
    import torch

    import bstack

    path = tmp_path / "tiny.bstk"
    bstack.compress(tiny_llama, path, settings=bstack.Settings(codec="sign", planes=2, samples=2, sequence_length=16))
    server = serve(path.read_bytes())
    with bstk.open(path) as file:
        mb = (file.base_length + file.length) / 2 / bstk.MB
    for budget in (mb, None):
        here, _ = bstack.load(path, mb=budget)
        there, tokenizer = bstack.load(server.url, mb=budget)
        assert tokenizer is not None
        for name, tensor in here.state_dict().items():
            assert torch.equal(tensor, there.state_dict()[name]), name


@pytest.mark.parametrize("engine", ["packed", "native"])
def test_a_model_from_a_url_has_the_sizes_that_were_fetched(engine, tiny_llama, serve, tmp_path):
    """A larger one is refused, whoever asks. The budget of the load is not, nor one that is too small for the next block."""
    import bstack

    path = tmp_path / "tiny.bstk"
    bstack.compress(tiny_llama, path, settings=bstack.Settings(codec="sign", planes=2, samples=2, sequence_length=16))
    with bstk.open(path) as file:
        smallest, next_end = file.base.budget, file.chunks[file.base_count].end
        mb, little_more, full = smallest / bstk.MB, (next_end - 1) / bstk.MB, file.complete.budget / bstk.MB
    server = serve(path.read_bytes())
    load_model = packed_or_native(engine)
    model, _ = load_model(server.url, mb=mb)
    before = bstack.resident(model)
    assert before == bstack.resize(model, mb) == bstack.resize(model, little_more) == bstack.resize(model)
    with pytest.raises(bstk.UsageError, match="more than was fetched"):
        bstack.resize(model, full)
    warnings = []
    with bstack.following(model, lambda: full, warn=warnings.append):
        until(lambda: warnings)
    assert "more than was fetched" in warnings[0]
    assert bstack.resident(model) == before
    model, _ = load_model(server.url)
    assert bstack.resize(model, 1000).blocks == bstack.resident(model).all_blocks
