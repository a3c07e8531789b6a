"""The settings of a compression: everything that decides its output, in one value."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any

from bstk.errors import UsageError

__all__ = ["PRESETS", "Settings"]

ORDERS = ("gain", "paper")
DEVICES = "cpu, cuda and cuda:N"
EMBEDDINGS = ("stack", "dense")


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
        SpQR codec: fraction of the weights that are outliers; None: auto, 1 % or what `bpw` leaves room for.
    bpw : float or None
        SpQR codec: bits per weight that dense part and outliers of a layer may take together; decides how many outliers there are.
    order : str
        ``gain``: predicted gain per byte, levels interleaved; ``paper``: BitStack's perplexity search, level by level.
    embeddings : str
        ``stack``: embeddings and head become stacks like every linear; ``dense``: they stay as they are.
    calibration : str or path
        ``self``, a file, a folder or a hub data set.
    samples, sequence_length : int
        Calibration windows and tokens in each.
    seed : int
        Random seed.
    tokenizer : bool
        Whether the file carries the tokenizer. Without one it takes token ids alone.
    exact : bool
        Whether the complete file restores the original's weight files bit for bit.
    device : str
        Where the work is done: ``cpu``, or an NVIDIA GPU, ``cuda`` or ``cuda:N``. A file made on a GPU is as good as the CPU's, but
        another one; the same GPU makes the same file again.

    Raises
    ------
    bstk.UsageError
        A value is not allowed. Settings of the codec are checked when the codec is made.
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
    tokenizer: bool = True
    exact: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if isinstance(self.calibration, os.PathLike):
            object.__setattr__(self, "calibration", os.fspath(self.calibration))
        for name in ("codec", "calibration", "device"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name} is {getattr(self, name)!r}; allowed is a text.")
        for name, allowed in (("order", ORDERS), ("embeddings", EMBEDDINGS)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}.")
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", self.device):
            raise UsageError(f"device is {self.device!r}; allowed are {DEVICES}.")
        for name in ("tokenizer", "exact"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {getattr(self, name)!r}; allowed are True and False.")
        for name, low, high in (("samples", 1, 2**20), ("sequence_length", 8, 2**20), ("seed", 0, 2**63 - 1)):
            value: Any = getattr(self, name)
            # bool is a subclass of int; reject it.
            if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
                raise UsageError(f"{name.replace('_', ' ')} is {value!r}; allowed are {low} to {high}.")
            object.__setattr__(self, name, int(value))

    def with_changes(self, **changes: Any) -> Settings:
        """Return a copy with the changes that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return asdict(self)


PRESETS = {
    "default": Settings(),
    # A faithful BitStack (arXiv 2410.23918): section 4.1 for rank and iterations; embeddings stay in half precision.
    "paper": Settings(codec="sign", rank=16, planes=16, order="paper", embeddings="dense"),
}
