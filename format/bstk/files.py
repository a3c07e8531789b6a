"""Putting a file in place whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .errors import OutputError, writing


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
def replacing(path: str | os.PathLike[str]) -> Iterator[tuple[Sink, str]]:
    """Write a file that appears at `path`, in place of what is there, when the block ends well; otherwise nothing changes.

    Yields the sink and the path of the temporary file, which stands in the same folder and is synced before it is renamed.
    A killed process leaves it behind as ``.NAME.xxxxxxxx.part``; it can be deleted.

    Raises
    ------
    ResourceError
        The disk is full.
    OutputError
        `path` cannot be written, or is no regular file.
    """
    # Through a link, so that the link stays one.
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    shown = os.fspath(path)
    with writing(shown):
        # Renaming over a device such as /dev/null would replace the device.
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(target).st_mode):
                raise OutputError(f"{shown}: not a regular file. Name a file to write to.")
        temporary = os.path.join(folder, f".{name[:200]}.{secrets.token_hex(4)}.part")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            sink = Sink(descriptor)
            yield sink, temporary
            with writing(shown):
                os.fsync(descriptor)
        finally:
            with writing(shown):
                os.close(descriptor)
        with writing(shown):
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    # The new file is in place; syncing its folder makes that survive a power cut. Windows and some network file systems
    # cannot, and a file that is there is no reason to report failure.
    with suppress(OSError):
        _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
