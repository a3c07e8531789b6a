"""Write files whole or not at all, and lock those that are changed in place.

Locks are advisory: they hold among programs that ask for them, and end with the process.
"""

from __future__ import annotations

import glob
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from . import http
from .errors import OutputError, UsageError, os_errors

_BINARY = getattr(os, "O_BINARY", 0)
_LOCKED_BYTE = 2**62  # far behind any data: Windows locks are mandatory, and readers must not run into one


class Sink:
    """A file that is being written; `write` loops, because one system call may write less than all."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.length = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        view = memoryview(data).cast("B")
        while view.nbytes:
            written = os.write(self._descriptor, view)
            self.length += written
            view = view[written:]


@contextmanager
def replacing(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[tuple[Sink, str]]:
    """Write a file that appears at `path`, in place of what is there, when the block ends well; otherwise nothing changes.

    Yields the sink and the path of the temporary file, which lies in the same folder and is synced before it is renamed. A
    killed process leaves ``.NAME.xxxxxxxx.part``; the next one that writes `path` deletes it.

    Raises
    ------
    UsageError
        `path` is empty or a URL; or without `overwrite` it exists, at the start or when all is written.
    ResourceError, OutputError
        The disk is full; `path` cannot be written, or is not a regular file.
    """
    if not overwrite:
        require_free(path)
    target = target_of(path)
    shown = os.fspath(path)
    with os_errors(shown):
        remove_leftovers(target)
        descriptor, temporary = _create_temporary(target)
    try:
        yield Sink(descriptor), temporary
        with os_errors(shown):
            copy_mode(descriptor, target)
            os.fsync(descriptor)
            if not overwrite:
                require_free(path)
            if os.name == "nt":  # cannot rename an open file
                descriptor = _close(descriptor)
            # Elsewhere still locked, so that no other process takes it for a leftover.
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            descriptor = _close(descriptor)  # first, because Windows cannot delete an open file
        with suppress(OSError):
            os.unlink(temporary)
        raise
    with suppress(OSError):  # everything is on the disk already
        _close(descriptor)
    sync_folder(os.path.dirname(target))


def require_free(path: str | os.PathLike[str]) -> None:
    """Raise UsageError if `path` exists."""
    if os.path.exists(path):
        raise UsageError(f"{os.fspath(path)}: the output exists.", hint="Name another output.", option="overwrite")


def target_of(path: str | os.PathLike[str]) -> str:
    """Return the path to rename a replacement of `path` to, after its links; raise an error unless a file may lie there."""
    shown = os.fspath(path)
    if not shown:
        raise UsageError("The name of the output is empty.", hint="Name a file to write to.")
    if http.is_url(shown):
        raise UsageError(
            f"{http.shown(shown)}: an output is a file on disk, not a URL.", hint="Name a file to write to."
        )
    target = os.path.realpath(path)
    with os_errors(shown):
        try:
            # Renaming over a device such as /dev/null would replace the device.
            if not stat.S_ISREG(os.stat(target).st_mode):
                raise OutputError(f"{shown}: not a regular file.", hint="Name a file to write to.")
        except FileNotFoundError:
            folder = os.path.dirname(target)
            if not os.path.isdir(folder):
                raise OutputError(
                    f"{shown}: cannot write: the folder {folder} does not exist.",
                    hint="Create it, or name another output.",
                ) from None
    return target


def mode_of_new(target: str) -> int:
    """Return the mode to create a file with that is to be renamed to `target`: private if it replaces a file."""
    return 0o600 if os.path.lexists(target) else 0o666


def copy_mode(descriptor: int, target: str, extra: int = 0) -> None:
    """Give an open file the mode bits of the file at `target`, if there is one, and the bits `extra`."""
    if os.name != "posix" or not os.path.exists(target):
        return
    old, new = os.stat(target), os.fstat(descriptor)
    # Bits of the group are for the old file's group, not for another.
    mode = (old.st_mode & (0o777 if new.st_gid == old.st_gid else 0o707)) | extra
    # Some file systems have one mode for all files, and refuse to change it.
    if stat.S_IMODE(new.st_mode) != mode:
        os.fchmod(descriptor, mode)


def sync_folder(folder: str) -> None:
    """Make a renaming in `folder` survive a power cut, where the system can."""
    with suppress(OSError):  # Windows and some network file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(target: str) -> None:
    """Delete the temporary files that killed processes left of writing `target`: those that nobody has locked."""
    folder, name = os.path.split(target)
    for leftover in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(stem(name))}.{8 * '[0-9a-f]'}.part")):
        with suppress(OSError):
            if not stat.S_ISREG(os.lstat(leftover).st_mode):
                continue
            descriptor = os.open(leftover, os.O_RDWR | _BINARY)
            try:
                if try_lock(descriptor):
                    os.unlink(leftover)
            finally:
                os.close(descriptor)


def stem(name: str) -> str:
    """Return the start of a file name that leaves room for a suffix: file systems allow 255 bytes."""
    return os.fsencode(name)[:200].decode(errors="ignore")


def _create_temporary(target: str) -> tuple[int, str]:
    """Create a locked temporary file next to `target`; the lock tells other processes that it is in use."""
    folder, name = os.path.split(target)
    while True:
        temporary = os.path.join(folder, f".{stem(name)}.{secrets.token_hex(4)}.part")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, mode_of_new(target))
        with suppress(OSError):  # a file system without locks: leftovers stay there
            try_lock(descriptor, wait=True)
        # Another process may have deleted it as a leftover before it was locked.
        if is_at(descriptor, temporary):
            return descriptor, temporary
        os.close(descriptor)


def _close(descriptor: int) -> int:
    """Close a descriptor, unless it is -1; return -1."""
    if descriptor >= 0:
        os.close(descriptor)
    return -1


class LockedFile:
    """A file that is changed in place, locked against other processes: `wait` for the lock, or raise UsageError.

    It is a `bstk.Source` too.
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = False, wait: bool = False, mode: int = 0o666):
        self.name = os.fspath(path)
        # Do not create a file through a link.
        flags = os.O_RDWR | _BINARY | ((os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)) if create else 0)
        with os_errors(self.name):
            while True:
                self._descriptor = os.open(path, flags, mode)
                try:
                    if not try_lock(self._descriptor, wait):
                        raise UsageError(
                            f"{self.name}: another process is writing this file.",
                            hint="Wait for it, or name another file.",
                        )
                    if is_at(self._descriptor, self.name):
                        break
                except BaseException:
                    self.close()
                    raise
                # Another process replaced or deleted the file while this one waited for the lock.
                self.close()

    def __enter__(self) -> LockedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which ends the lock. Closing twice is allowed."""
        self._descriptor = _close(self._descriptor)

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
        """Cut off everything after the first `length` bytes."""
        os.ftruncate(self._descriptor, length)

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._descriptor)

    def require_there(self) -> None:
        """Raise UsageError if another program replaced or deleted the file, which needs no lock."""
        if not is_at(self._descriptor, self.name):
            raise UsageError(
                f"{self.name}: another program replaced or deleted it meanwhile.", hint="Look at what is there now."
            )

    def copy_mode(self, target: str) -> None:
        """Give the file the mode bits of the one at `target`, which it will replace, and stay writable."""
        copy_mode(self._descriptor, target, 0o600)

    def rename(self, target: str) -> None:
        """Move the file to `target`, in place of what is there and with its mode bits, and close it."""
        copy_mode(self._descriptor, target)
        if os.name == "nt":  # cannot rename an open file
            self.close()
        os.replace(self.name, target)  # still locked, so that no other process writes to it
        self.close()


def try_lock(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file against all other openings of it; False if it is locked. OSError where there are no locks."""
    if sys.platform == "win32":
        import msvcrt

        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        finally:
            os.lseek(descriptor, position, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: str) -> bool:
    """Return whether `path` still names the open file, which another process may have renamed or deleted."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
