"""Read, write and cut ``.bstk`` files, with no more than zstandard beside the standard library.

>>> import bstk
>>> with bstk.open("model.bstk") as f:             # doctest: +SKIP
...     print(f.state, f.fit(mb=3000), f.blocks[0])
>>> bstk.truncate("model.bstk", "small.bstk", mb=3000)   # doctest: +SKIP

The format is described in ``format/SPEC.md``.
"""

from . import errors, limits
from .budget import MB, budget_bytes, mb_ceil
from .cuts import Cut
from .cutting import plan, truncate
from .errors import (
    BstkError,
    BudgetError,
    BusyError,
    CertificateError,
    DamagedError,
    Interrupted,
    MissingPackageError,
    NotBstkError,
    OtherModelError,
    OutputError,
    PartialError,
    PartialWarning,
    RemoteAccessError,
    RemoteAnswerError,
    RemoteChangedError,
    RemoteError,
    RemoteNotFoundError,
    ResourceError,
    RootMismatchError,
    TransferError,
    TruncatedError,
    UnreachableError,
    UnsupportedVersionError,
    UsageError,
)
from .frames import Frame, pack
from .growing import grow, plan_growth
from .http import HttpSource
from .index import Chunk
from .kinds import FILE, OUTLIERS, SIGN, SPQR, TENSOR, TRELLIS, Kind
from .opening import open
from .reader import Reader
from .sources import BytesSource, FileSource, Source
from .urls import is_url
from .writer import Entry, write

__all__ = [
    "FILE",
    "MB",
    "OUTLIERS",
    "SIGN",
    "SPQR",
    "TENSOR",
    "TRELLIS",
    "BstkError",
    "BudgetError",
    "BusyError",
    "BytesSource",
    "CertificateError",
    "Chunk",
    "Cut",
    "DamagedError",
    "Entry",
    "FileSource",
    "Frame",
    "HttpSource",
    "Interrupted",
    "Kind",
    "MissingPackageError",
    "NotBstkError",
    "OtherModelError",
    "OutputError",
    "PartialError",
    "PartialWarning",
    "Reader",
    "RemoteAccessError",
    "RemoteAnswerError",
    "RemoteChangedError",
    "RemoteError",
    "RemoteNotFoundError",
    "ResourceError",
    "RootMismatchError",
    "Source",
    "TransferError",
    "TruncatedError",
    "UnreachableError",
    "UnsupportedVersionError",
    "UsageError",
    "budget_bytes",
    "errors",
    "grow",
    "is_url",
    "limits",
    "mb_ceil",
    "open",
    "pack",
    "plan",
    "plan_growth",
    "truncate",
    "write",
]
