"""The metadata: one JSON object, parsed strictly, written canonically."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from . import limits
from .errors import DamagedError, UsageError
from .names import first_twice

# Strings are skipped whole, so that what stands inside them does not count. Possessive, so that a long string costs no
# backtracking memory. One that does not end takes all that is left, for else each of its quotes would be tried in turn.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},:]', re.DOTALL)


def parse(data: bytes) -> dict[str, Any]:
    """Parse metadata.

    Python's own parser accepts NaN, 1e999, repeated keys and lone surrogates; other languages' do not, so none is
    accepted here.

    Raises
    ------
    DamagedError
        It is not one JSON object in strict UTF-8, or it is past a limit.
    """
    if len(data) > limits.MAX_METADATA_LENGTH:
        raise DamagedError(f"metadata: {len(data)} bytes; at most {limits.MAX_METADATA_LENGTH} are allowed.")
    # Before the parser, which recurses as deep as its interpreter lets it, and makes 100 bytes of a byte.
    _check_structure(data)
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_no_constant,
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

    Raises
    ------
    UsageError
        `metadata` is not a dictionary of plain JSON values with text keys, or is past a limit.
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
    """Refuse lone surrogates: the one way the parser lets them in is an escape (\\ud800), and they cannot be written again."""
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


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
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
