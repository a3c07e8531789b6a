"""A thread that looks after something at intervals and says each trouble once."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from bstack.errors import one_line

__all__ = ["INTERVAL", "Repeating", "warn"]

# Seconds between two looks.
INTERVAL = 0.5


def warn(message: str) -> None:
    """Say it as a RuntimeWarning."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


class Repeating(ABC):
    """Calls `look` in a thread of its own, again and again, for the length of a `with` block.

    Parameters
    ----------
    interval : float
        Seconds between two calls.
    tell : callable
        Receives each warning, one line, in that thread.
    """

    def __init__(self, interval: float, tell: Callable[[str], None]):
        self._interval, self._tell = interval, tell
        self._told: set[str] = set()
        self._failure: BaseException | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run, name="bstack-watcher", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the thread; waits for what it is doing, so that the model can be closed afterwards."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self.look(time.monotonic())
            except Exception as error:  # the thread has to go on, whatever a look meets
                self._trouble(error)

    def _trouble(self, error: Exception) -> None:
        try:
            self._say(one_line(error), f"The model keeps its size: {one_line(error)}")
        except Exception:  # telling is what fails: a closed stderr, warnings as errors, a user's function
            with suppress(Exception):
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    @abstractmethod
    def look(self, now: float) -> None:
        """What is done at each interval. What it raises is said, once, and the thread goes on.

        Parameters
        ----------
        now : float
            Seconds on a clock that never goes back.
        """

    def _new_failure(self, failure: BaseException | None) -> BaseException | None:
        """A failure that was not there at the last look, or None."""
        last, self._failure = self._failure, failure
        return None if failure is last else failure

    def _say(self, key: str, message: str) -> None:
        """Warn, once for each key."""
        if key not in self._told:
            self._told.add(key)
            self._tell(message)
