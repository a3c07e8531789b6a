"""When to shrink and when to grow: rules that hold for all readings, and stories reading by reading."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bstack.memory.free import Memory
from bstack.packed.autosize import MAX_PATIENCE, QUIET, STALL, STEP, Policy, default_margin, first_budget

MB = 2**20
SMALLEST, LARGEST, MARGIN = 100 * MB, 2000 * MB, 200 * MB


def reading(free: float, pressure: float | None = None) -> Memory:
    """`free` in MB."""
    return Memory(int(free * MB), 8000 * MB, "a test", pressure)


def policy(**changes) -> Policy:
    return Policy(**{"smallest": SMALLEST, "largest": LARGEST, "margin": MARGIN, **changes})


class Model:
    """A model on a machine: what it takes is not free. Blocks come whole; `resized` lists (time, MB before, MB after)."""

    def __init__(self, current: float, block: int = 1, **changes):
        self.policy, self.current, self.block = policy(**changes), int(current * MB), block
        self.now, self.resized = 0.0, []

    def live(self, seconds: float, total, pressure=lambda now: None, interval: float = 0.5) -> None:
        """Let time pass; `total(now)` is MB that the model and what is free have together."""
        end = self.now + seconds
        while self.now < end:
            memory = reading(total(self.now) - self.current / MB, pressure(self.now))
            target = self.policy.decide(self.now, memory, self.current)
            if target is not None:
                before, self.current = self.current, max(SMALLEST, target // self.block * self.block)
                self.resized.append((self.now, before / MB, self.current / MB))
            self.now += interval


readings = st.lists(
    st.tuples(
        st.floats(0.01, 20), st.integers(-500, 4000), st.one_of(st.none(), st.floats(0, 100)), st.integers(100, 2000)
    ),
    min_size=1,
    max_size=60,
)


@given(readings)
def test_whatever_is_read_targets_are_within_bounds_and_shrinks_come_at_once(story):
    decider, now, changed, quiet_since = policy(), 0.0, 0.0, None
    for wait, free, pressure, size in story:
        now += wait
        current = size * MB
        target = decider.decide(now, reading(free, pressure), current)
        assert decider.short == (current + free * MB - MARGIN < SMALLEST)
        if free * MB < MARGIN:
            quiet_since = None
            assert target is None if current == SMALLEST else target < current
        else:
            quiet_since = now if quiet_since is None else quiet_since
        if target is None:
            continue
        assert SMALLEST <= target <= LARGEST and target != current
        if target > current:
            assert now - changed >= QUIET and now - quiet_since >= QUIET
            assert (pressure or 0) < STALL / 2
            assert target - current >= STEP or target == LARGEST
            assert current + free * MB - target >= MARGIN + STEP
        else:
            assert free * MB < MARGIN or pressure >= STALL
        changed, quiet_since = now, now


@given(
    total=st.integers(0, 4000),
    current=st.integers(100, 2000),
    block=st.integers(1, 64 * MB),
    noise=st.lists(st.floats(-4, 4), min_size=1, max_size=20),
)
def test_on_a_steady_machine_one_change_is_enough(total, current, block, noise):
    model = Model(current, block)
    model.live(200, lambda now: total + noise[int(now * 2) % len(noise)])
    # A growth is never undone. A first shrink may land just where blocks or noise ask for one more.
    directions = [after > before for _, before, after in model.resized]
    assert directions in ([], [True], [False], [False, False], [True, True])
    assert model.current == SMALLEST or total - model.current / MB >= MARGIN / MB - 4


@given(free=st.integers(-500, 4000), pressure=st.floats(0, 100), current=st.integers(100, 2000))
def test_readings_that_never_change_never_make_it_flap(free, pressure, current):
    # As if freeing blocks freed nothing, and reading them took nothing.
    decider, now, current, directions = policy(), 0.0, current * MB, set()
    for _ in range(600):
        target = decider.decide(now, reading(free, pressure), current)
        if target is not None:
            directions.add(target > current)
            current = target
        now += 0.5
    assert len(directions) <= 1


def test_it_shrinks_at_once_and_grows_after_a_quiet_time():
    model = Model(1000)
    model.live(5, lambda now: 1500)
    assert model.resized == []
    model.live(5, lambda now: 900)
    ((when, _, after),) = model.resized
    assert when == 5 and after == 900 - MARGIN / MB - STEP / MB
    model.live(QUIET, lambda now: 1500)
    assert len(model.resized) == 1
    model.live(1, lambda now: 1500)
    when, _, after = model.resized[-1]
    assert 10 + QUIET <= when <= 11 + QUIET and 1260 < after < 1300


def test_a_gap_shorter_than_the_quiet_time_is_not_used():
    model = Model(500)
    model.live(300, lambda now: 1400 if now % 15 < 9 else 710)
    assert model.resized == []


def test_it_grows_into_the_least_of_the_quiet_time_only():
    model = Model(300)
    model.live(12, lambda now: 1000 if 3 <= now < 4 else 2000)
    ((_, _, after),) = model.resized
    assert after == 1000 - MARGIN / MB - STEP / MB


def test_small_gains_are_left_alone_but_the_last_blocks_are_not():
    model = Model(1000)
    model.live(60, lambda now: 1000 + MARGIN / MB + 39)  # two steps of 2 % of what fits are 40
    assert model.resized == []
    model = Model(LARGEST / MB - 1)
    model.live(60, lambda now: 3000)
    assert model.current == LARGEST and len(model.resized) == 1


def test_blocks_that_do_not_fit_are_not_asked_for_again_and_again():
    model = Model(1000, block=500 * MB)
    model.live(120, lambda now: 1600)
    assert [(before, after) for _, before, after in model.resized] == [(1000, 1000)]


def test_a_neighbour_that_comes_and_goes_makes_growing_rarer():
    model = Model(500)
    model.live(600, lambda now: 750 if now % 40 < 15 else 1400)
    grown = [when for when, before, after in model.resized if after > before]
    assert len(grown) <= 3 < 600 / 40


def test_patience_comes_back_and_has_an_end():
    decider = policy()
    for _ in range(20):
        decider.failed()
    assert decider._patience == MAX_PATIENCE * QUIET
    model = Model(500)
    model.policy = decider
    model.live(400, lambda now: 1400)
    model.live(5, lambda now: 900)
    assert decider._patience == QUIET


def test_an_alarm_shrinks_in_steps_while_it_lasts_and_not_while_it_fades():
    model = Model(1600)
    model.live(10, lambda now: 3000, lambda now: 20.0)
    assert [when for when, _, _ in model.resized] == [0, 3, 6, 9]
    assert all(0.8 * before < after < 0.9 * before for _, before, after in model.resized)
    model.live(7, lambda now: 3000, lambda now: 20.0 * 0.82 ** ((now - 9) // 2 + 1))
    assert len(model.resized) == 4
    # Until the waiting has nearly ended there is no growth; then it takes the quiet time.
    model.live(30, lambda now: 3000, lambda now: STALL / 2)
    assert len(model.resized) == 4
    model.live(11, lambda now: 3000, lambda now: 1.0)
    assert model.current == LARGEST


def test_an_alarm_that_rises_again_counts():
    model = Model(1600)
    pressures = [20] * 4 + [15] * 4 + [12] * 4 + [16] * 4 + [12] * 8
    model.live(12, lambda now: 3000, lambda now: pressures[int(now * 2)])
    assert [when for when, _, _ in model.resized] == [0, 6, 11]  # at once where it rises, then where it stays


def test_below_the_smallest_it_stays_the_smallest():
    model = Model(300)
    model.live(30, lambda now: 150)
    assert [after for _, _, after in model.resized] == [SMALLEST / MB] and model.policy.short
    model.live(1, lambda now: 1000)
    assert not model.policy.short


def test_a_shrink_that_failed_is_due_again_at_once():
    decider = policy()
    first = decider.decide(0, reading(50), 1000 * MB)
    decider.failed()
    assert decider.decide(0.5, reading(50), 1000 * MB) == first


@given(free=st.integers(250, 4000))
def test_a_model_that_starts_with_the_first_budget_stays(free):
    start = first_budget(reading(free), MARGIN)
    model = Model(min(max(start, SMALLEST), LARGEST) / MB)
    if start >= SMALLEST:
        model.live(60, lambda now: free)
        assert model.resized == []


@pytest.mark.parametrize("total, margin", [(256, 64), (1024, 64), (8000, 500), (24 * 1024, 1536), (512 * 1024, 2048)])
def test_the_margin_grows_with_the_machine_within_bounds(total, margin):
    assert default_margin(Memory(0, total * MB, "")) == margin * MB
