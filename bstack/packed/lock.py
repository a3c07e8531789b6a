"""One at a time at the blocks of a model, and nobody waits long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Gate"]

# How long a product steps back for one who is waiting: a thread that is woken needs some tens of microseconds.
STEP_BACK = 0.0002


class Gate:
    """A lock that products hold while they read blocks, thousands of times a second, and who drops blocks takes once.

    A plain lock may be taken again and again by the thread that just let it go. So who is in a hurry says so, and products
    step back. Products write ``with gate.lock:`` after `step_back`, which no interrupt leaves locked.

    Attributes
    ----------
    lock : threading.Lock
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._hurry = 0

    def step_back(self) -> threading.Lock:
        """Let one in a hurry go first; return the lock."""
        while self._hurry:
            time.sleep(STEP_BACK)
        return self.lock

    @contextmanager
    def first(self) -> Iterator[None]:
        """Hold the lock before the next product does."""
        self._hurry += 1  # callers take turns: see BlockStore.resize
        try:
            with self.lock:
                yield
        finally:
            self._hurry -= 1
