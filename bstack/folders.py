"""Folders outside the project: the one that bstack keeps something in, and those that it is asked to make."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bstk.atomic import sync_folder
from bstk.errors import OutputError, UsageError, os_errors

__all__ = ["cache_folder", "check_free", "new_folder"]


def cache_folder(name: str) -> Path:
    """The folder `name` in ``bstack`` in $XDG_CACHE_HOME, or in ~/.cache where that is not set (as its specification asks)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # "All paths must be absolute. If an implementation encounters a relative path it should ignore it."
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "bstack" / name


def check_free(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder that can be made: nothing is there, or an empty folder, and its parent is a folder.

    Raises
    ------
    bstk.UsageError
        There is something there already: a file, a link that leads nowhere, or a folder with something in it.
    bstk.OutputError
        Nothing can be made there: the parent is no folder, or the system refuses to look.
    """
    target = Path(os.path.abspath(path))
    shown = os.fspath(path)
    with os_errors(shown):
        if not target.parent.is_dir():
            raise OutputError(
                f"{target.parent} is not a folder, so {target.name} cannot be made in it. Create it first."
            )
        if os.path.lexists(target) and not target.is_dir():
            what = "a file" if target.exists() else "a link that leads nowhere"
            raise UsageError(f"{shown} is {what}; name a folder that is not there yet, or an empty one.")
        if target.is_dir() and (inside := next(target.iterdir(), None)) is not None:
            raise UsageError(
                f"{shown} is not empty: it holds {inside.name}. Name a folder that is not there yet, or an empty one."
            )
    return target


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, for the length of a `with` block: it gets its name when the block ends without an error.

    Until then it is called ``.NAME.xxxxxxxx.part`` and stands beside; a process that is killed leaves that.

    Raises
    ------
    bstk.UsageError, bstk.OutputError, bstk.ResourceError
        As `check_free`; also at the end, where somebody else has put something there meanwhile.
    """
    target = check_free(path)
    with os_errors(str(target)):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:200]}.", suffix=".part", dir=target.parent))
    try:
        yield temporary
        with os_errors(str(target)):
            _sync(temporary)
            # As a folder that was made in the usual way: mkdtemp makes it for its owner alone.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o777 & ~mask)
        check_free(target)
        with os_errors(str(target)):
            if target.is_symlink():
                target = target.resolve()
            if target.is_dir():
                target.rmdir()
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(str(target.parent))


def _sync(folder: Path) -> None:
    """Bring all files of a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
