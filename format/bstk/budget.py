"""Megabytes: reading a budget, writing a size. 1 MB = 2**20 bytes, as in the tables of the BitStack paper."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import NamedTuple

from . import limits
from .errors import UsageError

MB = 2**20

Budget = int | float | str | Decimal


class Cut(NamedTuple):
    """A prefix of a file: its number of chunks, its length as a file, the raw bytes of its weights (their memory)."""

    chunks: int
    file_bytes: int
    memory_bytes: int

    @property
    def budget(self) -> int:
        """The smallest budget, in bytes, that it fits in both ways."""
        return max(self.file_bytes, self.memory_bytes)


def budget_bytes(mb: Budget) -> int:
    """Return a budget of `mb` megabytes in whole bytes, rounded down; exact for text, Decimal and ``size / MB``.

    Raises
    ------
    UsageError
        `mb` is not a positive, finite number.
    """
    refusal = UsageError(
        f"a budget is a positive number of MB (1 MB = 2**20 bytes), such as 3000 or 62.5; found {mb!r}."
    )
    if isinstance(mb, bool) or not isinstance(mb, (int, float, str, Decimal)):
        raise refusal
    try:
        value = Decimal(mb)
    except InvalidOperation:
        raise refusal from None
    if not value.is_finite() or value <= 0:
        raise refusal
    if value >= limits.MAX_FILE_LENGTH:
        return limits.MAX_FILE_LENGTH
    if value < Decimal("1e-9"):
        return 0  # less than a byte; tested here because Fraction("1e-999999999") would fill the memory
    return int(Fraction(value) * MB)


def budget_of(mb: Budget | None, budget: int | None) -> int:
    """Return in bytes a budget that is given either as `mb` megabytes or as `budget` bytes; UsageError for both or neither."""
    if (mb is None) == (budget is None):
        found = "neither" if mb is None else f"mb={mb!r} and budget={budget!r}"
        raise UsageError(
            f"a budget is given as mb, in MB, or as budget, in bytes; found {found}.", hint="Give one of them."
        )
    return budget_bytes(mb) if budget is None else budget  # type: ignore[arg-type]


def mb_text(budget: int) -> str:
    """Return the shortest number of MB that `budget_bytes` reads as `budget` bytes: what was typed, up to seven decimals."""
    digits = next(d for d in range(8) if -(-budget * 10**d // MB) * MB // 10**d == budget)  # 10**7 > MB, so one does it
    return f"{Decimal(-(-budget * 10**digits // MB)).scaleb(-digits):f}"


def mb_ceil(size: int) -> str:
    """Return `size` bytes in MB with two decimals, rounded up, so that the printed number works as a budget."""
    count = -(-size * 100 // MB)
    return f"{count // 100}.{count % 100:02d}"
