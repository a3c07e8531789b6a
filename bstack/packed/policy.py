"""Decide when a running model shrinks or grows, from readings of memory, without a clock or a thread (docs/guide.md)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from bstack.memory.free import Memory

__all__ = ["Policy", "default_margin", "first_budget"]

MB = 2**20
# One part in 16 of all memory is left free for the cache of a longer dialogue, other programs and the system: at least what a
# burst of a small program takes, at most what a large machine misses.
MARGIN_PARTS, MIN_MARGIN, MAX_MARGIN = 16, 64 * MB, 2048 * MB
# Seconds without need before the model grows. A growth that is soon undone doubles them, up to this factor.
QUIET, MAX_PATIENCE = 10.0, 16
# A shrink within this many quiet times of a growth undoes it.
SOON = 6
# The smallest change that is worth reading blocks for: bytes, and a fraction of what fits.
STEP, STEP_FRACTION = 16 * MB, 0.02
# Percent of time spent waiting for memory that is an alarm, and seconds until it counts as another one: the kernel's average
# moves every 2 seconds.
STALL, STALL_PERIOD = 10.0, 3.0
# Fraction that an alarm takes from the model: it tells that memory is short, not by how much.
ALARM_FRACTION = 1 / 8


def default_margin(memory: Memory) -> int:
    """Return the bytes to leave free: a sixteenth of all, at least 64 MB and at most 2048 MB."""
    return min(max(memory.total // MARGIN_PARTS, MIN_MARGIN), MAX_MARGIN)


def first_budget(memory: Memory, margin: int, step: int = STEP) -> int:
    """Return the bytes for a model that is about to be loaded: what is free less the margin and one step.

    With the step free, the policy does not shrink the model at once. May be less than the base model takes, or negative.
    """
    fits = memory.free - margin
    return fits - max(step, int(STEP_FRACTION * fits))


@dataclass
class Policy:
    """Decide the budget of a running model, reading by reading.

    What fits is what the blocks take now, plus what is free, minus the margin. A resize does not change it, so no resize
    causes another one. One step is kept free beyond the margin after each change: the model shrinks when
    less than the margin is free, and grows when two steps more than the margin have been free for the whole quiet time.

    `smallest` and `largest` bound the budget, `margin` is to stay free, and `step` is the smallest worthwhile growth (at least
    `STEP_FRACTION` of what fits), all in bytes; `quiet` is in seconds. `short` says whether at the last reading not even the
    smallest budget left the margin free.
    """

    smallest: int
    largest: int
    margin: int
    quiet: float = QUIET
    step: int = STEP
    short: bool = field(default=False, init=False)
    _patience: float = field(init=False)
    _seen: deque[tuple[float, int]] = field(default_factory=deque, init=False)  # (time, what fitted then)
    # The last target: blocks come whole, so the model may hold less than its budget.
    _asked: int = field(default=0, init=False)
    _grown: float = field(default=float("-inf"), init=False)
    # Time of the last alarm, the minimum of the pressure since, and when that was first read.
    _alarm: tuple[float, float, float] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._patience = self.quiet

    def decide(self, now: float, memory: Memory, current: int) -> int | None:
        """Return what the budget should become, in bytes; None to leave the model as it is.

        `now` is in seconds on a clock that never goes back, and `current` is the budget that gives what is resident now.
        """
        fits = current + memory.free - self.margin
        step = max(self.step, int(STEP_FRACTION * fits))
        self.short = fits < self.smallest
        alarm = self._is_alarm(now, memory.pressure or 0.0)
        if alarm or memory.free < self.margin:
            self._seen.clear()
            wanted = min(fits, int(current * (1 - ALARM_FRACTION))) if alarm else fits
            target = min(max(wanted - step, self.smallest), self.largest)
            if target >= current:
                return None
            if now - self._grown < SOON * self.quiet:
                self._back_off()
                self._grown = float("-inf")
            elif self._grown > float("-inf"):
                self._patience = self.quiet
            self._asked = target
            return target
        if (memory.pressure or 0.0) >= STALL / 2:
            self._seen.clear()
            return None
        return self._growth(now, fits - step, current, step)

    def failed(self) -> None:
        """Note that the last decision could not be carried out."""
        self._back_off()
        self._seen.clear()
        self._asked = 0

    def _back_off(self) -> None:
        self._patience = min(2 * self._patience, MAX_PATIENCE * self.quiet)

    def _growth(self, now: float, fits: int, current: int, step: int) -> int | None:
        self._seen.append((now, fits))
        if self._seen[0][0] > now - self._patience:
            return None
        while len(self._seen) > 1 and self._seen[1][0] <= now - self._patience:
            self._seen.popleft()
        target = min(min(fitted for _, fitted in self._seen), self.largest)
        gain = target - max(current, self._asked)
        # The last blocks of a model may be less than a step.
        if gain < step and not (gain > 0 and target == self.largest):
            return None
        self._seen.clear()
        self._asked, self._grown = target, now
        return target

    def _is_alarm(self, now: float, pressure: float) -> bool:
        """Return whether tasks wait too long; not again while the average of an earlier wait only fades."""
        if pressure < STALL:
            self._alarm = None
            return False
        if self._alarm is not None:
            last, lowest, since = self._alarm
            if pressure < lowest:
                self._alarm = (last, pressure, now)
                return False
            if now - (last if pressure > lowest else since) < STALL_PERIOD:
                return False
        self._alarm = (now, pressure, now)
        return True
