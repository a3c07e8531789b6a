"""The size of a served model: what clients are told, following the machine, and while nobody asks."""

import pytest

import bstk
from bstack.engine.native.load import load
from bstack.serve import size as module
from bstack.serve.size import AUTO, Size
from bstk.errors import ResourceError


@pytest.fixture
def made(served_model):
    model, _ = load(served_model)
    warned = []

    def make(wanted=None, idle=None):
        made.append(Size(model, wanted, idle, warned.append))
        return made[-1], model.bstack_store, warned

    made = []
    yield make
    for one in made:
        one.close()


def grown(store):
    if store._growth is not None:
        store._growth.thread.join()


def test_what_clients_are_told_can_be_asked_for(made):
    """Every budget that is told gives the size that it is told for, and steps reach every block."""
    size, store, _ = made()
    told = size.state()
    assert told["budget_mb"] == told["max_mb"] == told["next_mb"]
    size.set(bstk.budget_bytes(told["min_mb"]))
    seen = []
    while (told := size.state())["budget_mb"] < told["max_mb"]:
        seen.append(told["blocks"])
        size.set(bstk.budget_bytes(told["budget_mb"]))
        grown(store)
        assert size.state() == told
        assert told["next_mb"] > told["budget_mb"]
        size.set(bstk.budget_bytes(told["next_mb"]))
        grown(store)
    assert told["blocks"] == told["all_blocks"] and len(seen) > 1 and seen == sorted(set(seen))


def test_a_size_for_nobody_that_is_too_small(made):
    with pytest.raises(bstk.BudgetError, match="smallest"):
        made(idle=100)


def test_a_model_that_cannot_wake_stays_as_it_is(made, monkeypatch):
    size, store, warned = made()
    full = store.state.blocks
    size.sleep(lambda: False)
    assert not size.asleep
    size.sleep(lambda: True)
    assert size.asleep and store.state.blocks < full

    def fail(*_given, **_options):
        raise ResourceError("no thread can be started.")

    with monkeypatch.context() as patch:
        patch.setattr(store, "resize", fail)
        size.wake()
    assert not size.asleep and store.state.blocks < full and "no thread" in warned[0]
    size.wake()
    assert len(warned) == 1


def test_following_asks_for_no_more_than_there_is(made, monkeypatch):
    """A file of which a part was fetched refuses more."""
    size, store, _ = made()
    size.set(store.file.base.budget)
    asked = []
    monkeypatch.setattr(module, "free_budget", lambda *_: (10**12, "much is free"))
    monkeypatch.setattr(store, "resize", lambda budget, **_options: asked.append(budget))
    size.set(AUTO)
    monkeypatch.setattr(module, "free_budget", lambda *_: (-5, "nothing is free"))
    size.set(AUTO)
    assert asked[0] == store.file.model.budget and asked[1] == store.file.base.budget
