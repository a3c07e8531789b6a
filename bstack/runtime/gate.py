"""One at a time at the blocks of a model, and nobody waits long."""

from __future__ import annotations

import threading
from types import TracebackType

__all__ = ["Gate"]


class Gate:
    """A lock that is handed over in turn.

    Products hold it while they read blocks, thousands of times a second; who drops blocks takes it once. A plain lock may
    be taken again and again by the thread that just let it go; here a waiting thread stands in the doorway, and the
    other has to queue behind it.
    """

    def __init__(self) -> None:
        self._doorway = threading.Lock()
        self._room = threading.Lock()

    def __enter__(self) -> None:
        with self._doorway:
            self._room.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._room.release()
