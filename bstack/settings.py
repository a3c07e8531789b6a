"""The settings of a compression: everything that decides its output, in one value."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from typing import Any

from bstack.errors import CodecError

__all__ = ["PRESETS", "Settings"]

ORDERS = ("gain", "paper")
EMBEDDINGS = ("stack", "dense")
AUTO = "auto"

# What a field may be: a type (numpy's numbers are of Python's abstract ones), what makes a plain value of it; and values of none.
_WHOLE, _NUMBER, _TEXT = (Integral, int, "a whole number"), (Real, float, "a number"), (str, str.__str__, "a text")
_FIELDS: dict[str, tuple[tuple[type, Callable[[Any], Any], str], tuple[str | None, ...]]] = {
    "codec": (_TEXT, ()),
    "rank": (_WHOLE, (AUTO, None)),
    "planes": (_WHOLE, (None,)),
    "bits": (_WHOLE, (None,)),
    "group": (_WHOLE, (None,)),
    "outliers": (_NUMBER, (AUTO, None)),
    "bpw": (_NUMBER, (None,)),
    "order": (_TEXT, ()),
    "embeddings": (_TEXT, ()),
    "calibration": (_TEXT, ()),
    "samples": (_WHOLE, ()),
    "sequence_length": (_WHOLE, ()),
    "seed": (_WHOLE, ()),
}


@dataclass(frozen=True)
class Settings:
    """What to do with a model.

    Attributes
    ----------
    codec : str
        Name of the codec.
    rank : int or "auto" or None
        Rank of the sign codec's magnitudes; None: auto. No other codec has one.
    planes : int or None
        Blocks per linear, with the SpQR codec residual planes on top of it; None: the codec's own number.
    bits, group : int or None
        SpQR codec: bits of a code, and inputs that share a scale and a zero point; None: 4 and 16. No other codec has them.
    outliers : float or "auto" or None
        SpQR codec: share of the weights that are kept apart; None: auto, 1 % or what `bpw` leaves room for.
    bpw : float or None
        SpQR codec: bits per weight that dense part and outliers of a layer may take together; decides the share of outliers.
    order : str
        ``gain``: predicted gain per byte, levels interleaved; ``paper``: BitStack's perplexity search, level by level.
    embeddings : str
        ``stack``: embeddings and head become stacks like every linear; ``dense``: they stay as they are.
    calibration : str or path
        ``self``, a file, a folder or a hub data set.
    samples, sequence_length : int
        Calibration windows and tokens in each.
    seed : int
        Of everything random.

    Raises
    ------
    bstack.errors.CodecError
        For a value of another type, or out of range. What depends on the codec is checked by the codec.
    """

    codec: str = "trellis"
    rank: int | str | None = None
    planes: int | None = None
    bits: int | None = None
    group: int | None = None
    outliers: float | str | None = None
    bpw: float | None = None
    order: str = "gain"
    embeddings: str = "stack"
    calibration: str = "self"
    samples: int = 64
    sequence_length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.calibration, os.PathLike):
            object.__setattr__(self, "calibration", os.fspath(self.calibration))
        for name in _FIELDS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        for name, allowed in (("order", ORDERS), ("embeddings", EMBEDDINGS)):
            if getattr(self, name) not in allowed:
                raise CodecError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}.")
        for name, least, most in (("samples", 1, 2**20), ("sequence_length", 8, 2**20), ("seed", 0, 2**63 - 1)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise CodecError(f"{name.replace('_', '-')} is {value}; allowed are {least} to {most}.")

    def with_changes(self, **changes: Any) -> Settings:
        """A copy with the changes that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def _checked(name: str, value: Any) -> Any:
    """The value as one that JSON has, or an error that says what it may be."""
    (kind, plain, words), others = _FIELDS[name]
    # True is an int to Python, and 1 to nobody who means it.
    if isinstance(value, kind) and not isinstance(value, bool):
        with suppress(OverflowError):  # a whole number that no float is as large as
            return plain(value)
    if (value is None or isinstance(value, str)) and value in others:
        return value
    allowed = [words, *(repr(other) for other in others)]
    listed = f"{', '.join(allowed[:-1])} or {allowed[-1]}" if others else words
    raise CodecError(f"{name} is {value!r}, of type {type(value).__name__}; allowed is {listed}.")


PRESETS = {
    "default": Settings(),
    # A faithful BitStack (arXiv 2410.23918): section 4.1 for rank and iterations; embeddings stay in half precision.
    "paper": Settings(codec="sign", rank=16, planes=16, order="paper", embeddings="dense"),
}
