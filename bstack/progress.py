"""How long work reports what it takes and its progress: the types, and the default that shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

__all__ = ["ByteProgress", "Plan", "Progress", "no_progress"]

# A stage's name and number of steps -> a context whose value is called after each step.
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
# A stage's name and number of bytes -> a context whose value is called with the bytes of each piece.
ByteProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class Plan(NamedTuple):
    """What a compression will take: about so many bytes of memory at its peak, of those that the system has free; of a GPU's, too."""

    memory_bytes: int
    free_bytes: int | None  # with what this process holds already; None where the system does not say
    device_bytes: int | None = None  # None without a GPU
    device_free_bytes: int | None = None


@contextmanager
def no_progress(_stage: str, _steps: int) -> Iterator[Callable[..., None]]:
    """Show nothing."""
    yield lambda _count=1: None
