"""How much memory this process holds, now and at its peak."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

__all__ = ["peak_bytes", "resident_bytes"]

STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Return the bytes of memory that this process holds now (its resident set)."""
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """Return the most bytes of memory that this process has held so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    try:
        # getrusage counts the parent that this process was forked from.
        return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
