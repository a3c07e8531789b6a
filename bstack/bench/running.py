"""A model as it runs: how long it takes to load, what it holds in memory, how fast it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Running", "measure_running"]


@dataclass(frozen=True)
class Running:
    """What was found in a process of its own.

    Attributes
    ----------
    load_seconds : float or None
        To a model that can run; without the imports of Python packages. None when it was read in another way than its
        user would.
    start_memory_bytes : int or None
        Resident memory of the process before, Python packages imported. None where the system does not tell.
    held_memory_bytes : int or None
        By how much it grew with loading.
    peak_memory_bytes : int or None
        By how much it grew at most, with loading and the speed test.
    speed : dict or None
        `bstack.bench.speed.Speed` as plain values.
    """

    load_seconds: float | None
    start_memory_bytes: int | None
    held_memory_bytes: int | None
    peak_memory_bytes: int | None
    speed: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def measure_running(load: Callable[[], Any], *, speed: bool, progress: Callable[[], None] = lambda: None) -> Running:
    """Load a model and run it; in a process that has imported everything and held no model before.

    Parameters
    ----------
    load : callable
        Returns a transformers model.
    speed : bool
        Whether to time it.
    progress : callable
        Called after each repetition of the speed test.
    """
    from bstack.bench.speed import measure_speed
    from bstack.memory.process import peak_bytes, resident_bytes

    before = resident_bytes()
    started = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - started
    after = resident_bytes()
    found = measure_speed(model, progress) if speed else None
    return Running(
        seconds,
        before,
        _growth(before, after),
        _growth(before, peak_bytes()),
        None
        if found is None
        else {**found._asdict(), "prompt": found.prompt._asdict(), "decode": found.decode._asdict()},
    )


def _growth(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, after - before)
