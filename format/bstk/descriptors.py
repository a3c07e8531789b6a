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

_ACL = "system.posix_acl_access"


def mode_of_new(target: str) -> int:
    """Return the mode to create a file with that is to be put at `target`: nobody else's, if something is there."""
    return OURS if os.path.lexists(target) else 0o666


def keep_permissions(descriptor: int, target: str, besides: int = 0) -> None:
    """Give an open file that is to replace `target` its owner, group, permissions and POSIX ACL, and the permissions `besides`.

    Where group or ACL cannot be given, the group's permissions are not given either: nobody can read the new file who could not
    read the old one. Windows, and the first file at `target`, keep the system's rules.
    """
    if os.name != "posix":
        return
    try:
        old = os.stat(target)
    except FileNotFoundError:
        return
    new, mode = os.fstat(descriptor), stat.S_IMODE(old.st_mode) & 0o777
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with suppress(OSError):  # only root may give a file away, and not every file system knows owners
            os.fchown(descriptor, -1, old.st_gid)
        with suppress(OSError):
            os.fchown(descriptor, old.st_uid, -1)
        new = os.fstat(descriptor)
    if new.st_gid != old.st_gid or not _keep_acl(descriptor, target):
        mode &= ~0o070
    # Some file systems have one mode for all files, and refuse to change it.
    if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode | besides:
        os.fchmod(descriptor, mode | besides)


def _keep_acl(descriptor: int, target: str) -> bool:
    """Give an open file the access control list of `target`, or none if that has none; return whether it has it now."""
    old = _acl(target)
    if old != _acl(descriptor):
        with suppress(OSError):
            os.removexattr(descriptor, _ACL) if old is None else os.setxattr(descriptor, _ACL, old)
    return old == _acl(descriptor)


def _acl(file: str | int) -> bytes | None:
    try:
        return os.getxattr(file, _ACL)
    except (OSError, AttributeError):  # none, or a system without
        return None
