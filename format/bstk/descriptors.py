"""Open files, by their descriptors: writing all of it, permissions, closing."""

from __future__ import annotations

import os
import stat
from contextlib import suppress


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


def close(descriptor: int) -> int:
    """Close a descriptor, unless it is -1; return -1."""
    if descriptor >= 0:
        os.close(descriptor)
    return -1


OURS = 0o600
"""What whoever writes a file may do with it, until it takes its place."""


def keep_permissions(descriptor: int, target: str, besides: int = 0) -> None:
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
