"""A thread that watches the memory of the machine and resizes a running model."""

from __future__ import annotations

from collections.abc import Callable

from bstack.errors import one_line
from bstack.memory.free import Memory, free_memory
from bstack.packed.policy import QUIET, STEP, Policy, default_margin
from bstack.packed.poller import INTERVAL, Repeating, warn
from bstk.errors import UsageError

__all__ = ["Watcher"]

MB = 2**20


class Watcher(Repeating):
    """Keep a model as large as memory allows for the length of a `with` block.

    Parameters
    ----------
    resize : callable
        Receives a budget in bytes between `smallest` and `largest`. Called in the watcher's thread, never twice at once; what
        else uses the model must be kept out by the callable itself. A growth may go on after it has returned.
    weights : callable
        Returns the budget in bytes that gives what is resident now.
    failure : callable
        Returns what stopped a growth after `resize` had returned, the same object until the next resize; or None.
    smallest, largest : int
        Bounds of the budget in bytes.
    margin : int, optional
        Bytes to leave free; by default `default_margin` of what there is at the start.
    quiet : float
        Seconds without need before growing.
    step : int
        Bytes of the least worthwhile growth.
    interval : float
        Seconds between two readings; one takes about a millisecond.
    read : callable
        Returns a `Memory`, or None where the system does not tell.
    tell : callable
        Receives each warning, one line, in the watcher's thread; by default a RuntimeWarning. Each is given once: that not even
        the smallest model leaves the margin free, that resizing failed.

    Raises
    ------
    bstk.UsageError
        When the system does not tell how much memory is free.
    """

    def __init__(
        self,
        resize: Callable[[int], object],
        weights: Callable[[], int],
        *,
        failure: Callable[[], BaseException | None] = lambda: None,
        smallest: int,
        largest: int,
        margin: int | None = None,
        quiet: float = QUIET,
        step: int = STEP,
        interval: float = INTERVAL,
        read: Callable[[], Memory | None] = free_memory,
        tell: Callable[[str], None] = warn,
    ):
        memory = read()
        if memory is None:
            raise UsageError(
                "This system does not tell how much memory is free, so the model cannot follow it. Give a fixed size, "
                "such as --mb 500."
            )
        super().__init__(interval, tell)
        self._resize, self._weights, self._failure_now, self._read = resize, weights, failure, read
        self._policy = Policy(
            smallest, largest, default_margin(memory) if margin is None else margin, quiet=quiet, step=step
        )

    def look(self, now: float) -> None:
        """Read once and resize if that is due."""
        if (failure := self._new_failure(self._failure_now())) is not None:
            self._policy.failed()
            self._say("grow", f"The model could not grow: {one_line(failure)}. It is tried again later.")
        # The policy must know of what goes wrong.
        try:
            memory = self._read()
            if memory is None:
                return
            target = self._policy.decide(now, memory, self._weights())
        except Exception as error:
            self._policy.failed()
            self._say("watch", f"Memory cannot be watched: {one_line(error)}. The model keeps its size until it can.")
            return
        if target is not None:
            try:
                self._resize(target)
            except Exception as error:
                self._policy.failed()
                self._say(
                    "resize",
                    f"The model cannot be resized to {target / MB:,.2f} MB: {one_line(error)}. It is tried again.",
                )
        if self._policy.short:
            self._say(
                "short",
                f"Too little memory: {max(memory.free, 0) / MB:,.0f} MB are free of {memory.source}, and even the smallest model, "
                f"{self._policy.smallest / MB:,.2f} MB, does not leave the margin of {self._policy.margin / MB:,.0f} MB. "
                "It stays in use; end other programs.",
            )
