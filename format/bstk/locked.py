"""Files that one process at a time changes in place."""

from __future__ import annotations

import os

from . import locks
from .descriptors import OURS, Sink, close, keep_permissions
from .errors import BusyError, os_errors

BINARY = getattr(os, "O_BINARY", 0)


class LockedFile:
    """A file that is changed in place, locked against other processes that want to do the same.

    Parameters
    ----------
    path : path
        The file.
    create : bool
        Make an empty one if there is none.
    wait : bool
        Wait for the lock, rather than fail.
    mode : int
        Permissions of one that is made, before the system's mask.

    Raises
    ------
    BusyError
        Another process has locked it.
    OutputError
        It cannot be opened for writing.
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = False, wait: bool = False, mode: int = 0o666):
        self.path = os.fspath(path)
        # What is made here may not be a link that somebody else has put there.
        flags = os.O_RDWR | BINARY | ((os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)) if create else 0)
        with os_errors(self.path):
            while True:
                self._descriptor = os.open(path, flags, mode)
                try:
                    self._take_lock(wait)
                    if locks.is_at(self._descriptor, self.path):
                        break
                except BaseException:
                    self.close()
                    raise
                # While this waited for the lock, another process put a file in its place or took it away.
                self.close()

    def _take_lock(self, wait: bool) -> None:
        if wait:
            locks.wait_for_lock(self._descriptor)
        elif not locks.try_lock(self._descriptor):
            raise BusyError(f"{self.path}: another process is writing this file. Wait for it, or name another file.")

    def __enter__(self) -> LockedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which ends the lock. Closing twice does no harm."""
        self._descriptor = close(self._descriptor)

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._descriptor

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes at `offset`; fewer only where the file ends."""
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        parts = []
        while length and (part := os.read(self._descriptor, length)):
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at `offset`."""
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        Sink(self._descriptor).write(data)

    def shorten(self, length: int) -> None:
        """Cut everything after the first `length` bytes off."""
        os.ftruncate(self._descriptor, length)

    def require_there(self) -> None:
        """Raise BusyError unless it still is what its path names: who replaces or deletes a file asks for no lock."""
        if not locks.is_at(self._descriptor, self.path):
            raise BusyError(
                f"{self.path}: another program replaced or deleted it meanwhile. Look at what is there now."
            )

    def prepare(self, target: str) -> None:
        """Let nobody read it who may not read the file at `target`, which it is to replace."""
        keep_permissions(self._descriptor, target, OURS)

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        os.fsync(self._descriptor)

    def rename(self, target: str, locked: LockedFile | None = None) -> None:
        """Put the file at `target`, in place of what is there and with its permissions, and close it.

        `locked` is what is there, if the caller has locked it, and must still be there.
        """
        if locked is not None:
            locked.require_there()
        keep_permissions(self._descriptor, target)
        if os.name == "nt":  # cannot rename an open file, nor rename over one
            self.close()
            if locked is not None:
                locked.close()
            os.replace(self.path, target)
            return
        os.replace(self.path, target)  # still locked: nobody takes the new file for a part that can be written to
        self.close()


class Borrowed:
    """A locked file as a source to read from, whatever is at its path meanwhile; closing it leaves the file open and locked."""

    def __init__(self, file: LockedFile):
        self.name = file.path
        self._file = file

    @property
    def length(self) -> int:
        return self._file.length

    def read(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes at `offset`; fewer only where the file ends."""
        return self._file.read(offset, length)

    def close(self) -> None:
        """Do nothing: the file belongs to another."""
