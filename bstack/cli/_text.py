"""Numbers, texts and tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bstack.errors import printable
from bstk import MB

_TITLES = {
    "file_bytes": "file",
    "memory_bytes": "in memory",
    "blocks": "blocks",
    "bits_per_weight": "bits/weight",
    "kld": "KLD",
    "kld_se": "KLD se",
}


def megabytes(size: int) -> str:
    """Return a size in MB (2**20 bytes) with at least three digits, a tiny one in bytes."""
    if size < MB // 10:
        return f"{size:,} bytes"
    return f"{size / MB:,.{3 if size < 10 * MB else 2}f} MB"


def duration(seconds: float) -> str:
    """Return a time in minutes and seconds, from an hour on in hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def number(value: object, digits: int = 4) -> str:
    """Return a number with few digits, "-" for None, anything else as text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return printable(value)


def rounded(value: float) -> str:
    """Return a number to two digits, without an exponent.

    >>> rounded(112.3), rounded(7.68), rounded(45678)
    ('110', '7.7', '46,000')
    """
    return f"{float(f'{value:.2g}'):,.10g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (), indent: str = "  ") -> str:
    """Return aligned columns under a head; those in `left` are aligned to the left, the others to the right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        indent
        + "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def fields(pairs: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """Return one line for each (name, value), with aligned values."""
    width = max(len(what) for what, _ in pairs)
    return "\n".join(f"{indent}{what.ljust(width)}  {value}" for what, value in pairs)


def original_fields(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the original takes, as (what, value): in its own precision, and as it was stored if it was quantised.

    The metadata of a file of an older version has ``original_bytes`` at most.
    """
    keys = ("original_bytes", "original_dtype_bytes", "source_quantisation")
    stored, size, quantisation = (model.get(key) for key in keys)
    if not isinstance(stored, int):
        return []
    if not isinstance(size, int):
        return [("original", f"{megabytes(stored)} of weight files")]
    text = f"{megabytes(size)} as {printable(model.get('original_dtype'))}"
    if quantisation is None:
        return [("original", text)]
    return [
        ("original", f"{text} (source: {megabytes(stored)}, {printable(quantisation)})"),
        ("", f"above {megabytes(stored)} the source file itself is the better choice: it is exact"),
    ]


def curve_table(points: list[dict[str, Any]], *, cut: int | None = None, here: int | None = None) -> str:
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
    return megabytes(value) if key in ("file_bytes", "memory_bytes") and isinstance(value, int) else number(value)
