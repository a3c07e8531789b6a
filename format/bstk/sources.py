"""Sources of the bytes of a file: on disk, in memory, behind a URL, or an object of the caller."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from .errors import DamagedError, UsageError
from .http import HttpSource, is_url

PIECE = 4 * 2**20  # bytes read at a time where much is read


@runtime_checkable
class Source(Protocol):
    """Random access to bytes. `name` is for messages; `read` may be called from several threads."""

    name: str

    @property
    def length(self) -> int:
        """Bytes of the file."""

    def read(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes at `offset`; fewer only where the source ends."""

    def close(self) -> None:
        """Release what the source holds."""


class BytesSource:
    """A file held in memory."""

    def __init__(self, data: bytes | bytearray | memoryview, name: str = "<bytes>"):
        self._data = memoryview(data).cast("B")
        self.name = name
        self.length = self._data.nbytes

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._data[offset : offset + length])

    def close(self) -> None:
        self._data.release()


class FileSource:
    """A file on disk, of the length it had when it was opened or last restarted; UsageError for a pipe and the like."""

    def __init__(self, path: str | os.PathLike[str]):
        self.name = os.fspath(path)
        # Checked before opening, because opening a pipe waits for a writer.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UsageError(
                f"{self.name}: not a regular file, so it cannot be read at any offset.", hint="Save it to disk first."
            )
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()
        self.restart()

    def changed(self) -> bool:
        """Return whether the file was written to or shortened since it was opened or restarted."""
        return _signature(os.fstat(self._file.fileno())) != self._seen

    def restart(self) -> None:
        """Use the file as it is now."""
        status = os.fstat(self._file.fileno())
        self.length = status.st_size
        self._seen = _signature(status)

    def read(self, offset: int, length: int) -> bytes:
        if length > self.length - offset:
            length = max(0, self.length - offset)
        # One read may return less than asked (Linux stops at 2 GiB). Windows has no pread, so seek and read are locked.
        parts = []
        with self._lock:
            self._file.seek(offset)
            while length and (part := self._file.read(length)):
                parts.append(part)
                length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        self._file.close()


def _signature(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


Opened = str | os.PathLike[str] | bytes | bytearray | memoryview | Source
"""What `bstk.open` takes: a path, a URL, bytes or a source."""


def as_source(what: Opened) -> Source:
    """Return `what` as a source: a path or URL is opened, bytes are wrapped, a source is passed through."""
    if isinstance(what, str) and is_url(what):
        return HttpSource(what)
    if isinstance(what, (str, os.PathLike)):
        return FileSource(what)
    if isinstance(what, (bytes, bytearray, memoryview)):
        return BytesSource(what)
    if isinstance(what, Source):
        return what
    raise TypeError(
        f"cannot read a .bstk file from {type(what).__name__}: give a path, a URL, bytes, or an object with "
        "name, length, read(offset, length) and close()"
    )


def read_exactly(source: Source, offset: int, length: int, what: str) -> bytes:
    """Return exactly `length` bytes at `offset`; raise DamagedError for fewer, because the source has changed then."""
    data = source.read(offset, length)
    if len(data) != length:
        raise DamagedError(
            f"{what}: asked for {length} bytes at offset {offset}, got {len(data)}.",
            hint="The file became shorter after it was opened; open it again.",
        )
    return data


def pieces(source: Source, offset: int, length: int, what: str) -> Iterator[bytes]:
    """Yield the `length` bytes at `offset` piece by piece; raise DamagedError as `read_exactly` does.

    A source with a method ``pieces(offset, length)`` is asked for them: over a network they are parts of one request.
    """
    if hasattr(source, "pieces"):
        yield from source.pieces(offset, length)
        return
    stop = offset + length
    while offset < stop:
        piece = read_exactly(source, offset, min(PIECE, stop - offset), what)
        yield piece
        offset += len(piece)
