"""Sort the blocks of all linears into one universal stack."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

__all__ = ["by_gain_per_byte", "by_level"]


def by_gain_per_byte(
    gains: Mapping[str, Sequence[float]], sizes: Mapping[str, Sequence[int]]
) -> list[tuple[str, int, float]]:
    """Take the best gain per byte first, levels of different linears interleaved.

    The one constraint is that block i of a linear comes before block i + 1. A weak block in front of a strong one
    is therefore scored together with it: a block's score is the best mean gain per byte of any run of blocks that
    starts with it.

    Parameters
    ----------
    gains : mapping of str to sequence of float
        By linear: the gain of each block.
    sizes : mapping of str to sequence of int
        By linear: the bytes of each block, positive.

    Returns
    -------
    list of (str, int, float)
        Linear, level within the given sequences, score; ties go to the linear that comes first in `gains`.
    """
    heap: list[tuple[float, int, str, int]] = []
    for position, name in enumerate(gains):
        if gains[name]:
            heapq.heappush(heap, (-_best_rate(gains[name], sizes[name], 0), position, name, 0))
    order = []
    while heap:
        negative, position, name, level = heapq.heappop(heap)
        order.append((name, level, -negative))
        if level + 1 < len(gains[name]):
            rate = _best_rate(gains[name], sizes[name], level + 1)
            heapq.heappush(heap, (-rate, position, name, level + 1))
    return order


def _best_rate(gains: Sequence[float], sizes: Sequence[int], start: int) -> float:
    best, gain, size = float("-inf"), 0.0, 0
    for level in range(start, len(gains)):
        gain += gains[level]
        size += sizes[level]
        best = max(best, gain / size)
    return best


def by_level(scores: Mapping[str, Sequence[float]]) -> list[tuple[str, int, float]]:
    """The order of the BitStack paper: level by level, inside a level the highest score first.

    Parameters
    ----------
    scores : mapping of str to sequence of float
        By linear: the score of each block.

    Returns
    -------
    list of (str, int, float)
        Linear, level within the given sequences, score; ties go to the linear that comes first in `scores`.
    """
    blocks = [
        (level, -score, position, name)
        for position, (name, levels) in enumerate(scores.items())
        for level, score in enumerate(levels)
    ]
    return [(name, level, -negative) for level, negative, _, name in sorted(blocks)]
