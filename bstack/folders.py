"""The cache folder, and folders that are made whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bstk.atomic import stem, sync_folder
from bstk.errors import OutputError, UsageError, os_errors

__all__ = ["cache_folder", "check_free", "new_folder"]


def cache_folder(name: str) -> Path:
    """Return the folder ``bstack/NAME`` in $XDG_CACHE_HOME, or in ~/.cache if that is not set."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: relative paths are ignored.
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "bstack" / name


def check_free(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder that can be made: it is missing or empty, and its parent is a folder.

    Raises UsageError if there is something else, and OutputError if the parent is not a folder.
    """
    target = Path(os.path.abspath(path))
    shown = os.fspath(path)
    with os_errors(shown):
        if not target.parent.is_dir():
            raise OutputError(
                f"{target.parent} is not a folder, so {target.name} cannot be made in it.", hint="Create it first."
            )
        if os.path.lexists(target) and not target.is_dir():
            what = "a file" if target.exists() else "a broken link"
            raise UsageError(f"{shown} is {what}.", hint="Name a new folder, or an empty one.")
        if target.is_dir() and (inside := next(target.iterdir(), None)) is not None:
            raise UsageError(
                f"{shown} is not empty: it holds {inside.name}.", hint="Name a new folder, or an empty one."
            )
    return target


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder to fill in a `with` block; it gets its name when the block ends without an error.

    Until then it is called ``.NAME.xxxxxxxx.part``, which a killed process leaves behind.
    Errors are those of `check_free`, also at the end, if another process has put something there meanwhile.
    """
    target = check_free(path)
    with os_errors(str(target)):
        temporary = Path(tempfile.mkdtemp(prefix=f".{stem(target.name)}.", suffix=".part", dir=target.parent))
    try:
        yield temporary
        with os_errors(str(target)):
            _sync(temporary)
            # The usual mode of a new folder; mkdtemp restricts it to the owner.
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
    """Flush all files of a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
