"""What columns pass on to later ones when they are encoded: products with a unit upper triangular factor."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod

import numpy as np
import torch

from bstack.kernels.matrix import pointer
from bstack.kernels.native import library

__all__ = ["GROUP", "NARROW", "Feedback", "feedback_of"]

# Columns that are encoded together.
GROUP = 64
# Up to so many columns larger products, or such of bytes, gain little.
NARROW = 2048
DIGITS = 3
COLUMNS_MULTIPLIED = 1024


class Feedback(ABC):
    """The factor M, and which columns of a block are encoded, with values q of each.

    Columns come in groups of 64: all numbers `start` are multiples of it. What is passed on inside a group is not known here.
    """

    @abstractmethod
    def inside(self, start: int) -> torch.Tensor:
        """Return the part of M that is of the group from `start` on in rows and columns, contiguous."""

    @abstractmethod
    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows, float32, shape (rows, columns), by M; shape (columns, rows)."""

    @abstractmethod
    def begin(self, scale: torch.Tensor) -> None:
        """Begin a block, of which the scale of each row is given, float32, shape (rows,)."""

    @abstractmethod
    def targets(self, product: torch.Tensor, start: int) -> torch.Tensor:
        """Return the targets of a group, the first that is not encoded: P_j - sum_k q_k M_kj, of the columns k before it.

        `product` is P, of all columns, float32, shape (columns, rows), and stays as it is.
        """

    @abstractmethod
    def add(self, start: int, codes: torch.Tensor, negative: torch.Tensor) -> None:
        """Add a group that is encoded: its codes, uint8, shape (columns, 4 + rows), and -q, float32, shape (columns, rows)."""


def feedback_of(factor: torch.Tensor) -> Feedback:
    """Return the feedback by a factor, float32, unit upper triangular, shape (columns, columns)."""
    if factor.device.type == "cpu" and len(factor) > NARROW:
        native = library()
        if native is not None and native.bstack_feedback_offers():
            return _Bytes(factor, native)
    return _Floats(factor)


class _Floats(Feedback):
    """Multiplies in single precision."""

    def __init__(self, factor: torch.Tensor):
        self._factor = factor

    def inside(self, start: int) -> torch.Tensor:
        return self._factor[start : start + GROUP, start : start + GROUP].contiguous()

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        found = rows.new_empty(rows.shape[1], rows.shape[0])
        for start in range(0, len(found), COLUMNS_MULTIPLIED):
            stop = min(start + COLUMNS_MULTIPLIED, len(found))
            torch.mm(self._factor[:stop, start:stop].t(), rows[:, :stop].t(), out=found[start:stop])
        return found

    def begin(self, scale: torch.Tensor) -> None:
        self._negative = self._factor.new_empty(len(self._factor), len(scale))

    def targets(self, product: torch.Tensor, start: int) -> torch.Tensor:
        n = len(product)
        first, group = 0, slice(start, min(start + GROUP, n))
        part = product[group]
        if n > NARROW:  # what many columns pass on to many is one product, which is faster than one for each group
            first = start - start % COLUMNS_MULTIPLIED
            if start == first:
                some = slice(first, min(first + COLUMNS_MULTIPLIED, n))
                self._passed = torch.addmm(product[some], self._factor[:first, some].t(), self._negative[:first])
            part = self._passed[start - first : group.stop - first]
        return torch.addmm(part, self._factor[first:start, group].t(), self._negative[first:start])

    def add(self, start: int, codes: torch.Tensor, negative: torch.Tensor) -> None:
        self._negative[start : start + len(negative)] = negative


class _Bytes(Feedback):
    """Multiplies bytes, exactly (csrc/feedback.c): with AMX several times as fast as floats.

    Table values are bytes, and a number of M is rounded to three of them, to steps of 2^-23 of the largest in its column: as fine as
    single precision. M itself is not kept.
    """

    def __init__(self, factor: torch.Tensor, native: ctypes.CDLL):
        self._native, self._columns = native, len(factor)
        self._inside = [_Floats(factor).inside(start) for start in range(0, len(factor), GROUP)]
        self._digits = _memory(native.bstack_feedback_factor_bytes(len(factor)))
        self._unit = np.zeros(len(factor))
        self._sums = np.zeros(native.bstack_feedback_sums(len(factor)), np.int64)
        columns = factor.t().contiguous()  # which is how `factorise` leaves them
        native.bstack_feedback_cut(pointer(columns.numpy()), self._columns, *map(pointer, self._cut))

    @property
    def _cut(self) -> tuple[np.ndarray, ...]:
        return self._digits, self._unit, self._sums

    def inside(self, start: int) -> torch.Tensor:
        return self._inside[start // GROUP]

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        size = self._native.bstack_feedback_bytes(self._columns, len(rows))
        placed, unit = _memory(DIGITS * size), np.empty(len(rows), np.float32)
        at = pointer(rows.contiguous().numpy())
        self._native.bstack_feedback_place_rows(at, self._columns, len(rows), *map(pointer, (placed, unit)))
        unit *= 2**16  # products of the two smallest digits are left out
        found = rows.new_empty(rows.shape[1], rows.shape[0])
        for start in range(0, self._columns, GROUP):
            part = found[start : start + GROUP]
            torch.mm(self.inside(start).t(), rows[:, start : start + GROUP].t(), out=part)
            self._pass_on(placed, DIGITS, start, unit, part)
        return found

    def begin(self, scale: torch.Tensor) -> None:
        self._negative_scale = scale.neg().numpy()
        self._placed = _memory(self._native.bstack_feedback_bytes(self._columns, len(scale)))

    def targets(self, product: torch.Tensor, start: int) -> torch.Tensor:
        found = product[start : start + GROUP].clone()
        self._pass_on(self._placed, 1, start, self._negative_scale, found)
        return found

    def add(self, start: int, codes: torch.Tensor, negative: torch.Tensor) -> None:
        columns, rows = negative.shape
        given = pointer(codes.contiguous().numpy()), columns, rows, start, self._columns, pointer(self._placed)
        if self._native.bstack_feedback_place(*given):
            raise MemoryError

    def _pass_on(self, placed: np.ndarray, digits: int, start: int, scale: np.ndarray, target: torch.Tensor) -> None:
        columns, rows = target.shape
        given = pointer(placed), digits, start, columns, self._columns, rows, pointer(scale), pointer(target.numpy())
        if self._native.bstack_feedback_pass(*map(pointer, self._cut), *given):
            raise MemoryError


def _memory(size: int) -> np.ndarray:
    """Return bytes that begin at a multiple of 64."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]
