"""Which baselines to run: the syntax of ``--against``. No torch."""

from __future__ import annotations

from typing import NamedTuple

import bstk

__all__ = ["BITS", "CALIBRATED", "Choice", "parse_against"]

# Round-to-nearest costs only its evaluation; the others pass the calibration through the model once for each.
BITS = {"rtn": (2, 3, 4, 5, 6, 8), "gptq": (2, 3, 4), "spqr": (3, 4)}
CALIBRATED = ("gptq", "spqr")


class Choice(NamedTuple):
    """A method at a number of bits; `asked` when the user named the bits, so that it is run whatever its size."""

    method: str
    bits: int
    asked: bool


def parse_against(text: str) -> list[Choice]:
    """Read ``rtn,gptq`` or ``rtn:4,gptq:3``.

    Raises
    ------
    bstk.UsageError
        With the part that is wrong.
    """
    chosen: dict[tuple[str, int], Choice] = {}
    for part in text.split(","):
        method, colon, bits = part.strip().partition(":")
        if method not in BITS:
            raise bstk.UsageError(f"{part.strip()!r} is no baseline. There are {', '.join(BITS)}; rtn:4 means 4 bits only.")
        if colon and bits not in {"2", "3", "4", "5", "6", "7", "8"}:
            raise bstk.UsageError(f"{part.strip()!r}: {bits!r} is no number of bits from 2 to 8.")
        if method == "spqr" and bits and int(bits) not in BITS[method]:
            raise bstk.UsageError(f"{part.strip()!r}: {bits} is no number of bits that spqr has: 3 or 4.")
        for number in [int(bits)] if colon else BITS[method]:
            chosen.setdefault((method, number), Choice(method, number, bool(colon)))
    return list(chosen.values())
