"""Keep what was fetched of models behind URLs, each in a file that grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import bstk
from bstack.folders import cache_folder
from bstack.progress import ByteProgress, no_progress
from bstk import preamble
from bstk.atomic import LockedFile
from bstk.errors import os_errors
from bstk.transfer import begin, extend, intact

__all__ = ["KeptCopyError", "cached", "kept_path"]


class KeptCopyError(bstk.DamagedError):
    """The kept copy of a model was damaged on this disk, or became shorter while it was read. Loading again fetches it."""


def kept_path(root: bytes) -> Path:
    """Return the file that keeps the model with that root digest, from any URL."""
    return cache_folder("models") / f"{root.hex()}.bstk"


@contextmanager
def cached(
    url: str,
    budget: int | None,
    strict: bool,
    warn: bool = True,
    notify: Callable[[str], None] | None = None,
    progress: ByteProgress = no_progress,
    *,
    model_only: bool = False,
) -> Iterator[tuple[bstk.Reader, tuple[bstk.Chunk, ...]]]:
    """Fetch the missing part of what a budget in bytes needs of a model behind a URL.

    Each call fetches the first 64 KiB, to learn which model the server has, and nothing else twice. Of several processes one
    fetches, and the others wait for it. `model_only` leaves out what restores the original. `strict` refuses a file that is partial on the server, `warn` warns about one, and
    `notify` receives one line about each retry.

    Yields the kept file and its chunks within the budget, which may be fewer than are kept. Raises KeptCopyError for a damaged
    kept chunk: the kept copy is dropped from there on, and the next call fetches it again.
    """
    with closing(bstk.HttpSource(url, notify)) as remote:
        try:
            path, count = _fetch(remote, budget, strict, warn, progress, model_only)
        except bstk.RemoteChangedError:
            remote.restart()
            path, count = _fetch(remote, budget, strict, warn, progress, model_only)
    with bstk.open(path, warn=False) as file:  # `_fetch` warned of a file that is partial on the server
        if len(file.chunks) < count:
            raise KeptCopyError(
                f"{path}: another process found the kept copy damaged and dropped its end.", hint="Load again."
            )
        try:
            yield file, file.all_chunks[:count]
        except bstk.DamagedError as error:
            if error.chunk is None:
                raise
            if _drop_damaged(path, error.chunk):
                state = "The kept copy is dropped from there on. Load again to fetch it."
            else:
                state = (
                    "The kept copy matches its digest now. Load again; if that fails too, the file was made wrongly."
                )
            raise KeptCopyError(f"{error} {state}") from None


def _drop_damaged(path: Path, chunk: bstk.Chunk) -> bool:
    """Cut a kept file before a chunk that does not match its digest; return whether the chunk is gone."""
    with LockedFile(path, wait=True) as kept, os_errors(kept.name):
        if kept.length < chunk.end:
            return True
        if intact(kept, [chunk]) == chunk.end:
            return False
        kept.shorten(chunk.offset)
    return True


class _Kept:
    """A file on a server whose beginning is on disk too; tables are read from disk, the rest comes from the server."""

    def __init__(self, remote: bstk.HttpSource, path: Path):
        self.name = remote.name
        self.length = remote.length
        self._remote = remote
        self._path = path
        self.pieces = remote.pieces

    def read(self, offset: int, length: int) -> bytes:
        # The preamble comes from the server: it says how much of the file there is.
        if offset >= preamble.LENGTH and self._path.is_file():
            with closing(bstk.FileSource(self._path)) as kept:
                data = kept.read(offset, length)
            if len(data) == length:
                return data
        return self._remote.read(offset, length)

    def close(self) -> None:
        pass  # the owner closes the connections


def _fetch(
    remote: bstk.HttpSource, budget: int | None, strict: bool, warn: bool, progress: ByteProgress, model_only: bool
) -> tuple[Path, int]:
    """Fetch what is missing within the budget; return the kept file and its number of chunks within the budget."""
    reader = _open_with_kept_tables(remote, strict, warn)
    cut = reader.fit(budget=budget)
    if model_only:
        cut = min(cut, reader.model)
    path = kept_path(reader.root)
    with os_errors(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with LockedFile(path, create=True, wait=True) as kept:
        with os_errors(kept.name):
            begin(kept, reader)
            missing = cut.file_bytes - kept.length
        if missing > 0:
            with progress("fetch", missing) as advance:
                extend(kept, reader, reader.all_chunks[: cut.chunks], advance)
    return path, cut.chunks


def _open_with_kept_tables(remote: bstk.HttpSource, strict: bool, warn: bool) -> bstk.Reader:
    head = remote.read(0, preamble.LENGTH)
    if len(head) == preamble.LENGTH and head.startswith(preamble.MAGIC):
        kept = _Kept(remote, kept_path(preamble.parse(head).root()))
        # If the server's file is damaged it is refused below; a damaged kept file is begun anew by `begin`, under its lock.
        with suppress(bstk.DamagedError):
            return bstk.open(kept, strict=strict, warn=warn)
    return bstk.open(remote, strict=strict, warn=warn)
