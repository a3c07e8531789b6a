"""Locks on files, so that two processes do not write one file at once.

They are advisory: programs that do not ask for them are not held up. They end with the process, however it ends.
"""

from __future__ import annotations

import os

# Far behind any data: Windows locks are not advisory, and readers must not run into one.
_PLACE = 2**62


def try_lock(descriptor: int) -> bool:
    """Lock an open file against other processes and other openings of it; False if it is locked already.

    Raises
    ------
    OSError
        The file system knows no locks.
    """
    return _lock(descriptor, wait=False)


def wait_for_lock(descriptor: int) -> None:
    """Lock an open file, waiting until whoever holds the lock lets go of it."""
    _lock(descriptor, wait=True)


def is_at(descriptor: int, path: str) -> bool:
    """Whether `path` still names the open file, which another process may have renamed or deleted."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, _PLACE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        finally:
            os.lseek(descriptor, place, os.SEEK_SET)
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
