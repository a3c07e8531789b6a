"""How long work reports its progress: one type, and the default that shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["Progress", "no_progress"]

# A stage's name and number of steps -> a context whose value is called after each step.
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


@contextmanager
def no_progress(_stage: str, _steps: int) -> Iterator[Callable[[], None]]:
    """Show nothing."""
    yield lambda: None
