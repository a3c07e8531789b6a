"""Following a budget: a function's answers, or the memory that a machine has free."""

import threading
import time
from itertools import pairwise

import pytest
from packed_models import budgets, damaged, flip_a_late_byte

import bstack
import bstk
from bstack.memory.free import Memory
from bstack.packed.store import BlockStore


def until(condition):
    end = time.monotonic() + 300
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_following_a_function(path, model, monkeypatch):
    """The model has the size that the function says; a nonsense answer and a failing function are said, and change nothing."""
    monkeypatch.setattr("bstack.packed.autosize.INTERVAL", 0.01)
    small, _, full = budgets(path)
    answers, warnings = [small], []

    def budget():
        if isinstance(answers[-1], Exception):
            raise answers[-1]
        return answers[-1]

    with bstack.following(model, budget, warn=warnings.append):
        assert until(lambda: bstack.resident(model).blocks < bstack.resident(model).all_blocks)
        few = bstack.resident(model).blocks
        for answer, words in ((-3, "-3"), (0.0001, "smallest"), (RuntimeError("no idea"), "no idea")):
            answers.append(answer)
            assert until(lambda words=words: any(words in line for line in warnings)), warnings
        assert bstack.resident(model).blocks == few and len(warnings) == 3
        answers.append(full)
        assert until(lambda: bstack.resident(model).blocks == bstack.resident(model).all_blocks)
    assert not [thread for thread in threading.enumerate() if thread.name == "bstack-poller"]


class Machine:
    """Readings for a poller of a model, and a clock of its looks: what the model does not take is free."""

    def __init__(self, model):
        self.now, self.warnings = 0.0, []
        self.model, self.total = model, 4000 * bstk.MB
        self.poller = bstack.following(model, warn=self.warnings.append)
        self.poller._read = lambda: Memory(self.total - bstack.resident(model).weight_bytes, 8000 * bstk.MB, "a test")

    def live(self, seconds):
        """Look twice a second; a growth is through before the next look."""
        for _ in range(2 * seconds):
            self.now += 0.5
            self.poller.poll(self.now)
            growth = self.model.bstack_store._growth
            if growth is not None:
                growth.thread.join(300)


def test_following_asks_a_whole_model_for_nothing(path, model):
    """Though its file is longer than its blocks are large. At the smallest size it is as still."""
    with bstk.open(path) as file:
        assert file.length > file.memory_bytes and file.base.budget > file.base.memory_bytes
    store, machine, asked = model.bstack_store, Machine(model), []
    machine.poller._resize = asked.append
    machine.live(60)
    assert asked == [] and store.budget == machine.poller._policy.largest
    bstack.resize(model, budgets(path)[0])
    machine.total = 0
    machine.live(5)
    assert asked == [] and store.budget == machine.poller._policy.smallest


def test_a_growth_that_fails_while_following_the_machine(path, tmp_path, monkeypatch):
    """It is said once, and tried again, ever more rarely, until it succeeds."""
    model = damaged(path, tmp_path, flip_a_late_byte)
    machine = Machine(model)
    tries = []
    original = BlockStore.resize
    monkeypatch.setattr(
        BlockStore, "resize", lambda *args, **options: (tries.append(machine.now), original(*args, **options))[1]
    )
    machine.live(600)
    waits = [later - earlier for earlier, later in pairwise(tries)]
    assert 4 <= len(tries) <= 8 and waits == sorted(waits) and waits[0] < waits[-1]
    (message,) = machine.warnings
    assert "could not grow" in message and "copy.bstk" in message
    flip_a_late_byte(tmp_path / "copy.bstk")  # back
    machine.live(200)
    assert bstack.resident(model).blocks == bstack.resident(model).all_blocks and len(machine.warnings) == 1


def test_a_growth_that_fails_while_following_a_function(path, tmp_path):
    """The same answer is tried again, after a pause, and the failure said once."""
    model = damaged(path, tmp_path, flip_a_late_byte)
    small, _, full = budgets(path)
    answers, warnings = [full], []
    follower = bstack.following(model, lambda: answers[-1], warn=warnings.append)

    def look(now):
        follower.poll(now)
        growth = model.bstack_store._growth
        if growth is not None:
            growth.thread.join(300)
        return growth

    failed = look(0)
    assert failed.error is not None
    assert look(1) is look(9) is failed and len(warnings) == 1 and "copy.bstk" in warnings[0]
    again = look(11)
    assert again is not failed and again.error is not None
    assert look(12) is again and len(warnings) == 1
    answers.append(small)
    look(13)  # another answer does not wait
    assert bstack.resident(model).weight_bytes <= small * bstk.MB
    answers.append(full)
    look(14)
    flip_a_late_byte(tmp_path / "copy.bstk")  # back
    look(15)
    look(26)
    assert bstack.resident(model).blocks == bstack.resident(model).all_blocks and len(warnings) == 1


def test_following_needs_packed_weights(path):
    with pytest.raises(bstk.UsageError, match="dense weights"):
        bstack.following(bstack.load(path)[0])
