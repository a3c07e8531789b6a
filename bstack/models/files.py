"""A model's own small files, from wherever they are kept into a folder that transformers can read."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

from bstack.errors import DamagedError, one_line
from bstk.atomic import Sink
from bstk.errors import OutputError, os_errors

__all__ = ["put_files"]

# What systems say of a name, rather than of the disk.
NAMES = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ, errno.ENOENT)


def put_files(files: Iterable[tuple[str, Iterable[bytes]]], folder: Path, shown: str) -> None:
    """Write files into a folder.

    Parameters
    ----------
    files : iterable of (str, iterable of bytes)
        Path inside the folder, parts separated by slashes, and content in pieces.
    folder : Path
        An existing one.
    shown : str
        Where they come from, for the error.

    Raises
    ------
    bstk.DamagedError
        A name is none here: too long, or that of a folder of another file.
    bstk.ResourceError, bstk.OutputError
        The disk is full, or cannot be written.
    """
    for name, pieces in files:
        target = folder / name
        try:
            with os_errors(str(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
                out = open(target, "wb", buffering=0)
            with out:
                sink = Sink(out.fileno())
                for piece in pieces:
                    with os_errors(str(target)):
                        sink.write(piece)
        except OutputError as error:
            if error.__cause__.errno not in NAMES:
                raise
            raise DamagedError(
                f"{shown}: its file {name!r} cannot be put into a folder here: {one_line(error.__cause__)}."
            ) from None
