"""How long work reports its progress: the types, and the default that shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["ByteProgress", "Progress", "no_progress"]

# A stage's name and number of steps -> a context whose value is called after each step.
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
# A stage's name and number of bytes -> a context whose value is called with the bytes of each piece.
ByteProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_progress(_stage: str, _steps: int) -> Iterator[Callable[..., None]]:
    """Show nothing."""
    yield lambda _count=1: None
