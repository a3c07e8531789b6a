"""What a bench run is to measure, and the syntax of its sizes and baselines. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

import bstk
from bstk.kinds import SPQR_BITS, one_of

__all__ = ["BITS", "CALIBRATED", "GGUF", "Choice", "Options", "even_budgets", "parse_against", "parse_budgets", "width"]

# Each size takes seconds to hours, so a range with a tiny step is most likely a slip.
MAX_SIZES = 1000
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_RANGE = re.compile(rf"({_NUMBER})(?:-({_NUMBER})([+*])({_NUMBER}))?", re.ASCII)
_SYNTAX = "sizes in MB, and ranges FIRST-LAST+STEP or FIRST-LAST*FACTOR, separated by commas: 60,80.5,100-200+20"
_BPW = re.compile(r"\d{1,3}(\.\d{1,9})?", re.ASCII)

# Round-to-nearest costs only its evaluation; the others pass the calibration through the model once for each width.
BITS = {"rtn": (2, 3, 4, 5, 6, 8), "gptq": (2, 3, 4), "spqr": SPQR_BITS}
CALIBRATED = ("gptq", "spqr")
GGUF = "gguf"


class Choice(NamedTuple):
    """A baseline to measure: method, bits of a code (0 for a file), whether the user named them, SpQR's bits per weight, a file."""

    method: str
    bits: int
    asked: bool
    bpw: float | None = None
    path: str | None = None

    @property
    def name(self) -> str:
        """As the user writes it."""
        if self.path is not None:
            return f"{self.method}:{self.path}"
        return f"{self.method}:{width(self.bits, self.bpw)}"


@dataclass(frozen=True)
class Options:
    """What to measure.

    `budgets` are bytes; None means ten sizes from the base model to the whole file. None as `text` means the default of
    `bstack.bench.text`, as `sequence_length` 512 or what the model reads, as `calibration` what the file's metadata names.
    `force` accepts another model as the `original`, which the baselines in `against` need. `code` is the folder or hub id
    of the Python code that `trust_remote_code` allows. Speed is measured on `device`.
    """

    budgets: Sequence[int] | None = None
    speed: bool = True
    quality: bool = True
    text: str | None = None
    windows: int = 16
    sequence_length: int | None = None
    original: str | None = None
    force: bool = False
    against: Sequence[Choice] = ()
    calibration: str | None = None
    tasks: Sequence[str] = ()
    trust_remote_code: bool = False
    code: str | None = None
    device: str = "cpu"


def parse_budgets(text: str) -> list[int]:
    """Read sizes in megabytes (2**20 bytes), as llama-bench reads its ranges.

    Parameters
    ----------
    text : str
        ``60,80,100-200+20``: single sizes, ranges with a step, ranges with a factor (``64-512*2``). A range includes
        its last size if a step lands on it.

    Returns
    -------
    list of int
        Bytes, in the order given, without repetitions.

    Raises
    ------
    bstk.UsageError
        For anything else; the message names the wrong part.
    """
    sizes: dict[Decimal, int] = {}
    for part in map(str.strip, text.split(",")):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise bstk.UsageError(f"{part!r} is not a size.", hint=f"Give {_SYNTAX}.")
        for size in _expand(part, *match.groups()):
            sizes.setdefault(size, bstk.budget_bytes(size))
            if len(sizes) > MAX_SIZES:
                raise bstk.UsageError(f"{text!r} means more than {MAX_SIZES} sizes.", hint="Give a larger step.")
    return list(dict.fromkeys(sizes.values()))


def _expand(part: str, first: str, last: str | None, sign: str | None, by: str | None) -> Iterator[Decimal]:
    # Decimal, because 0.1 + 0.1 + 0.1 is more than 0.3 in binary.
    size = Decimal(first)
    yield size
    if last is None or by is None:
        return
    end, step = Decimal(last), Decimal(by)
    if end < size:
        raise bstk.UsageError(f"{part!r} runs from {size} down to {end}.", hint="Give the smaller size first.")
    if (step <= 0) if sign == "+" else (step <= 1):
        needed = "a positive step" if sign == "+" else "a factor above 1"
        raise bstk.UsageError(f"{part!r} never reaches its end.", hint=f"Give {needed}.")
    while (size := size + step if sign == "+" else size * step) <= end:
        yield size


def even_budgets(file: bstk.Reader, count: int = 10) -> list[int]:
    """Return `count` sizes in bytes from the base model to all of the file, in equal steps; fewer for few blocks.

    They are rounded up to hundredths of a MB where that does not merge sizes, so that each can be typed again.
    """
    cuts = file.even_cuts(count)
    rounded = [-(-budget * 100 // bstk.MB) * bstk.MB // 100 for budget in cuts.values()]
    same = all(file.fit_bytes(budget) == cut for budget, cut in zip(rounded, cuts, strict=True))
    return rounded if same else list(cuts.values())


def width(bits: int, bpw: float | None) -> str:
    """Return the bits of a code with the bits per weight if they were chosen: ``4`` or ``4@4.75``."""
    return f"{bits}" if bpw is None else f"{bits}@{bpw:.12g}"


def parse_against(text: str) -> list[Choice]:
    """Read ``rtn,gptq``, ``rtn:4,gptq:3``, ``spqr:4@4.75`` or ``gguf:FILE``. Files and targets are checked later."""
    chosen: dict[tuple[str, int, float | None, str | None], Choice] = {}
    for part in map(str.strip, text.split(",")):
        method, colon, bits = part.partition(":")
        if method == GGUF and bits:
            chosen[method, 0, None, bits] = Choice(method, 0, True, None, bits)
            continue
        bits, at, bpw = bits.partition("@")
        if method not in BITS:
            raise bstk.UsageError(
                f"{part!r} is not a baseline. There are {', '.join(BITS)}; rtn:4 means 4 bits only, spqr:4@4.75 also "
                "4.75 bits per weight with outliers. A GGUF file is gguf:FILE."
            )
        if colon and bits not in {"2", "3", "4", "5", "6", "7", "8"}:
            raise bstk.UsageError(f"{part!r}: {bits!r} is not a number of bits from 2 to 8.")
        if method == "spqr" and bits and int(bits) not in BITS[method]:
            raise bstk.UsageError(f"{part!r}: {bits} is not a number of bits that spqr has: {one_of(SPQR_BITS)}.")
        if at and method != "spqr":
            raise bstk.UsageError(
                f"{part!r}: {method} has no outliers, so @ has no meaning.", hint="Use @ with spqr only."
            )
        if at and not _BPW.fullmatch(bpw):
            raise bstk.UsageError(f"{part!r}: {bpw!r} is not a number of bits per weight, such as spqr:4@4.75.")
        target = float(bpw) if at else None
        for number in [int(bits)] if colon else BITS[method]:
            chosen.setdefault((method, number, target, None), Choice(method, number, bool(colon), target))
    return list(chosen.values())
