"""The lock between products that read blocks and the store that drops them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["RECORDING", "PriorityLock"]

#: Held while a CUDA graph is recorded or torch's memory goes back to the driver; torch does one of it at a time.
RECORDING = threading.Lock()

# Seconds that others wait between two looks at whether an urgent caller is waiting; waking a thread takes some 50 us.
PAUSE = 0.0002


class PriorityLock:
    """A lock that products hold while they read blocks, thousands of times a second, and dropping blocks takes once.

    The thread that releases a plain lock may take it again and again before a waiting one does, so an urgent caller
    announces itself and the others wait for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._urgent = 0

    def acquire(self) -> threading.Lock:
        """Wait for urgent callers, then return the lock for a `with` statement, which no interrupt leaves locked."""
        while self._urgent:
            time.sleep(PAUSE)
        return self._lock

    @contextmanager
    def acquire_urgent(self) -> Iterator[None]:
        """Hold the lock for a `with` block, before the next product does. One caller at a time."""
        self._urgent += 1
        try:
            with self._lock:
                yield
        finally:
            self._urgent -= 1
