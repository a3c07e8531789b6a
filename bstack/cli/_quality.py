"""The quality curve that compression may have stored in the metadata, as a table."""

from __future__ import annotations

from typing import Any

from bstack.cli._text import megabytes, number, table

_TITLES = {
    "file_bytes": "file",
    "memory_bytes": "in memory",
    "blocks": "blocks",
    "bits_per_weight": "bits/weight",
    "kld": "KLD",
}
_SIZES = ("file_bytes", "memory_bytes")


def curve(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measured points, smallest file first; points without a size are left out."""
    points = metadata.get("quality")
    if not isinstance(points, list):
        return []
    sized = [point for point in points if isinstance(point, dict) and isinstance(point.get("file_bytes"), int)]
    return sorted(sized, key=lambda point: point["file_bytes"])


def render(points: list[dict[str, Any]], *, cut: int | None = None, here: int | None = None) -> str:
    """Return the curve as a table: > at the largest file of at most `cut` bytes, - at every file of more than `here`."""
    # The known columns in their order, then what else was measured.
    present = dict.fromkeys(key for point in points for key in point)
    columns = [key for key in dict.fromkeys([*_TITLES, *present]) if key in present and _is_plain(points, key)]
    chosen = max((p["file_bytes"] for p in points if cut is not None and p["file_bytes"] <= cut), default=None)

    def mark(size: int) -> str:
        return ">" if size == chosen else "-" if here is not None and size > here else ""

    head = ["", *[_TITLES.get(key, key.replace("_", " ")) for key in columns]]
    rows = [[mark(point["file_bytes"]), *[_cell(key, point.get(key)) for key in columns]] for point in points]
    return table(head, rows, indent="")


def _is_plain(points: list[dict[str, Any]], key: str) -> bool:
    return all(not isinstance(point.get(key), (dict, list)) for point in points)


def _cell(key: str, value: Any) -> str:
    return megabytes(value) if key in _SIZES and isinstance(value, int) else number(value)
