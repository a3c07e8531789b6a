"""The small files beside a model's weights: which ones there are, and putting them into a folder."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

from bstack.errors import one_line
from bstk.atomic import Sink
from bstk.errors import DamagedError, OutputError, os_errors

__all__ = ["MODEL_SUFFIXES", "is_model_file", "put_files"]

MODEL_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe", ".spm", ".codes")
"""Endings of configurations, vocabularies and chat templates: fetched, packed into containers and exported."""

# What a system answers about a name, not about the disk.
_BAD_NAMES = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ, errno.ENOENT)


def is_model_file(name: str) -> bool:
    """Tell whether a file of that path lies beside a model's weights, and is none that other programs act on (``.git``)."""
    return name.endswith(MODEL_SUFFIXES) and not any(part.startswith((".", "~")) for part in name.split("/"))


def put_files(files: Iterable[tuple[str, Iterable[bytes]]], folder: Path, source: str) -> None:
    """Write files into a folder.

    Parameters
    ----------
    files : iterable of (str, iterable of bytes)
        Path inside the folder, parts separated by slashes, and content in pieces.
    folder : Path
        An existing one.
    source : str
        Where they come from, for the error.

    Raises
    ------
    bstk.DamagedError
        A name cannot be used here: it is too long, or also that of a folder.
    bstk.ResourceError, bstk.OutputError
        The disk is full, or cannot be written.
    """
    for name, pieces in files:
        target = folder / name
        try:
            with os_errors(str(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
                out = open(target, "wb", buffering=0)  # noqa: SIM115 (writing has an error of its own)
            with out:
                sink = Sink(out.fileno())
                for piece in pieces:
                    with os_errors(str(target)):
                        sink.write(piece)
        except OutputError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _BAD_NAMES:
                raise
            raise DamagedError(f"{source}: its file {name!r} cannot be written: {one_line(cause)}.") from None
