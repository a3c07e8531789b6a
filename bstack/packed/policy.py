"""When a running model should shrink or grow: decisions from readings alone, no clock and no thread (docs/running.md)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from bstack.memory.free import Memory

__all__ = ["QUIET", "SHARE", "STALL", "STEP", "Policy", "default_margin", "first_budget"]

MB = 2**20
# The share of all memory that is left alone: the cache of a longer dialogue, other programs, the system's own needs. Not
# less than what a burst of a small program takes, nor more than a large machine misses.
MARGIN_SHARE, LEAST_MARGIN, LARGEST_MARGIN = 16, 64 * MB, 2048 * MB
# Seconds without need before the model grows. A growth that is soon undone doubles them, up to so many times.
QUIET, MOST_PATIENCE = 10.0, 16
# A shrink within so many quiet times of a growth undoes it.
SOON = 6
# The least change that is worth reading blocks for: so many bytes, and this share of what fits.
STEP, SHARE = 16 * MB, 0.02
# Percent of time spent waiting for memory that is an alarm, and seconds until it counts as another one: the kernel's average
# moves every 2 seconds.
STALL, STALL_PERIOD = 10.0, 3.0
# What an alarm costs: it tells that memory is short, not how much.
ALARM_SHARE = 1 / 8


def default_margin(memory: Memory) -> int:
    """Bytes to leave free: a sixteenth of all there are, at least 64 MB and at most 2048 MB."""
    return min(max(memory.total // MARGIN_SHARE, LEAST_MARGIN), LARGEST_MARGIN)


def first_budget(memory: Memory, margin: int, step: int = STEP) -> int:
    """Bytes for a model that is about to be loaded: what is free but the margin, and one step for the policy to start calmly.

    May be less than the smallest model, or negative.
    """
    fits = memory.free - margin
    return fits - max(step, int(SHARE * fits))


@dataclass
class Policy:
    """Decide the budget of a running model, reading by reading.

    What fits is what the blocks take now, plus what is free, minus the margin. It stays the same when the model is resized, so
    a resize is no reason for another one. One step is kept free beyond the margin after each change: the model shrinks when
    less than the margin is free, and grows when two steps more than the margin have been free for the whole quiet time.

    Parameters
    ----------
    smallest, largest : int
        Bounds of the budget in bytes.
    margin : int
        Bytes to leave free.
    quiet : float
        Seconds without need before growing.
    step : int
        Bytes of the least worthwhile growth; at least `SHARE` of what fits.

    Attributes
    ----------
    short : bool
        Whether at the last reading not even the smallest budget left the margin free.
    """

    smallest: int
    largest: int
    margin: int
    quiet: float = QUIET
    step: int = STEP
    short: bool = field(default=False, init=False)
    _patience: float = field(init=False)
    _seen: deque[tuple[float, int]] = field(default_factory=deque, init=False)  # time, what fitted then
    _asked: int = field(default=0, init=False)  # blocks come whole, so the model may hold less than it was given
    _grown: float = field(default=float("-inf"), init=False)
    # Time of the last alarm, the least pressure since, and when that was first read.
    _alarm: tuple[float, float, float] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._patience = self.quiet

    def decide(self, now: float, memory: Memory, current: int) -> int | None:
        """Say what the budget should become.

        Parameters
        ----------
        now : float
            Seconds on a clock that never goes back.
        memory : Memory
            What the system says now.
        current : int
            Bytes of the budget that gives what is resident now, between `smallest` and `largest`.

        Returns
        -------
        int or None
            Bytes; None to leave the model as it is.
        """
        fits = current + memory.free - self.margin
        step = max(self.step, int(SHARE * fits))
        self.short = fits < self.smallest
        alarm = self._is_alarm(now, memory.pressure or 0.0)
        if alarm or memory.free < self.margin:
            self._seen.clear()
            wanted = min(fits, int(current * (1 - ALARM_SHARE))) if alarm else fits
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
        """Take note that the last decision could not be carried out."""
        self._back_off()
        self._seen.clear()
        self._asked = 0

    def _back_off(self) -> None:
        self._patience = min(2 * self._patience, MOST_PATIENCE * self.quiet)

    def _growth(self, now: float, fits: int, current: int, step: int) -> int | None:
        self._seen.append((now, fits))
        if self._seen[0][0] > now - self._patience:
            return None
        while len(self._seen) > 1 and self._seen[1][0] <= now - self._patience:
            self._seen.popleft()
        target = min(min(fitted for _, fitted in self._seen), self.largest)
        gain = target - max(current, self._asked)
        # The last blocks of a model may be less than a step; they come once.
        if gain < step and not (gain > 0 and target == self.largest):
            return None
        self._seen.clear()
        self._asked, self._grown = target, now
        return target

    def _is_alarm(self, now: float, pressure: float) -> bool:
        """Whether tasks wait too long; not again while the average of an earlier wait only fades."""
        if pressure < STALL:
            self._alarm = None
            return False
        if self._alarm is not None:
            last, least, since = self._alarm
            if pressure < least:
                self._alarm = (last, pressure, now)
                return False
            if now - (last if pressure > least else since) < STALL_PERIOD:
                return False
        self._alarm = (now, pressure, now)
        return True
