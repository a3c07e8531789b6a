"""What this machine can hold of a model behind a URL, said before it is fetched."""

from __future__ import annotations

import math

import bstk
from bstack.cli._text import curve, megabytes, number
from bstack.errors import printable


def forecast(reader: bstk.Reader, budget: int | None) -> str:
    """Return a line on the cut of a file within a budget in bytes: its size, quality and speed, and what is to be fetched."""
    from bstack.engine.url_cache import kept_path
    from bstack.packed.speed import expected_speed

    cut = reader.fit(budget=budget)
    whole = cut.chunks == len(reader.chunks)
    words = [
        f"all {megabytes(cut.file_bytes)}" if whole else f"{megabytes(cut.file_bytes)} of {megabytes(reader.length)}"
    ]
    if (kld := divergence_at(reader, cut.file_bytes)) is not None:
        words.append(f"KLD about {number(kld, 2)}")
    if speed := expected_speed(reader, cut):
        words.append(f"about {number(speed, 2)} tokens/s or less")
    kept = kept_path(reader.root)
    there = min(kept.stat().st_size, cut.file_bytes) if kept.is_file() else 0
    fetched = (
        "Nothing is left to fetch." if there == cut.file_bytes else f"Fetching {megabytes(cut.file_bytes - there)}."
    )
    return f"{printable(reader.source.name)}: {', '.join(words)}. {fetched}"


def divergence_at(reader: bstk.Reader, size: int) -> float | None:
    """Return the divergence of a cut of `size` bytes, on a straight line in its logarithm between measured sizes, or None."""
    points = [(p["file_bytes"], p.get("kld")) for p in curve(reader.metadata)]
    known = [(length, kld) for length, kld in points if isinstance(kld, (int, float)) and 0 < kld < math.inf]
    below = [point for point in known if point[0] <= size]
    above = [point for point in known if point[0] >= size]
    if not below or not above:
        return None
    (low, first), (high, last) = below[-1], above[0]
    part = (size - low) / (high - low) if high > low else 0.0
    return float(first ** (1 - part) * last**part)
