"""Where matrices are encoded: threads of this process; `bstack.compression.cluster` has the other place."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from bstack.kernels.native import processors

__all__ = ["Pending", "Threads", "Workers"]

# Each matrix in work holds several copies of its Hessian; those of a wide one (0.8 GB each at 14336) leave no room for
# another matrix.
MOST_AT_ONCE = 4
WIDE = 8192


class Pending(Protocol):
    """A matrix in work."""

    def result(self) -> Any:
        """Wait for what the function returns, or raise what it raises."""

    def cancel(self) -> Any:
        """It is not needed any more."""


class Workers(Protocol):
    """Something that encodes matrices side by side, with the same result wherever it does."""

    def beside(self, inputs: int) -> int:
        """How many other matrices may be in work beside one with so many inputs."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Pending:
        """Have a function of a module called with these arguments, now or later."""


class Threads:
    """Threads of this process, as many as it may use processors, up to four; a context manager.

    The search kernel is single-threaded and lets go of Python's lock, so matrices side by side keep processors busy.
    """

    def __init__(self) -> None:
        self._count = min(processors(), MOST_AT_ONCE)
        self._pool = ThreadPoolExecutor(self._count)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def beside(self, inputs: int) -> int:
        return 0 if inputs > WIDE else self._count - 1

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Pending:
        return self._pool.submit(function, *arguments)
