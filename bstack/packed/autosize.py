"""Resize a model while it runs: to what the machine has free, or to what a function says (docs/guide.md)."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from math import inf
from typing import Any, Self

import bstk
from bstack.errors import one_line
from bstack.memory.free import Memory, free_memory
from bstack.packed.store import BlockStore, store_of
from bstk.errors import UsageError

__all__ = ["BudgetPoller", "MemoryPoller", "Policy", "Poller", "following", "free_budget"]

# Seconds between two polls.
INTERVAL = 0.5
# Seconds until a budget that a function still asks for is tried again after a failure.
RETRY = 10.0
# One part in 16 of all memory is left free for the cache of a longer dialogue, other programs and the system: at least what a
# burst of a small program takes, at most what a large machine misses.
MARGIN_PARTS, MIN_MARGIN, MAX_MARGIN = 16, 64 * bstk.MB, 2048 * bstk.MB
# Seconds without need before the model grows. A growth that is soon undone doubles them, up to this factor.
QUIET, MAX_PATIENCE = 10.0, 16
# A shrink within this many quiet times of a growth undoes it.
SOON = 6
# The smallest change that is worth reading blocks for: bytes, and a fraction of what fits.
STEP, STEP_FRACTION = 16 * bstk.MB, 0.02
# Percent of time spent waiting for memory that is an alarm, and seconds until it counts as another one: the kernel's average
# moves every 2 seconds.
STALL, STALL_PERIOD = 10.0, 3.0
# Fraction that an alarm takes from the model: it tells that memory is short, not by how much.
ALARM_FRACTION = 1 / 8


def warn_runtime(message: str) -> None:
    """Give a RuntimeWarning."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def free_budget(read: Callable[[], Memory | None] | None = None) -> tuple[int | None, str]:
    """Return the bytes that a model may take now, and the reason in words; None where the system does not tell.

    The bytes may be fewer than the base model takes, or negative. `read` tells what memory there is; by default it is the machine's.
    """
    memory = free_memory() if read is None else read()
    if memory is None:
        return None, "the system does not tell how much memory is free"
    margin = default_margin(memory)
    words = f"{memory.free / bstk.MB:,.0f} MB are free ({memory.source}), {margin / bstk.MB:,.0f} MB of them stay so"
    return first_budget(memory, margin), words


def following(
    model: Any,
    budget: Callable[[], int | float | str | Decimal | None] | None = None,
    *,
    warn: Callable[[str], None] = warn_runtime,
) -> Poller:
    """Resize a model while it runs, for the length of a `with` block, in a thread of its own.

    >>> with bstack.following(model):                  # doctest: +SKIP
    ...     model.generate(**inputs)                   # as large as the machine's memory allows
    >>> with bstack.following(model, lambda: my_mb):   # doctest: +SKIP
    ...     model.generate(**inputs)                   # as large as you say

    Parameters
    ----------
    model : transformers.PreTrainedModel
        From ``bstack.load(..., mode="packed")``.
    budget : callable, optional
        Called twice a second; returns a budget in MB, as `bstack.resize` takes one. By default the machine's memory
        decides (docs/guide.md).
    warn : callable
        Receives warnings, one line each; by default it gives a RuntimeWarning.

    Returns
    -------
    context manager

    Raises
    ------
    bstk.UsageError
        The model has dense weights, or no function is given and the system does not tell how much memory is free.
    """
    store = store_of(model)
    if budget is not None:
        return BudgetPoller(store, budget, interval=INTERVAL, warn=warn)
    return MemoryPoller(
        # Without waiting: the poller goes on watching while the model grows, and may change its mind.
        lambda target: store.resize(target, wait=False),
        # A budget counts the file's length where that is more than the blocks take, as the bounds do.
        lambda: store.budget,
        failure=lambda: store.failure,
        smallest=store.file.base.budget,
        largest=store.file.fit(None).budget,
        interval=INTERVAL,
        read=store.free_memory,
        warn=warn,
    )


def default_margin(memory: Memory) -> int:
    """Return the bytes to leave free: a sixteenth of all, at least 64 MB and at most 2048 MB."""
    return min(max(memory.total // MARGIN_PARTS, MIN_MARGIN), MAX_MARGIN)


def first_budget(memory: Memory, margin: int, step: int = STEP) -> int:
    """Return the bytes for a model that is about to be loaded: what is free less the margin and one step.

    With the step free, the policy does not shrink the model at once. May be less than the base model takes, or negative.
    """
    fits = memory.free - margin
    return fits - max(step, int(STEP_FRACTION * fits))


@dataclass
class Policy:
    """Decide the budget of a running model, reading by reading.

    What fits is what the blocks take now, plus what is free, minus the margin. A resize does not change it, so no resize
    causes another one. One step is kept free beyond the margin after each change: the model shrinks when
    less than the margin is free, and grows when two steps more than the margin have been free for the whole quiet time.

    `smallest` and `largest` bound the budget, `margin` is to stay free, and `step` is the smallest worthwhile growth (at least
    `STEP_FRACTION` of what fits), all in bytes; `quiet` is in seconds. `short` says whether at the last reading not even the
    smallest budget left the margin free.
    """

    smallest: int
    largest: int
    margin: int
    quiet: float = QUIET
    step: int = STEP
    short: bool = field(default=False, init=False)
    _patience: float = field(init=False)
    _seen: deque[tuple[float, int]] = field(default_factory=deque, init=False)  # (time, what fitted then)
    # The last target: blocks come whole, so the model may hold less than its budget.
    _asked: int = field(default=0, init=False)
    _grown: float = field(default=float("-inf"), init=False)
    # Time of the last alarm, the minimum of the pressure since, and when that was first read.
    _alarm: tuple[float, float, float] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._patience = self.quiet

    def decide(self, now: float, memory: Memory, current: int) -> int | None:
        """Return what the budget should become, in bytes; None to leave the model as it is.

        `now` is in seconds on a clock that never goes back, and `current` is the budget that gives what is resident now.
        """
        fits = current + memory.free - self.margin
        step = max(self.step, int(STEP_FRACTION * fits))
        self.short = fits < self.smallest
        alarm = self._is_alarm(now, memory.pressure or 0.0)
        if alarm or memory.free < self.margin:
            self._seen.clear()
            wanted = min(fits, int(current * (1 - ALARM_FRACTION))) if alarm else fits
            target = min(max(wanted - step, self.smallest), self.largest)
            if target >= current:
                return None
            if now - self._grown < SOON * self.quiet:
                self._back_off()
                self._grown = float("-inf")
            elif self._grown > float("-inf"):
                self._patience = self.quiet
            self._asked = target
            return target
        if (memory.pressure or 0.0) >= STALL / 2:
            self._seen.clear()
            return None
        return self._growth(now, fits - step, current, step)

    def failed(self) -> None:
        """Note that the last decision could not be carried out."""
        self._back_off()
        self._seen.clear()
        self._asked = 0

    def _back_off(self) -> None:
        self._patience = min(2 * self._patience, MAX_PATIENCE * self.quiet)

    def _growth(self, now: float, fits: int, current: int, step: int) -> int | None:
        self._seen.append((now, fits))
        if self._seen[0][0] > now - self._patience:
            return None
        while len(self._seen) > 1 and self._seen[1][0] <= now - self._patience:
            self._seen.popleft()
        target = min(min(fitted for _, fitted in self._seen), self.largest)
        gain = target - max(current, self._asked)
        # The last blocks of a model may be less than a step.
        if gain < step and not (gain > 0 and target == self.largest):
            return None
        self._seen.clear()
        self._asked, self._grown = target, now
        return target

    def _is_alarm(self, now: float, pressure: float) -> bool:
        """Return whether tasks wait too long; not again while the average of an earlier wait only fades."""
        if pressure < STALL:
            self._alarm = None
            return False
        if self._alarm is not None:
            last, lowest, since = self._alarm
            if pressure < lowest:
                self._alarm = (last, pressure, now)
                return False
            if now - (last if pressure > lowest else since) < STALL_PERIOD:
                return False
        self._alarm = (now, pressure, now)
        return True


class Poller(ABC):
    """Call `poll` in a thread of its own, again and again, for the length of a `with` block."""

    def __init__(self, interval: float, warn: Callable[[str], None]):
        self._interval, self._warn = interval, warn
        self._warned: set[str] = set()
        self._failure: BaseException | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def poll(self, now: float) -> None:
        """Do what is due at `now`, in seconds of a monotonic clock. An error becomes a warning, once."""

    def __enter__(self) -> Self:
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run, name="bstack-poller", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the thread after what it is doing, so that the model can be closed."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self.poll(time.monotonic())
            except Exception as error:  # the thread has to go on after any error
                self._report(error)

    def _report(self, error: Exception) -> None:
        try:
            self._warn_once(one_line(error), f"The model keeps its size: {one_line(error)}")
        except Exception:  # the warning itself can fail: a closed stderr, warnings as errors, a user's function
            with suppress(Exception):
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    def _new_failure(self, failure: BaseException | None) -> BaseException | None:
        """Return a failure that was not there at the last poll, or None."""
        last, self._failure = self._failure, failure
        return None if failure is last else failure

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            self._warn(message)


class BudgetPoller(Poller):
    """Give a model the size that a function returns, in MB."""

    def __init__(self, store: BlockStore, budget: Callable[[], Any], *, interval: float, warn: Callable[[str], None]):
        super().__init__(interval, warn)
        self._store, self._budget = store, budget
        self._last: Any = self  # no budget yet
        self._retry_at = inf

    def poll(self, now: float) -> None:
        if (failure := self._new_failure(self._store.failure)) is not None:
            self._retry_at = now + RETRY
            problem = one_line(failure)
            self._warn_once(problem, f"The model could not grow: {problem}. It is tried again later.")
        mb = self._budget()
        if mb != self._last or now >= self._retry_at:
            self._last, self._retry_at = mb, now + RETRY
            self._store.resize(None if mb is None else bstk.budget_bytes(mb), wait=False)
            self._retry_at = inf


class MemoryPoller(Poller):
    """Keep a model as large as the machine's memory allows; sizes are bytes, and times seconds.

    `resize` receives a budget between `smallest` and `largest`, in the poller's thread; a growth may go on after it has
    returned. `current` returns the budget that gives what is in memory now, and `failure` what stopped a growth, the same object
    until the next resize. `read` returns None where the system does not tell, which raises UsageError at the start.
    """

    def __init__(
        self,
        resize: Callable[[int], object],
        current: Callable[[], int],
        *,
        failure: Callable[[], BaseException | None] = lambda: None,
        smallest: int,
        largest: int,
        margin: int | None = None,
        quiet: float = QUIET,
        step: int = STEP,
        interval: float = INTERVAL,
        read: Callable[[], Memory | None] = free_memory,
        warn: Callable[[str], None] = warn_runtime,
    ):
        memory = read()
        if memory is None:
            raise UsageError(
                "This system does not tell how much memory is free, so the model cannot follow it.",
                hint="Give a fixed budget, such as 500 MB.",
            )
        super().__init__(interval, warn)
        self._resize, self._current, self._growth_failure, self._read = resize, current, failure, read
        margin = default_margin(memory) if margin is None else margin
        self._policy = Policy(smallest, largest, margin, quiet=quiet, step=step)

    def poll(self, now: float) -> None:
        if (failure := self._new_failure(self._growth_failure())) is not None:
            self._failed("grow", f"The model could not grow: {one_line(failure)}. It is tried again later.")
        try:
            memory = self._read()
            if memory is None:
                return
            target = self._policy.decide(now, memory, self._current())
        except Exception as error:
            problem = one_line(error)
            self._failed("read", f"The free memory cannot be read: {problem}. The model keeps its size until it can.")
            return
        if target is not None:
            try:
                self._resize(target)
            except Exception as error:
                size = f"{target / bstk.MB:,.2f} MB"
                self._failed("resize", f"The model cannot be resized to {size}: {one_line(error)}. It is tried again.")
        if self._policy.short:
            smallest, margin = self._policy.smallest / bstk.MB, self._policy.margin / bstk.MB
            self._warn_once(
                "short",
                f"Too little memory: {max(memory.free, 0) / bstk.MB:,.0f} MB are free of {memory.source}, and even the base "
                f"model, {smallest:,.2f} MB, does not leave the margin of {margin:,.0f} MB. It stays in use. End other programs.",
            )

    def _failed(self, key: str, message: str) -> None:
        self._policy.failed()
        self._warn_once(key, message)
