"""The quality curve that a container carries: what was measured at some sizes when it was made."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["curve", "divergence_at"]


def curve(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measured points, smallest file first; points without a size are left out."""
    points = metadata.get("quality")
    if not isinstance(points, list):
        return []
    sized = [point for point in points if isinstance(point, dict) and isinstance(point.get("file_bytes"), int)]
    return sorted(sized, key=lambda point: point["file_bytes"])


def divergence_at(metadata: dict[str, Any], size: int) -> float | None:
    """Return the divergence of a cut of `size` bytes, on a straight line in its logarithm between measured sizes, or None."""
    points = [(point["file_bytes"], point.get("kld")) for point in curve(metadata)]
    known = [(length, kld) for length, kld in points if isinstance(kld, (int, float)) and 0 < kld < math.inf]
    below = [point for point in known if point[0] <= size]
    above = [point for point in known if point[0] >= size]
    if not below or not above:
        return None
    (low, first), (high, last) = below[-1], above[0]
    part = (size - low) / (high - low) if high > low else 0.0
    return float(first ** (1 - part) * last**part)
