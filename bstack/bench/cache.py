"""Where references are kept between runs: a bounded folder in the user's cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import bstk
from bstack.bench.reference import Reference
from bstack.folders import cache_folder

__all__ = ["LIMIT", "cached"]

# All references together. One of 16 windows of 512 tokens takes .75 GiB with a vocabulary of 49,152 and 2 GiB with 128,256.
LIMIT = 4 * 2**30


def cached(key: str, size: int, scratch: Path, make: Callable[[Path], Reference]) -> Reference:
    """Open the reference of that key, or make it.

    Parameters
    ----------
    key : str
        Hexadecimal digits: the name of its file.
    size : int
        Bytes that it will take. One larger than `LIMIT`, or one for which the folder cannot be written, goes to
        `scratch` and is made again in the next run; for others the ones unused longest make room.
    scratch : Path
        A temporary folder of this run.
    make : callable
        Writes it to the path that it is given.
    """
    path = cache_folder("references") / f"{key}.ref"
    try:
        found = Reference(path, key)
        found.check()
        os.utime(path)
        return found
    except bstk.DamagedError:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # not there, or not readable: made below
    if size > LIMIT or not _make_room(path.parent, size):
        return make(scratch / path.name)
    return make(path)


def _make_room(folder: Path, size: int) -> bool:
    """Make the folder and delete what was not used for longest; False when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return False
        kept = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in folder.glob("*.ref")), reverse=True)
        total = size
        for _, length, path in kept:
            total += length
            if total > LIMIT:
                path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
