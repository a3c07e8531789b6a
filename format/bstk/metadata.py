"""The metadata: one JSON object, parsed strictly, written canonically."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from . import limits
from .errors import DamagedError, UsageError

# Strings are skipped whole, so that their characters do not count. Possessive, so that a long string needs no backtracking
# memory. A string without an end takes the rest, because otherwise each of its quotes would be tried in turn.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},:]', re.DOTALL)


def parse(data: bytes) -> dict[str, Any]:
    """Parse metadata; raise DamagedError unless it is one JSON object in strict UTF-8 and within the limits.

    NaN, 1e999, repeated keys and lone surrogates are refused: Python's parser accepts them, those of other languages do not.
    """
    if len(data) > limits.MAX_METADATA_LENGTH:
        raise DamagedError(f"metadata: {len(data)} bytes; at most {limits.MAX_METADATA_LENGTH} are allowed.")
    # First, because the parser recurses without a limit of its own and turns a byte into a hundred.
    _check_structure(data)
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_finite_integer,
            object_pairs_hook=_unique,
        )
        if b"\\u" in data:
            _check_texts(value)
    except ValueError as error:
        raise DamagedError(f"metadata: not strict JSON: {error}.") from error
    if not isinstance(value, dict):
        raise DamagedError(f"metadata: the top level is an object, found {type(value).__name__}.")
    return value


def dump(metadata: dict[str, Any]) -> bytes:
    """Return the canonical bytes of `metadata`: UTF-8, keys sorted, no spaces, so that equal metadata gives equal files.

    Raises UsageError unless it is a dictionary of plain JSON values with text keys, within the limits.
    """
    if not isinstance(metadata, dict):
        raise UsageError(f"metadata must be a dict, found {type(metadata).__name__}.")
    try:
        text = json.dumps(metadata, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
        data = text.encode("utf-8")
        parse(data)
    except (TypeError, ValueError, RecursionError, DamagedError) as error:
        raise UsageError(f"metadata cannot be written as JSON: {error}") from error
    return data


def _check_structure(data: bytes) -> None:
    depth = found = 0
    for match in _STRUCTURE.finditer(data):
        mark = match[0]
        if mark in b"]}":
            depth -= 1
        elif mark in b"[{,:":
            found += 1
            depth += mark in b"[{"
        if depth > limits.MAX_METADATA_DEPTH:
            raise DamagedError(f"metadata: nested more than {limits.MAX_METADATA_DEPTH} levels deep.")
        if found > limits.MAX_METADATA_STRUCTURE:
            raise DamagedError(
                f"metadata: more than {limits.MAX_METADATA_STRUCTURE} brackets, braces, commas and colons outside strings."
            )


def _check_texts(value: Any) -> None:
    """Raise ValueError for a lone surrogate, which the parser accepts as an escape (\\ud800) and which cannot be written."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            value.encode("utf-8")
        elif isinstance(value, dict):
            left += value
            left += value.values()
        elif isinstance(value, list):
            left += value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _finite_integer(text: str) -> int:
    if len(text) > 300:  # fewer digits are always finite as a double
        _finite(text)
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError(f"the key {first_twice(key for key, _ in pairs)!r} appears twice in one object")
    return value


def first_twice(names: Iterable[str]) -> str:
    """Return the first name that appears a second time; there must be one."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise ValueError("no name appears twice")
