"""Putting a file in place whole or not at all; changing one in place with nobody else doing the same."""

from __future__ import annotations

import glob
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from . import locks, urls
from .errors import BusyError, OutputError, UsageError, writing

_BINARY = getattr(os, "O_BINARY", 0)


class Sink:
    """The file being written: `write` loops until everything is out, as one call may write less."""

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
def replacing(
    path: str | os.PathLike[str], overwrite: bool = True, locked: LockedFile | None = None
) -> Iterator[tuple[Sink, str]]:
    """Write a file that appears at `path`, in place of what is there, when the block ends well; otherwise nothing changes.

    Yields the sink and the path of the temporary file, which stands in the same folder and is synced before it is renamed.
    From its first byte on it has the permissions of what it replaces. `locked` is that, if the caller has locked it, and must still
    be there at the end.

    A killed process leaves it behind as ``.NAME.xxxxxxxx.part``; the next one that writes `path` deletes it. Of several
    processes that write `path` at once, each writes a file of its own, and the last to finish has its file there.

    Raises
    ------
    UsageError
        `path` is empty or a URL; or with `overwrite` off something is there, at the start or when all is written. What another
        process puts there between that look and the renaming is replaced.
    ResourceError
        The disk is full.
    OutputError
        `path` cannot be written, or is no regular file.
    BusyError
        `locked` is no longer there.
    """
    if not overwrite:
        require_free(path)
    target = target_of(path)
    shown = os.fspath(path)
    with writing(shown):
        remove_leftovers(target)
        descriptor, temporary = _create_temporary(target)
    try:
        with writing(shown):
            _keep_permissions(descriptor, target, _OURS)
        yield Sink(descriptor), temporary
        with writing(shown):
            _keep_permissions(descriptor, target)
            os.fsync(descriptor)
            if not overwrite:
                require_free(path)
            if locked is not None:
                locked.require_there()
            if os.name == "nt":  # cannot rename an open file, nor rename over one
                descriptor = _close(descriptor)
                if locked is not None:
                    locked.close()
            # Elsewhere still locked: to others it is no leftover as long as it has this name.
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            descriptor = _close(descriptor)  # first, for Windows cannot delete an open file
        with suppress(OSError):
            os.unlink(temporary)
        raise
    with suppress(OSError):  # all of it is on the disk already
        _close(descriptor)
    sync_folder(os.path.dirname(target))


def require_free(path: str | os.PathLike[str]) -> None:
    """Raise UsageError if there is something at `path`."""
    if os.path.exists(path):
        raise UsageError(f"{os.fspath(path)}: is there already. Allow to replace it (--force), or name another output.")


def target_of(path: str | os.PathLike[str]) -> str:
    """Return where a file that replaces `path` is to be put: behind a link, so that the link stays one.

    Raises
    ------
    UsageError
        It is empty, or a URL.
    OutputError
        There is something there that is no regular file, or there is no such folder.
    """
    shown = os.fspath(path)
    if not shown:
        raise UsageError("The name of the output is empty. Name a file to write to.")
    if urls.is_url(shown):
        raise UsageError(f"{urls.shown(shown)}: an output is a file on disk, not a URL. Name a file to write to.")
    target = os.path.realpath(path)
    with writing(shown):
        try:
            # Renaming over a device such as /dev/null would replace the device.
            if not stat.S_ISREG(os.stat(target).st_mode):
                raise OutputError(f"{shown}: not a regular file. Name a file to write to.")
        except FileNotFoundError:
            folder = os.path.dirname(target)
            if not os.path.isdir(folder):
                message = f"{shown}: cannot write: there is no folder {folder}. Create it, or name another output."
                raise OutputError(message) from None
    return target


def sync_folder(folder: str) -> None:
    """Make a renaming in `folder` survive a power cut, where the system can."""
    # The file is in place already. Windows and some network file systems cannot do this, which is no failure.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _close(descriptor: int) -> int:
    """Close a descriptor, unless it is -1; return -1."""
    if descriptor >= 0:
        os.close(descriptor)
    return -1


_OURS = 0o600  # what whoever writes a file may do with it, until it takes its place


def _keep_permissions(descriptor: int, target: str, besides: int = 0) -> None:
    """Give an open file that is to replace `target` its owner, group and permissions, and those `besides`.

    Where the group is one that this user may not give, the group's permissions are not given either: nobody can read the new
    file who could not read the old one. Windows, and the first file at `target`, keep the system's rules.
    """
    if os.name != "posix":
        return
    try:
        old = os.stat(target)
    except FileNotFoundError:
        return
    new, mode = os.fstat(descriptor), stat.S_IMODE(old.st_mode) & 0o777
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with suppress(PermissionError):
            os.fchown(descriptor, -1, old.st_gid)
        with suppress(PermissionError):
            os.fchown(descriptor, old.st_uid, -1)
        new = os.fstat(descriptor)
        mode &= ~0o070 if new.st_gid != old.st_gid else ~0
    # Some file systems have one mode for all files, and refuse to change it.
    if stat.S_IMODE(new.st_mode) != mode | besides:
        os.fchmod(descriptor, mode | besides)


def _stem(name: str) -> str:
    """As much of a file's name as leaves room for more: file systems count 255 bytes, and a letter may take four."""
    return os.fsencode(name)[:200].decode(errors="ignore")


def _create_temporary(target: str) -> tuple[int, str]:
    """Create a locked file. The lock tells `remove_leftovers` of other processes that somebody still writes it."""
    folder, name = os.path.split(target)
    while True:
        temporary = os.path.join(folder, f".{_stem(name)}.{secrets.token_hex(4)}.part")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        # Where a file system knows no locks, leftovers stay.
        with suppress(OSError):
            locks.wait_for_lock(descriptor)
        # Another process may have taken it for a leftover before the lock was there.
        if locks.is_at(descriptor, temporary):
            return descriptor, temporary
        os.close(descriptor)


def remove_leftovers(target: str) -> None:
    """Delete what killed processes left of writing `target`, no link: the temporary files that nobody has locked."""
    folder, name = os.path.split(target)
    for leftover in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(_stem(name))}.????????.part")):
        with suppress(OSError):
            descriptor = os.open(leftover, os.O_RDWR | _BINARY)
            try:
                if locks.try_lock(descriptor):
                    os.unlink(leftover)
            finally:
                os.close(descriptor)


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

    Raises
    ------
    BusyError
        Another process has locked it.
    OutputError
        It cannot be opened for writing.
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = False, wait: bool = False):
        self.path = os.fspath(path)
        # What is made here may not be a link that somebody else has put there.
        flags = os.O_RDWR | _BINARY | ((os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)) if create else 0)
        with writing(self.path):
            while True:
                self._descriptor = os.open(path, flags, 0o666)
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
        self._descriptor = _close(self._descriptor)

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
            raise BusyError(f"{self.path}: another program replaced or deleted it meanwhile. Look at what is there now.")

    def prepare(self, target: str) -> None:
        """Let nobody read it who may not read the file at `target`, which it is to replace."""
        _keep_permissions(self._descriptor, target, _OURS)

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        os.fsync(self._descriptor)

    def rename(self, target: str, locked: LockedFile | None = None) -> None:
        """Put the file at `target`, in place of what is there and with its permissions, and close it.

        `locked` is what is there, if the caller has locked it, and must still be there.
        """
        if locked is not None:
            locked.require_there()
        _keep_permissions(self._descriptor, target)
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
