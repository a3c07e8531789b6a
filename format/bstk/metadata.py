"""The metadata: one JSON object, parsed strictly, written canonically."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from . import limits
from .errors import DamagedError, UsageError

# Strings are skipped whole, so that brackets inside them do not count. Possessive, so that a long string costs no
# backtracking memory.
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)


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
    # Depth first: the parser recurses, and its own limit differs from one interpreter to the next.
    if _depth(data) > limits.MAX_METADATA_DEPTH:
        raise DamagedError(f"metadata: nested more than {limits.MAX_METADATA_DEPTH} levels deep.")
    try:
        value = json.loads(
            data.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique
        )
        # The one way the parser lets a lone surrogate in is an escape (\ud800); such text cannot be written out again.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
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


def _depth(data: bytes) -> int:
    depth = deepest = 0
    for match in _BRACKETS.finditer(data):
        if match[0] in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in b"]}":
            depth -= 1
    return deepest


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return value
