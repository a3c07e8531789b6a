"""The sizes to measure: the syntax of ``--budgets``, and the sizes taken when none are given. No torch."""

from __future__ import annotations

import re
from decimal import Decimal

import bstk

__all__ = ["MOST", "even_budgets", "parse_budgets"]

# A range with a tiny step is a slip, not a wish: each size takes seconds to hours.
MOST = 1000
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PART = re.compile(rf"({_NUMBER})(?:-({_NUMBER})([+*])({_NUMBER}))?", re.ASCII)
_SYNTAX = "sizes in MB, and ranges FIRST-LAST+STEP or FIRST-LAST*FACTOR, separated by commas: 60,80.5,100-200+20"


def parse_budgets(text: str) -> list[Decimal]:
    """Read sizes in megabytes (2**20 bytes), as llama-bench reads its ranges.

    Parameters
    ----------
    text : str
        ``60,80,100-200+20``: single sizes, ranges with a step, ranges with a factor (``64-512*2``). A range includes
        its last size if a step lands on it.

    Returns
    -------
    list of Decimal
        In the order given, without repetitions; exact.

    Raises
    ------
    bstk.UsageError
        For anything else, with the part that is wrong.
    """
    sizes: dict[Decimal, None] = {}
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise bstk.UsageError(f"{part.strip()!r} is no size. Give {_SYNTAX}.")
        for size in _expand(part.strip(), *match.groups()):
            bstk.budget_bytes(size)
            sizes.setdefault(size)
            if len(sizes) > MOST:
                raise bstk.UsageError(f"{text!r} means more than {MOST} sizes. Give a larger step.")
    return list(sizes)


def _expand(part: str, first: str, last: str | None, sign: str | None, by: str | None):
    size = Decimal(first)
    yield size
    if last is None:
        return
    end, step = Decimal(last), Decimal(by)
    if end < size:
        raise bstk.UsageError(f"{part!r} runs from {size} down to {end}. Give the smaller size first.")
    if (step <= 0) if sign == "+" else (step <= 1):
        least = "a positive step" if sign == "+" else "a factor above 1"
        raise bstk.UsageError(f"{part!r} never reaches its end; it needs {least}.")
    if size == 0:
        return  # refused by the caller; a factor would never leave 0
    while (size := size + step if sign == "+" else size * step) <= end:
        yield size


def even_budgets(file: bstk.Reader, count: int = 10) -> list[Decimal]:
    """Return `count` sizes from the smallest model to all of the file, in equal steps; fewer for a file of few blocks.

    Rounded up to hundredths of a MB where that does not merge sizes, so that each can be typed again.
    """
    cuts = file.even_cuts(count)
    exact = [Decimal(budget) / bstk.MB for budget in cuts.values()]
    rounded = [Decimal(bstk.mb_ceil(budget)) for budget in cuts.values()]
    same = all(file.fit(mb=size) == cut for size, cut in zip(rounded, cuts, strict=True))
    return rounded if same else exact
