"""How much of the machine's memory a running model leaves alone; what there is, is in bstack.memory."""

from __future__ import annotations

from bstack.memory.free import Memory, free_memory
from bstack.memory.process import resident_bytes

__all__ = ["Memory", "default_margin", "free_memory", "resident_bytes"]

MB = 2**20
# The share of all memory that is left alone: the cache of a longer dialogue, other programs, the system's own needs. Not
# less than what a burst of a small program takes, nor more than a large machine misses.
MARGIN_SHARE, LEAST_MARGIN, LARGEST_MARGIN = 16, 64 * MB, 2048 * MB


def default_margin(memory: Memory) -> int:
    """Bytes to leave free: a sixteenth of all there are, at least 64 MB and at most 2048 MB."""
    return min(max(memory.total // MARGIN_SHARE, LEAST_MARGIN), LARGEST_MARGIN)
