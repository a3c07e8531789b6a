"""Encode matrices in threads of this process; `bstack.compression.cluster` does it on other machines."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from bstack.kernels.native import processors

__all__ = ["Pending", "Threads", "Workers"]

# A pending matrix holds several copies of its hessian, of 0.8 GB each at 14336 inputs, so wide ones are encoded one by one.
MAX_THREADS = 4
WIDE = 8192


class Pending(Protocol):
    """A matrix that is being encoded."""

    def result(self) -> Any:
        """Wait for the function, and return or raise what it does."""

    def cancel(self) -> Any:
        """Drop a matrix that is not needed any more."""


class Workers(Protocol):
    """Encode several matrices at a time, with the same result everywhere."""

    def max_pending(self, inputs: int) -> int:
        """Return how many matrices may be pending at a time, one with so many inputs among them."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Pending:
        """Call a function of a module with these arguments, now or later."""


class Threads:
    """Threads of this process, one a processor and at most four; a context manager.

    The search kernel has one thread and releases Python's lock, so several matrices keep the processors busy.
    """

    def __init__(self) -> None:
        self._count = min(processors(), MAX_THREADS)
        self._pool = ThreadPoolExecutor(self._count)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def max_pending(self, inputs: int) -> int:
        return 1 if inputs > WIDE else self._count

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Pending:
        return self._pool.submit(function, *arguments)
