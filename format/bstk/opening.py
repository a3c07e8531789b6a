"""Opening a ``.bstk`` file, from wherever it is, and again after it was replaced there."""

from __future__ import annotations

import os
import warnings

from . import urls
from .errors import DamagedError, PartialError, PartialWarning, RemoteChangedError, UnsupportedVersionError
from .reader import Reader
from .sources import Source, as_source


def open(
    what: str | os.PathLike[str] | bytes | bytearray | memoryview | Source, strict: bool = False, *, warn: bool = True
) -> Reader:
    """Open a ``.bstk`` file for reading.

    Parameters
    ----------
    what : path, URL, bytes, or a source
        Of a URL the header is read, with at most two requests; chunks on demand. A source has ``name``, ``length``,
        ``read(offset, length)`` and ``close()``; it is closed with the reader.
    strict : bool
        Refuse a partial file instead of warning about it.
    warn : bool
        Warn about a partial file; False for callers that expect one or say it themselves.

    Returns
    -------
    Reader
        A context manager; close it when done.

    Raises
    ------
    NotBstkError, UnsupportedVersionError
        It is something else, or from a newer version.
    TruncatedError
        It ends before its smallest model does.
    DamagedError
        A check failed.
    PartialError
        It is partial and `strict` is set.
    OSError, RemoteError
        It cannot be read.

    Warns
    -----
    PartialWarning
        It is partial: unsealed, and shorter than the complete file; and `warn` is set.
    """
    source = as_source(what)
    try:
        reader = _read_twice_if_changed(source)
        if reader.state == "partial":
            if strict:
                raise PartialError(f"{source.name}: {reader.partial_message()}")
            if warn:
                warnings.warn(f"{source.name}: {reader.partial_message()}", PartialWarning, stacklevel=2)
    except BaseException:
        source.close()
        raise
    return reader


def reopen(reader: Reader) -> Reader:
    """Return a new reader of the same source, after the file behind it was replaced on its server."""
    reader.source.restart()
    return Reader(reader.source)


def is_remote(reader: Reader) -> bool:
    """Whether a reader reads from a server."""
    return urls.is_url(reader.source.name)


def require_rewritable(reader: Reader) -> None:
    """Raise UnsupportedVersionError if the file has features that allow reading it, but not writing parts of it."""
    if reader.preamble.read_only_compatible:
        raise UnsupportedVersionError(
            f"{reader.source.name}: the file has features this version of bstk can read but not rewrite "
            f"(read-only-compatible flags {reader.preamble.read_only_compatible:#x}). Upgrade bstack to cut it."
        )


def _read_twice_if_changed(source: Source) -> Reader:
    """Read the header; once more where the file was replaced on a server, or written to on disk, in the meantime."""
    try:
        return Reader(source)
    except (DamagedError, RemoteChangedError) as error:
        changed = isinstance(error, RemoteChangedError) if not hasattr(source, "changed") else source.changed()
        if not (changed and hasattr(source, "restart")):
            raise
        source.restart()
        return Reader(source)
