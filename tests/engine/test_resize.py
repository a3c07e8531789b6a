"""Growing and shrinking: what is in memory, what the model says then, and what happens when it goes wrong."""

import copy
import threading
import time

import pytest
import torch
from cache_name import CACHE
from packed_models import IDS, budgets, damaged, flip_a_late_byte, logits

import bstack
import bstk
from bstack.packed.store import READERS, BlockStore

SETTINGS = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": 210}


def test_every_size_is_that_of_a_fresh_load(path, model):
    small, middle, full = budgets(path)
    for mb in (small, full, middle, small, middle, full, full):
        state = bstack.resize(model, mb)
        fresh, _ = bstack.load(path, mode="packed", mb=mb)
        assert state == bstack.resident(fresh) == bstack.resident(model)
        assert state.weight_bytes <= mb * bstk.MB and state.target_bytes == state.weight_bytes
        assert torch.equal(logits(model), logits(fresh))
    with bstk.open(path) as file:
        assert state.blocks == state.all_blocks == sum(chunk.is_block for chunk in file.chunks)
        assert state.weight_bytes == file.memory_bytes and state.bits_per_weight == pytest.approx(
            file.bits_per_weight()
        )


def test_resize_to_everything(path, model):
    bstack.resize(model, budgets(path)[0])
    bstack.resize(model)
    assert bstack.resident(model).blocks == bstack.resident(model).all_blocks


@pytest.mark.parametrize("mb", [0, -5, "abc", float("nan"), True])
def test_nonsense_changes_nothing(model, mb):
    before = bstack.resident(model)
    with pytest.raises(bstk.UsageError):
        bstack.resize(model, mb)
    assert bstack.resident(model) == before


def test_below_the_smallest(model):
    before = bstack.resident(model)
    with pytest.raises(bstk.BudgetError, match="smallest"):
        bstack.resize(model, 0.001)
    assert bstack.resident(model) == before


def test_dense_models_have_no_size(path):
    model, _ = bstack.load(path)
    for call in (bstack.resize, bstack.resident):
        with pytest.raises(bstk.UsageError, match="mode='packed'"):
            call(model)


def test_unknown_mode(path):
    with pytest.raises(bstk.UsageError, match="'sparse'; allowed are 'dense' and 'packed'"):
        bstack.load(path, mode="sparse")


def test_stack_is_the_old_name_of_packed(path, model):
    old, _ = bstack.load(path, mode="stack")
    assert bstack.resident(old) == bstack.resident(model)
    assert torch.equal(logits(old), logits(model))


@pytest.mark.parametrize(("limit", "codec"), [("BLOCKS", "trellis"), ("RANK", "sign")])
def test_more_than_the_kernels_take(limit, codec, file_of, monkeypatch):
    path = file_of("llama", codec)
    monkeypatch.setattr(f"bstack.kernels.matrix.{limit}", 1)
    with pytest.raises(bstk.BstkError, match="mode='dense'"):
        bstack.load(path, mode="packed")
    monkeypatch.undo()
    bstack.load(path, mode="packed")


def test_resizing_while_text_is_written(path, model):
    """Shrink and grow between tokens: the text goes on, and a new text is that of a fresh model."""
    small, middle, full = budgets(path)
    fresh, _ = bstack.load(path, mode="packed")
    sizes = iter([small, middle, full] * 20)

    class Squeeze(torch.nn.Module):
        def __call__(self, ids, scores):
            bstack.resize(model, next(sizes), wait=False)
            return scores

    # A small model may end its text early, and which size writes which token depends on time.
    text = model.generate(IDS, logits_processor=[Squeeze()], min_new_tokens=30, **SETTINGS)
    assert text.shape == (1, 35)
    bstack.resize(model, full)
    assert torch.equal(model.generate(IDS, **SETTINGS), fresh.generate(IDS, **SETTINGS))


def test_a_text_goes_on_as_in_a_fresh_model_with_the_same_cache(path, model):
    """What was said and its keys and values stay; everything after growing back is computed at full size."""
    from transformers import DynamicCache

    small, _, full = budgets(path)
    fresh, _ = bstack.load(path, mode="packed")
    bstack.resize(model, small)
    with torch.no_grad():
        cache = getattr(model(IDS, use_cache=True), CACHE)
    bstack.resize(model, full)
    copies = []
    for _ in range(2):
        copies.append(DynamicCache(config=model.config))
        for index, layer in enumerate(cache.layers):
            copies[-1].update(layer.keys.clone(), layer.values.clone(), index)
    texts = [
        m.generate(torch.cat([IDS, IDS[:, :1]], 1), **{CACHE: c}, **SETTINGS)
        for m, c in zip((model, fresh), copies, strict=True)
    ]
    assert torch.equal(*texts)


def test_from_many_threads(path, model):
    """Two threads that resize and one that writes: no crash, no deadlock, and the last word counts."""
    sizes, errors, stop = budgets(path), [], threading.Event()

    def work(call):
        try:
            while not stop.is_set():
                call()
        except Exception as error:
            errors.append(error)

    calls = [
        lambda: bstack.resize(model, sizes[0]),
        lambda: bstack.resize(model, sizes[2], wait=False),
        lambda: logits(model),
    ]
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    stop.set()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    assert not errors
    bstack.resize(model, sizes[1])
    assert torch.equal(logits(model), logits(bstack.load(path, mode="packed", mb=sizes[1])[0]))


def test_only_missing_blocks_are_read(path, model, monkeypatch):
    small, middle, full = budgets(path)
    bstack.resize(model, middle)
    there = bstack.resident(model).blocks
    read = []
    file = model.bstack_store.file
    monkeypatch.setattr(file, "read", lambda chunk, original=file.read: (read.append(chunk), original(chunk))[1])
    bstack.resize(model, full)
    assert len(read) == bstack.resident(model).all_blocks - there
    bstack.resize(model, small)
    assert len(read) == bstack.resident(model).all_blocks - there


def shorten(copy):
    with bstk.open(copy) as file:
        length = file.base_length
    with open(copy, "r+b") as stream:
        stream.truncate(length + 10)


@pytest.mark.parametrize("change", [flip_a_late_byte, shorten])
def test_a_file_that_goes_bad_while_it_is_open(path, tmp_path, change):
    """The next growth fails with the reason; the model runs on with what it has, and can shrink."""
    model = damaged(path, tmp_path, change)
    before = logits(model)
    with pytest.raises(bstk.DamagedError, match=r"copy.bstk"):
        bstack.resize(model)
    state = bstack.resident(model)
    assert state.error is not None and state.blocks < state.all_blocks
    assert logits(model).isfinite().all()
    bstack.resize(model, budgets(path)[0])
    assert torch.equal(logits(model), before) and bstack.resident(model).error is None


def test_putting_a_block_that_fails_midway(path, model, monkeypatch):
    """Blocks that count keep their memory: the model goes on with them, and grows afterwards."""
    small, _, full = budgets(path)
    bstack.resize(model, small)
    store = model.bstack_store
    before, fresh = bstack.resident(model).blocks, logits(bstack.load(path, mode="packed")[0])
    matrix_type, calls = type(next(iter(store._matrices.values()))), []
    put = matrix_type.put

    def fail_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more addresses")
        return put(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(matrix_type, "put", fail_at_the_third)
        with pytest.raises(RuntimeError, match="no more addresses"):
            bstack.resize(model, full)
    assert bstack.resident(model).blocks == before + 2 == len(store._arena)
    assert logits(model).isfinite().all()
    bstack.resize(model, full)
    assert len(store._arena) == bstack.resident(model).all_blocks
    assert torch.equal(logits(model), fresh)


def test_a_failure_nobody_waits_for_is_kept(path, tmp_path):
    model = damaged(path, tmp_path, shorten)
    bstack.resize(model, wait=False)
    model.bstack_store._growth.thread.join(300)
    assert "shorter" in bstack.resident(model).error


def test_without_a_thread_to_grow_in(path, model, monkeypatch):
    """The growth is refused; the model can shrink, grow and be closed afterwards."""
    small, _, full = budgets(path)
    bstack.resize(model, small)
    before = bstack.resident(model)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, pytest.raises(bstk.ResourceError, match="can't start new thread"):
        patch.setattr(threading.Thread, "start", refuse)
        bstack.resize(model, full)
    assert bstack.resident(model) == before == bstack.resize(model, small)
    assert bstack.resize(model, full).blocks == before.all_blocks
    model.bstack_store.close()


def test_a_shrink_stops_a_growth(path, model, monkeypatch):
    """It waits for the blocks that are being read, and for none of those behind them."""
    small, _, full = budgets(path)
    bstack.resize(model, small)
    store, reading, stopped, read = model.bstack_store, threading.Event(), threading.Event(), []
    missing = bstack.resident(model).all_blocks - bstack.resident(model).blocks

    def slow(chunk, original=store.file.read):
        read.append(chunk)
        reading.set()
        assert stopped.wait(300)
        return original(chunk)

    monkeypatch.setattr(store.file, "read", slow)
    bstack.resize(model, full, wait=False)
    assert reading.wait(300)
    assert bstack.resident(model).target_bytes > bstack.resident(model).weight_bytes
    thread = store._growth.thread
    monkeypatch.setattr(thread, "join", lambda join=thread.join: (stopped.set(), join()))
    state = bstack.resize(model, small)
    assert len(read) <= READERS < missing and state.target_bytes == state.weight_bytes
    monkeypatch.undo()
    assert torch.equal(logits(model), logits(bstack.load(path, mode="packed", mb=small)[0]))


def test_closing(model):
    store = model.bstack_store
    assert isinstance(store, BlockStore)
    before = logits(model)
    store.close()
    store.close()
    assert torch.equal(logits(model), before)
    with pytest.raises(bstk.UsageError, match="closed"):
        bstack.resize(model)


def test_what_would_lose_the_weights_is_refused(model, tmp_path):
    for call in (lambda: model.save_pretrained(tmp_path / "x"), model.state_dict, lambda: copy.deepcopy(model)):
        with pytest.raises(bstk.UsageError, match="packed"):
            call()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("token", [-1, 211, 10**7])
def test_tokens_that_are_not(model, token):
    with pytest.raises(IndexError):
        model(torch.tensor([[3, token]]))


def test_signs_grow_while_they_are_used(tmp_path_factory):
    """The kernels prepare inputs for each block of the sign codec: a count that rises in a call must not be seen in it."""
    import tiny_models

    folder = tmp_path_factory.mktemp("sign")
    settings = bstack.Settings(codec="sign", planes=8, rank=8, samples=4, sequence_length=32)
    bstack.compress(tiny_models.save("llama", folder / "model"), folder / "model.bstk", settings=settings)
    model, _ = bstack.load(folder / "model.bstk", mode="packed")
    small, _, full = budgets(folder / "model.bstk")
    stop, errors = threading.Event(), []

    def use():
        try:
            while not stop.is_set():
                assert logits(model).isfinite().all()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    for _ in range(40):
        bstack.resize(model, small)
        bstack.resize(model, full)
    stop.set()
    thread.join(300)
    assert not errors
    fresh, _ = bstack.load(folder / "model.bstk", mode="packed")
    assert torch.equal(logits(model), logits(fresh))
