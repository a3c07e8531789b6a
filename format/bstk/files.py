"""Putting a file in place whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from . import locks, urls
from .descriptors import OURS, Sink, close, keep_permissions, mode_of_new
from .errors import OutputError, UsageError, os_errors
from .locked import BINARY, LockedFile


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
    with os_errors(shown):
        remove_leftovers(target)
        descriptor, temporary = _create_temporary(target)
    try:
        with os_errors(shown):
            keep_permissions(descriptor, target, OURS)
        yield Sink(descriptor), temporary
        with os_errors(shown):
            keep_permissions(descriptor, target)
            os.fsync(descriptor)
            if not overwrite:
                require_free(path)
            if locked is not None:
                locked.require_there()
            if os.name == "nt":  # cannot rename an open file, nor rename over one
                descriptor = close(descriptor)
                if locked is not None:
                    locked.close()
            # Elsewhere still locked: to others it is no leftover as long as it has this name.
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            descriptor = close(descriptor)  # first, for Windows cannot delete an open file
        with suppress(OSError):
            os.unlink(temporary)
        raise
    with suppress(OSError):  # all of it is on the disk already
        close(descriptor)
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
    with os_errors(shown):
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


_RANDOM = 8 * "[0-9a-f]"  # what `_create_temporary` makes, as a pattern


def _stem(name: str) -> str:
    """As much of a file's name as leaves room for more: file systems count 255 bytes, and a letter may take four."""
    return os.fsencode(name)[:200].decode(errors="ignore")


def _create_temporary(target: str) -> tuple[int, str]:
    """Create a locked file. The lock tells `remove_leftovers` of other processes that somebody still writes it."""
    folder, name = os.path.split(target)
    while True:
        temporary = os.path.join(folder, f".{_stem(name)}.{secrets.token_hex(4)}.part")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, mode_of_new(target))
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
    for leftover in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(_stem(name))}.{_RANDOM}.part")):
        with suppress(OSError):
            if not stat.S_ISREG(os.lstat(leftover).st_mode):
                continue
            descriptor = os.open(leftover, os.O_RDWR | BINARY)
            try:
                if locks.try_lock(descriptor):
                    os.unlink(leftover)
            finally:
                os.close(descriptor)
