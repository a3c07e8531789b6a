"""Models behind URLs: what was fetched of each is kept in a file that grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

import bstk
from bstack.folders import cache_folder
from bstk import preamble
from bstk.atomic import LockedFile
from bstk.budget import Budget
from bstk.errors import os_errors
from bstk.transfer import begin, extend, intact

__all__ = ["KeptCopyError", "cached", "kept_path"]


class KeptCopyError(bstk.DamagedError):
    """The kept copy of a model was damaged on this disk, or became shorter while it was read. Loading again mends that."""


def kept_path(root: bytes) -> Path:
    """Where the blocks of the model with that root digest are kept, whatever URL they come from."""
    return cache_folder("models") / f"{root.hex()}.bstk"


@contextmanager
def cached(
    url: str, mb: Budget | None, strict: bool, warn: bool = True, notify: Callable[[str], None] | None = None
) -> Iterator[tuple[bstk.Reader, tuple[bstk.Chunk, ...]]]:
    """Fetch what a budget needs of a model behind a URL and is not kept yet.

    Each call asks the server for the first 64 KiB, to learn which model it has. Nothing else is fetched twice. Several
    processes may do this at once: one fetches, and the others wait for it.

    Parameters
    ----------
    url : str
    mb : number, str or None
        The budget, as in `bstk.Reader.fit`.
    strict : bool
        Refuse a file that is partial on the server.
    warn : bool
        Warn about one.
    notify : callable or None
        Called with one line about each retry, but for those that a progress line on a terminal shows.

    Yields
    ------
    file : bstk.Reader
        The kept file.
    chunks : tuple of bstk.Chunk
        Those within the budget, which may be fewer than are kept.

    Raises
    ------
    bstk.RemoteError
        The URL cannot be read.
    KeptCopyError
        A kept chunk is damaged, or gone because another process found it so. What is kept is dropped from there on, and the
        next call fetches it again.
    bstk.DamagedError
        What the server sends is damaged.
    bstk.BstkError
        As `bstk.open` and `bstk.Reader.fit`.
    """
    with closing(bstk.HttpSource(url, notify)) as remote:
        try:
            path, count = _fetch(remote, mb, strict, warn)
        except bstk.RemoteChangedError:
            remote.restart()
            path, count = _fetch(remote, mb, strict, warn)
    with bstk.open(path, warn=False) as file:  # what is kept is always partial
        if len(file.chunks) < count:
            raise KeptCopyError(f"{path}: another process found the kept copy damaged and dropped its end: load again.")
        try:
            yield file, file.all_chunks[:count]
        except bstk.DamagedError as error:
            if error.chunk is None:
                raise
            if _drop_damaged(path, error.chunk):
                state = "The kept copy is dropped from there on: load again to fetch it anew."
            else:
                state = (
                    "The kept copy matches its digest now: load again. If that ends so too, the file was made wrongly."
                )
            raise KeptCopyError(f"{error} {state}") from None


def _drop_damaged(path: Path, chunk: bstk.Chunk) -> bool:
    """Cut a kept file off before a chunk that does not match its digest there; say whether the chunk is gone, through whomever."""
    with LockedFile(path, wait=True) as kept, os_errors(kept.path):
        if kept.length < chunk.end:
            return True
        if intact(kept, [chunk]) == chunk.end:
            return False
        kept.shorten(chunk.offset)
    return True


class _Kept:
    """A file on a server of which the beginning is on disk too; tables are read there, the rest comes from the server."""

    def __init__(self, remote: bstk.HttpSource, path: Path):
        self.name = remote.name
        self.length = remote.length
        self._remote = remote
        self._path = path
        self.pieces = remote.pieces

    def read(self, offset: int, length: int) -> bytes:
        # The preamble is the server's: it says how much of the file there is.
        if offset >= preamble.LENGTH and self._path.is_file():
            with closing(bstk.FileSource(self._path)) as kept:
                data = kept.read(offset, length)
            if len(data) == length:
                return data
        return self._remote.read(offset, length)

    def close(self) -> None:
        pass  # the owner closes the connections


def _fetch(remote: bstk.HttpSource, mb: Budget | None, strict: bool, warn: bool) -> tuple[Path, int]:
    """Make sure that all within the budget is kept; return where, and how many chunks that is."""
    reader = _open_with_kept_tables(remote, strict, warn)
    cut = reader.fit(mb)
    path = kept_path(reader.root)
    with os_errors(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with LockedFile(path, create=True, wait=True) as kept:
        with os_errors(kept.path):
            begin(kept, reader)
            missing = cut.file_bytes - kept.length
        if missing > 0:
            with _progress(remote, missing) as advance:
                extend(kept, reader, reader.all_chunks[: cut.chunks], advance)
    return path, cut.chunks


def _open_with_kept_tables(remote: bstk.HttpSource, strict: bool, warn: bool) -> bstk.Reader:
    head = remote.read(0, preamble.LENGTH)
    if len(head) == preamble.LENGTH and head.startswith(preamble.MAGIC):
        kept = _Kept(remote, kept_path(preamble.parse(head).root()))
        # Whichever is damaged: the server's file is refused below, and a kept one is begun anew under its lock, by `begin`.
        with suppress(bstk.DamagedError):
            return bstk.open(kept, strict=strict, warn=warn)
    return bstk.open(remote, strict=strict, warn=warn)


@contextmanager
def _progress(remote: bstk.HttpSource, total: int) -> Iterator[Callable[[int], None]]:
    # disable=None: drawn on terminals only.
    with tqdm(
        total=total, desc="fetch", unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None
    ) as bar:
        if not bar.disable:
            remote.notify = bar.set_postfix_str
        yield bar.update
