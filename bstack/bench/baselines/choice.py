"""Which baselines to run: the syntax of ``--against``. No torch."""

from __future__ import annotations

import re
from typing import NamedTuple

import bstk

__all__ = ["BITS", "CALIBRATED", "Choice", "parse_against", "width"]

# Round-to-nearest costs only its evaluation; the others pass the calibration through the model once for each.
BITS = {"rtn": (2, 3, 4, 5, 6, 8), "gptq": (2, 3, 4), "spqr": (3, 4)}
CALIBRATED = ("gptq", "spqr")


# A target in bits per weight, as it is written.
_TARGET = re.compile(r"\d{1,3}(\.\d{1,9})?", re.ASCII)


class Choice(NamedTuple):
    """A method at a number of bits; `asked` when the user named the bits, so that it is run whatever its size.

    `bpw` is what SpQR's linears may take with their outliers, in bits per weight; None for its usual share of outliers.
    """

    method: str
    bits: int
    asked: bool
    bpw: float | None = None

    @property
    def name(self) -> str:
        """As the user writes it."""
        return f"{self.method}:{width(self.bits, self.bpw)}"


def width(bits: int, bpw: float | None) -> str:
    """Bits of a code, with the target if there is one: ``4`` or ``4@4.75``."""
    return f"{bits}" if bpw is None else f"{bits}@{bpw:.12g}"


def parse_against(text: str) -> list[Choice]:
    """Read ``rtn,gptq``, ``rtn:4,gptq:3`` or ``spqr:4@4.75``. Whether a target can be met is not looked at.

    Raises
    ------
    bstk.UsageError
        With the part that is wrong.
    """
    chosen: dict[tuple[str, int, float | None], Choice] = {}
    for part in text.split(","):
        method, colon, bits = part.strip().partition(":")
        bits, at, target = bits.partition("@")
        if method not in BITS:
            raise bstk.UsageError(
                f"{part.strip()!r} is no baseline. There are {', '.join(BITS)}; rtn:4 means 4 bits only, spqr:4@4.75 also 4.75 "
                "bits per weight with outliers."
            )
        if colon and bits not in {"2", "3", "4", "5", "6", "7", "8"}:
            raise bstk.UsageError(f"{part.strip()!r}: {bits!r} is no number of bits from 2 to 8.")
        if method == "spqr" and bits and int(bits) not in BITS[method]:
            raise bstk.UsageError(f"{part.strip()!r}: {bits} is no number of bits that spqr has: 3 or 4.")
        if at and method != "spqr":
            raise bstk.UsageError(
                f"{part.strip()!r}: {method} has no outliers, so no bits per weight to choose with @; spqr has."
            )
        if at and not _TARGET.fullmatch(target):
            raise bstk.UsageError(f"{part.strip()!r}: {target!r} is no number of bits per weight, such as spqr:4@4.75.")
        bpw = float(target) if at else None
        for number in [int(bits)] if colon else BITS[method]:
            chosen.setdefault((method, number, bpw), Choice(method, number, bool(colon), bpw))
    return list(chosen.values())
