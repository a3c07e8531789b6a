"""The element types a chunk can have: the one table."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """An element type: its code in the index, its name in the API, its size in bytes."""

    code: int
    name: str
    size: int


_TABLE = (
    DType(0, "none", 0),  # chunks without elements: files
    DType(1, "f32", 4),
    DType(2, "f16", 2),
    DType(3, "bf16", 2),
    DType(4, "f64", 8),
    DType(5, "i8", 1),
    DType(6, "u8", 1),
    DType(7, "i16", 2),
    DType(8, "i32", 4),
    DType(9, "i64", 8),
    DType(10, "bool", 1),  # one byte an element, 0 or 1
)

BY_CODE = {dtype.code: dtype for dtype in _TABLE}
BY_NAME = {dtype.name: dtype for dtype in _TABLE}
