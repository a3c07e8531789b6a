"""Read, write and cut ``.bstk`` files, with the standard library, and before Python 3.14 with backports.zstd.

>>> import bstk
>>> with bstk.open("model.bstk") as f:             # doctest: +SKIP
...     print(f.state, f.fit(mb=3000), f.chunks[0])
>>> bstk.truncate("model.bstk", "small.bstk", mb=3000)   # doctest: +SKIP

The format is described in ``format/SPEC.md``.
"""

from . import errors, limits
from .budget import MB, Cut, budget_bytes, mb_ceil, mb_text
from .cutting import grow, plan, plan_growth, truncate
from .errors import (
    BstkError,
    BudgetError,
    DamagedError,
    Interrupted,
    NotBstkError,
    OutputError,
    PartialError,
    PartialWarning,
    RemoteChangedError,
    RemoteError,
    ResourceError,
    TruncatedError,
    UnsupportedVersionError,
    UsageError,
)
from .frames import Frame, pack, pack_parts
from .http import HttpSource, is_url
from .index import Chunk
from .kinds import EXACT, FILE, ORIGINAL, OUTLIERS, SIGN, SPQR, TENSOR, TRELLIS, TRELLIS5, Kind
from .reader import Reader, open
from .sources import BytesSource, FileSource, Source
from .writer import Entry, write

__all__ = [
    "EXACT",
    "FILE",
    "MB",
    "ORIGINAL",
    "OUTLIERS",
    "SIGN",
    "SPQR",
    "TENSOR",
    "TRELLIS",
    "TRELLIS5",
    "BstkError",
    "BudgetError",
    "BytesSource",
    "Chunk",
    "Cut",
    "DamagedError",
    "Entry",
    "FileSource",
    "Frame",
    "HttpSource",
    "Interrupted",
    "Kind",
    "NotBstkError",
    "OutputError",
    "PartialError",
    "PartialWarning",
    "Reader",
    "RemoteChangedError",
    "RemoteError",
    "ResourceError",
    "Source",
    "TruncatedError",
    "UnsupportedVersionError",
    "UsageError",
    "budget_bytes",
    "errors",
    "grow",
    "is_url",
    "limits",
    "mb_ceil",
    "mb_text",
    "open",
    "pack",
    "pack_parts",
    "plan",
    "plan_growth",
    "truncate",
    "write",
]
