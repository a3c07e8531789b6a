"""Resize a model while it runs: to what the machine has free, or to what a function says (docs/guide.md)."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from math import inf
from typing import Any, Self

import bstk
from bstack.errors import one_line
from bstack.memory.free import Memory, free_memory
from bstack.packed.policy import QUIET, STEP, Policy, default_margin, first_budget
from bstack.packed.store import BlockStore, store_of
from bstk.errors import UsageError

__all__ = ["BudgetPoller", "MemoryPoller", "Poller", "following", "free_budget"]

# Seconds between two polls.
INTERVAL = 0.5
# Seconds until a budget that a function still asks for is tried again after a failure.
RETRY = 10.0


def warn_runtime(message: str) -> None:
    """Give a RuntimeWarning."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def free_budget() -> tuple[int | None, str]:
    """Return the bytes that a model may take now, and the reason in words; None where the system does not tell.

    The bytes may be fewer than the base model takes, or negative.
    """
    memory = free_memory()
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
        Called twice a second; returns a budget in MB, as `bstack.resize` takes one. By default the memory of the machine
        is watched (docs/guide.md).
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
        smallest=store.file.smallest.budget,
        largest=store.file.fit(None).budget,
        interval=INTERVAL,
        warn=warn,
    )


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
        self._thread = threading.Thread(target=self._run, name="bstack-watcher", daemon=True)
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
        except Exception:  # the warning fails: a closed stderr, warnings as errors, a user's function
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
            self._warn_once(
                one_line(failure), f"The model could not grow: {one_line(failure)}. It is tried again later."
            )
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
                "This system does not tell how much memory is free, so the model cannot follow it. Give a fixed budget, "
                "such as 500 MB."
            )
        super().__init__(interval, warn)
        self._resize, self._current, self._growth_failure, self._read = resize, current, failure, read
        self._policy = Policy(
            smallest, largest, default_margin(memory) if margin is None else margin, quiet=quiet, step=step
        )

    def poll(self, now: float) -> None:
        if (failure := self._new_failure(self._growth_failure())) is not None:
            self._failed("grow", f"The model could not grow: {one_line(failure)}. It is tried again later.")
        try:
            memory = self._read()
            if memory is None:
                return
            target = self._policy.decide(now, memory, self._current())
        except Exception as error:
            self._failed(
                "watch", f"Memory cannot be watched: {one_line(error)}. The model keeps its size until it can."
            )
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
