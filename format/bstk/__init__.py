"""Read, write and cut ``.bstk`` files, with no more than zstandard beside the standard library.

>>> import bstk
>>> with bstk.open("model.bstk") as f:             # doctest: +SKIP
...     print(f.state, f.fit(mb=3000), f.blocks[0])
>>> bstk.truncate("model.bstk", "small.bstk", mb=3000)   # doctest: +SKIP

The format is described in ``format/SPEC.md``.
"""

from . import errors, limits
from .budget import MB, budget_bytes, mb_ceil
from .cutting import plan, truncate
from .errors import (
    BstkError,
    BudgetError,
    DamagedError,
    Interrupted,
    NotBstkError,
    OutputError,
    PartialError,
    PartialWarning,
    ResourceError,
    TruncatedError,
    UnsupportedVersionError,
    UsageError,
)
from .frames import Frame, pack
from .index import Chunk
from .kinds import FILE, SIGN, TENSOR, TRELLIS, Kind
from .reader import Cut, Reader, open
from .sources import BytesSource, FileSource, Source
from .writer import Entry, write

__all__ = [
    "FILE",
    "MB",
    "SIGN",
    "TENSOR",
    "TRELLIS",
    "BstkError",
    "BudgetError",
    "BytesSource",
    "Chunk",
    "Cut",
    "DamagedError",
    "Entry",
    "FileSource",
    "Frame",
    "Interrupted",
    "Kind",
    "NotBstkError",
    "OutputError",
    "PartialError",
    "PartialWarning",
    "Reader",
    "ResourceError",
    "Source",
    "TruncatedError",
    "UnsupportedVersionError",
    "UsageError",
    "budget_bytes",
    "errors",
    "limits",
    "mb_ceil",
    "open",
    "pack",
    "plan",
    "truncate",
    "write",
]
