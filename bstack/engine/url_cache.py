"""Keep what was fetched of models behind URLs, each in a file that grows."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import bstk
from bstack.errors import one_line
from bstack.folders import cache_folder
from bstack.progress import ByteProgress, no_progress
from bstk import preamble
from bstk.atomic import LockedFile
from bstk.errors import UsageError, os_errors
from bstk.transfer import begin, extend, header_of, intact

__all__ = ["KeptCopyError", "cached", "kept_path"]

# Seconds between two looks at a file that another process fetches.
POLL = 0.05


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
    ahead: bool = False,
) -> Iterator[tuple[bstk.Reader, tuple[bstk.Chunk, ...]]]:
    """Fetch the missing part of what a budget in bytes needs of a model behind a URL.

    Each call fetches the first 64 KiB, to learn which model the server has, and nothing else twice. Of several processes one
    fetches, and the others wait for it. `model_only` leaves out what restores the original. `strict` refuses a file that is partial on the server, `warn` warns about one, and
    `notify` receives one line about each retry.

    Yields the kept file and its chunks within the budget, which may be fewer than are kept. With `ahead` they are those that
    are there when the base model is, and the file has the length that it will have: its source fetches the rest from the first
    call of its `arrived` on, and `notify` receives a line about what stops that, once. Raises KeptCopyError for a damaged
    kept chunk: the kept copy is dropped from there on, and the next call fetches it again.
    """
    with ExitStack() as stack:
        remote = stack.enter_context(closing(bstk.HttpSource(url, notify)))
        try:
            path, reader, cut = _fetch(remote, budget, strict, warn, progress, model_only, ahead)
        except bstk.RemoteChangedError:
            remote.restart()
            path, reader, cut = _fetch(remote, budget, strict, warn, progress, model_only, ahead)
        source = _Arriving(path, remote, reader, cut) if ahead else bstk.FileSource(path)
        if ahead:
            stack.pop_all()  # the source closes the connections
    with bstk.open(source, warn=False) as file:  # `_fetch` warned of a file that is partial on the server
        here = source.here if isinstance(source, _Arriving) else source.length
        there = tuple(chunk for chunk in file.chunks[: cut.chunks] if chunk.end <= here)
        if len(there) < (file.base_count if ahead else cut.chunks):
            raise KeptCopyError(
                f"{path}: another process found the kept copy damaged and dropped its end.", hint="Load again."
            )
        try:
            yield file, there
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


class _Arriving(bstk.FileSource):
    """A kept file as long as it will be; what is missing comes from the server in a thread, or from another process."""

    def __init__(self, path: Path, remote: bstk.HttpSource, reader: bstk.Reader, cut: bstk.Cut):
        super().__init__(path)
        self.length = cut.file_bytes
        self._remote, self._reader, self._cut = remote, reader, cut
        self._notify, remote.notify = remote.notify, None  # a text is being written: retries stay quiet
        self._changing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._error: Exception | None = None

    @property
    def here(self) -> int:
        """Bytes that are there."""
        return os.fstat(self._file.fileno()).st_size

    def arrived(self, end: int) -> bool:
        """Return whether the first `end` bytes are there; if not, they are being fetched.

        Raises, from one call, what has stopped that. The next call begins anew.
        """
        if self.here >= end:
            return True
        with self._changing:
            if self._thread is None:
                self._thread = threading.Thread(target=self._fetch, name="bstack-fetch", daemon=True)
                self._thread.start()
            elif not self._thread.is_alive():
                self._thread = None
                error, self._error = self._error, None
                if error is not None:
                    raise error
        return False

    def _fetch(self) -> None:
        try:
            with LockedFile(self.name, wait=True) as kept:
                with os_errors(self.name):
                    begin(kept, self._reader)
                extend(kept, self._reader, self._reader.all_chunks[: self._cut.chunks], self._go_on)
        except Exception as error:  # for the caller of `arrived`
            self._error = error
            if self._notify is not None and not self._stop.is_set():
                why = one_line(error).removeprefix(f"{self._remote.name}: ")
                with suppress(Exception):  # standard error may be closed
                    self._notify(f"the model keeps its size, because the rest is not fetched: {why}")
                self._notify = None
        if self._stop.is_set():
            self._remote.close()

    def _go_on(self, _count: int) -> None:
        if self._stop.is_set():
            raise InterruptedError

    def close(self) -> None:
        """Close the file, and end the fetching with the next bytes."""
        super().close()
        self._stop.set()
        if self._thread is None or not self._thread.is_alive():
            self._remote.close()


def _fetch(
    remote: bstk.HttpSource,
    budget: int | None,
    strict: bool,
    warn: bool,
    progress: ByteProgress,
    model_only: bool,
    ahead: bool,
) -> tuple[Path, bstk.Reader, bstk.Cut]:
    """Fetch what is missing of the cut within the budget, with `ahead` of its base model; return the kept file and the cut."""
    reader = _open_with_kept_tables(remote, strict, warn)
    cut = reader.fit(budget=budget)
    if model_only:
        cut = min(cut, reader.model)
    path = kept_path(reader.root)
    with os_errors(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
    first = reader.base if ahead else cut
    with _locked(path, reader, first if ahead else None) as kept:
        if kept is not None:
            with os_errors(kept.name):
                begin(kept, reader)
                missing = first.file_bytes - kept.length
            if missing > 0:
                with progress("fetch", missing) as advance:
                    extend(kept, reader, reader.all_chunks[: first.chunks], advance)
    return path, reader, cut


@contextmanager
def _locked(path: Path, reader: bstk.Reader, enough: bstk.Cut | None) -> Iterator[LockedFile | None]:
    """Lock a kept file; yield None if another process has it and has fetched `enough`."""
    while True:
        try:
            kept = LockedFile(path, create=True, wait=enough is None)
        except UsageError:
            header = header_of(reader, 0)
            with closing(bstk.FileSource(path)) as there:
                if enough is not None and there.length >= enough.file_bytes and there.read(0, len(header)) == header:
                    yield None
                    return
            time.sleep(POLL)
        else:
            with kept:
                yield kept
            return


def _open_with_kept_tables(remote: bstk.HttpSource, strict: bool, warn: bool) -> bstk.Reader:
    head = remote.read(0, preamble.LENGTH)
    if len(head) == preamble.LENGTH and head.startswith(preamble.MAGIC):
        kept = _Kept(remote, kept_path(preamble.parse(head).root()))
        # If the server's file is damaged it is refused below; a damaged kept file is begun anew by `begin`, under its lock.
        with suppress(bstk.DamagedError):
            return bstk.open(kept, strict=strict, warn=warn)
    return bstk.open(remote, strict=strict, warn=warn)
