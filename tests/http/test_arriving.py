"""A model behind a URL that runs when its base model has arrived, and grows while the rest does."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny_models

import bstack
import bstk
from bstack.engine import url_cache
from bstack.engine.native import generate
from bstack.engine.native.load import load
from bstack.packed.store import resident, store_of
from bstk.atomic import LockedFile
from bstk.http import HEAD


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file whose base model comes with the first request, and most of whose blocks do not."""
    source = tiny_models.add_tokenizer(tiny_models.save("llama", tmp_path_factory.mktemp("arriving") / "model"))
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    settings = bstack.Settings(codec="sign", planes=8, rank=1, samples=2, sequence_length=16)
    bstack.compress(source, source.parent / "model.bstk", settings=settings)
    return source.parent / "model.bstk"


@pytest.fixture(scope="module")
def data(path):
    found = path.read_bytes()
    with bstk.open(found) as file:
        assert file.base_length < HEAD < HELD < file.length
    return found


HELD = HEAD + 20_000


@pytest.fixture
def held(data, serve):
    """A server that keeps back what comes after `HELD`."""
    return serve(data, hold_from=HELD)


@pytest.fixture
def kept(data):
    with bstk.open(data) as file:
        return url_cache.kept_path(file.root)


@pytest.fixture(autouse=True)
def block_by_block(monkeypatch):
    """Each block counts when it has arrived: all of this file would be one run."""
    monkeypatch.setattr("bstack.packed.store.RUN", 1)


def until(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_whole(model):
    return resident(model).blocks == resident(model).all_blocks


def write(model, tokenizer, tokens=12, show=lambda text: None):
    ids = generate.encode_prompt(tokenizer, "the river", chat=False)
    return generate.write_text(model, tokenizer, ids, show, max_new_tokens=tokens).text


def local(path, mb=None):
    model, tokenizer = load(path, mb=mb)
    return write(model, tokenizer)


@pytest.mark.parametrize("place", ["http", "hf"])
def test_it_writes_before_all_has_arrived_and_grows(path, data, held, kept, monkeypatch, place):
    url = held.url
    if place == "hf":
        monkeypatch.setenv("HF_ENDPOINT", held.base)
        url = "hf://owner/name/model.bstk"
    model, tokenizer = load(url, wait=False)
    until(lambda: kept.stat().st_size > HEAD)
    sizes = []

    def show(_text):
        sizes.append(resident(model))
        held.released.set()  # the first token is there
        until(lambda: is_whole(model))

    assert write(model, tokenizer, show=show)
    assert sizes[0].blocks < sizes[0].all_blocks and sizes[0].weight_bytes < sizes[0].target_bytes
    assert held.sent == HEAD + len(data) - HEAD and kept.read_bytes() == data
    assert write(model, tokenizer) == local(path)
    assert resident(model).error is None


def test_it_is_the_model_of_what_has_arrived(path, held):
    model, tokenizer = load(held.url, wait=False)
    with bstk.open(path) as file:
        here = max(chunk.end for chunk in file.chunks if chunk.end <= HELD // 4096 * 4096)
        blocks = sum(chunk.is_block for chunk in file.chunks if chunk.end <= here)
    until(lambda: resident(model).blocks >= blocks - 2)  # the server sends whole pieces of 4096 bytes
    found = store_of(model).state.weight_bytes
    assert write(model, tokenizer) == local(path, mb=found_budget(path, found))
    store_of(model).close()


def found_budget(path, weight_bytes):
    with bstk.open(path) as file:
        cuts = [file.cut(count) for count in range(file.base_count, len(file.chunks) + 1)]
        return next(cut for cut in cuts if cut.memory_bytes == weight_bytes).budget / bstk.MB


def test_it_shrinks_and_grows_meanwhile(path, data, held, kept):
    """A resize does not wait for the server, and what arrives is kept whatever the model's size is."""
    model, tokenizer = load(held.url, wait=False)
    until(lambda: kept.stat().st_size > HEAD)
    smallest = store_of(model).file.base.budget / bstk.MB
    assert bstack.resize(model, smallest).error is None
    assert write(model, tokenizer) == local(path, smallest)
    held.released.set()
    until(lambda: kept.stat().st_size == len(data))
    assert resident(model).weight_bytes == resident(model).target_bytes
    assert bstack.resize(model, wait=True) and is_whole(model)
    assert write(model, tokenizer) == local(path)


def test_a_budget_bounds_it(path, held, data):
    held.released.set()
    with bstk.open(path) as file:
        cut = file.cut((file.base_count + len(file.chunks)) // 2)
    model, tokenizer = load(held.url, mb=cut.budget / bstk.MB, wait=False)
    until(lambda: resident(model).weight_bytes == cut.memory_bytes)
    assert write(model, tokenizer) == local(path, cut.budget / bstk.MB) and held.sent == max(HEAD, cut.file_bytes)


def test_stopped_it_goes_on(path, data, held, kept):
    model, _ = load(held.url, wait=False)
    until(lambda: kept.stat().st_size > HEAD)
    store_of(model).close()
    held.released.set()
    until(lambda: is_unlocked(kept))
    length = kept.stat().st_size
    assert HEAD < length < len(data) and kept.read_bytes() == data[:length]
    held.asked.clear()
    model, tokenizer = load(held.url, wait=False)
    until(lambda: is_whole(model))
    assert held.ranges_asked() == [(0, HEAD - 1), (length, len(data) - 1)]
    assert write(model, tokenizer) == local(path)


def is_unlocked(path):
    try:
        LockedFile(path).close()
    except bstk.UsageError:
        return False
    return True


def test_two_at_once_fetch_once(path, data, held, kept):
    """The second takes what the first has fetched, and does not wait for its end."""
    first, _ = load(held.url, wait=False)
    until(lambda: kept.stat().st_size > HEAD)
    second, tokenizer = load(held.url, wait=False)
    assert write(second, tokenizer)
    held.released.set()
    until(lambda: is_whole(first) and is_whole(second))
    assert held.sent == 2 * HEAD + len(data) - HEAD  # each asks which model it is
    assert write(second, tokenizer) == local(path)


def test_the_second_goes_on_where_the_first_was_stopped(path, data, held, kept):
    first, _ = load(held.url, wait=False)
    until(lambda: kept.stat().st_size > HEAD)
    second, _ = load(held.url, wait=False)
    store_of(first).close()
    held.released.set()
    until(lambda: is_whole(second))
    assert kept.read_bytes() == data


def test_the_second_waits_for_the_base_model_alone(held, kept):
    model, _ = load(held.url, wait=False)
    store_of(model).close()
    base = store_of(model).file.base_length
    held.released.set()
    until(lambda: is_unlocked(kept))
    os.truncate(kept, base - 1)
    found = []
    with LockedFile(kept) as other:
        thread = threading.Thread(target=lambda: found.append(load(held.url, wait=False)))
        thread.start()
        time.sleep(0.2)
        assert not found
        other.write(base - 1, held.data[base - 1 : base])
        thread.join(300)
        assert found and resident(found[0][0]).blocks < resident(found[0][0]).all_blocks
    until(lambda: is_whole(found[0][0]))


def test_a_server_without_ranges(path, data, serve):
    server = serve(data, ranges=False)
    model, tokenizer = load(server.url, wait=False)
    until(lambda: is_whole(model))
    assert len(server.asked) == 1 and server.sent == len(data)
    assert write(model, tokenizer) == local(path)


def test_a_broken_connection_is_taken_up_again(path, data, serve):
    server, lines = serve(data, then={1: {"drop_after": 10_000}, 3: {"drop_after": None}}), []
    model, tokenizer = load(server.url, wait=False, notify=lines.append)
    until(lambda: is_whole(model))
    assert len(server.asked) > 2 and lines == []
    assert write(model, tokenizer) == local(path)


def test_one_that_stays_broken_leaves_the_size_and_is_said_once(path, data, serve, monkeypatch):
    monkeypatch.setattr("bstk.http.RETRIES", 1)
    server, lines = serve(data, then={1: {"statuses": [503] * 100}}), []
    model, tokenizer = load(server.url, wait=False, notify=lines.append)
    until(lambda: lines)
    until(lambda: resident(model).error and resident(model).weight_bytes == resident(model).target_bytes)
    assert write(model, tokenizer)
    with pytest.raises(bstk.RemoteError, check=lambda error: error.resumable):
        bstack.resize(model)
    assert len(lines) == 1 and "the rest is not fetched: the transfer" in lines[0] and "broke off" in lines[0]
    server.statuses.clear()
    bstack.resize(model)
    assert is_whole(model) and write(model, tokenizer) == local(path)


def test_a_block_damaged_on_the_server_is_not_used(data, serve, kept):
    with bstk.open(data) as file:
        chunk = file.chunks[-3]
    server, lines = serve(data[: chunk.offset] + b"?" + data[chunk.offset + 1 :]), []
    model, tokenizer = load(server.url, wait=False, notify=lines.append)
    until(lambda: resident(model).error)
    assert "SHA-256" in resident(model).error and "SHA-256" in lines[0] and len(lines) == 1
    assert write(model, tokenizer) and kept.stat().st_size == chunk.offset


def test_a_damaged_copy_is_mended(path, data, serve, kept):
    server = serve(data)
    load(server.url)
    with bstk.open(data) as file:
        chunk = file.chunks[-3]
    kept.write_bytes(data[: chunk.offset] + b"?" + data[chunk.offset + 1 :])
    model, tokenizer = load(server.url, wait=False)
    until(lambda: is_whole(model))
    assert kept.read_bytes() == data and write(model, tokenizer) == local(path)


def test_another_model_on_the_server_meanwhile(data, serve, other):
    """The one that runs stays as it is."""
    server, lines = serve(data, then={1: {"data": other, "etag": '"two"'}}), []
    model, tokenizer = load(server.url, wait=False, notify=lines.append)
    until(lambda: resident(model).error)
    assert "was replaced" in lines[0] and write(model, tokenizer)


@pytest.mark.slow
def test_the_commands_begin_with_what_is_there(path, data, held, kept):
    def start(*arguments):
        command = [sys.executable, "-m", "bstack", *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # Tests that run in the background of a shell inherit that Ctrl-C is ignored.
        return subprocess.Popen(
            command, **pipes, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        )

    run = start("run", held.url, "-p", "the river", "--max-new-tokens", "5")
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0 and out.strip()
    for words in (f"{held.url}: all ", "It begins with ", "more arrive", "had not arrived. The next run fetches on."):
        assert words in err
    with bstk.open(data) as file:
        assert file.base_length <= kept.stat().st_size < len(data)  # a short answer ends before the head is there
    chat = start("chat", held.url, "--max-new-tokens", "5")
    chat.stdin.write("the river\n")
    chat.stdin.flush()
    assert chat.stdout.readline().strip()
    assert any(" tokens, first after" in line for line in chat.stderr)
    until(lambda: kept.stat().st_size > HEAD)
    time.sleep(0.5)  # it waits for the next line
    chat.send_signal(signal.SIGINT)
    assert chat.communicate(timeout=300) and chat.returncode == 75
    held.asked.clear()
    length = kept.stat().st_size
    held.released.set()
    chat = start("chat", held.url, "--max-new-tokens", "5")
    until(lambda: kept.stat().st_size == len(data))
    out, err = chat.communicate("the river\n/mb\n", timeout=300)
    assert chat.returncode == 0 and out.strip() and "Error" not in err
    assert re.search(r": all .*, KLD about [\d.]+, about [\d,.]+ tokens/s or less", err)
    assert (length, len(data) - 1) in held.ranges_asked() and kept.read_bytes() == data
    assert "Nothing is left to fetch." in start("run", held.url, "-p", "the river").communicate(timeout=300)[1]
