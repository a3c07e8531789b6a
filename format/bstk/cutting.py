"""Cutting a file: a shorter prefix, with the length it was cut to written into its preamble."""

from __future__ import annotations

import os

from . import opening, urls
from .budget import Budget, mb_ceil
from .copying import Progress, copy_chunks, header_of
from .cuts import Cut
from .download import download, remove_rests
from .errors import RemoteChangedError, UsageError, os_errors
from .files import replacing
from .locked import Borrowed, LockedFile
from .reader import Reader


def truncate(
    src: str | os.PathLike[str] | Reader,
    dst: str | os.PathLike[str] | None,
    mb: Budget,
    seal: bool = True,
    progress: Progress | None = None,
    overwrite: bool = True,
) -> Cut:
    """Cut a file to at most `mb` megabytes (2**20 bytes), both as a file and as weights in memory.

    The bytes of the chunks are those of `src`; only the seal and the CRC in the preamble differ. Each chunk is checked
    against its digest while it is copied. Memory stays small however large the file is.

    Of a URL only the cut is fetched. What has arrived is kept in ``DST.part``, and the same call goes on from there; any other
    call that succeeds with `dst` deletes it.

    Parameters
    ----------
    src : path, URL or Reader
        The file to cut: whole, sealed or partial. A reader is left open.
    dst : path or None
        Where the cut goes, replacing what is there when all of it is written. None cuts `src` in place; at every step of
        that the file on disk is valid, so a crash leaves it whole, partial or sealed, never broken. Nothing is read for
        it but the header, so nothing is checked.
    mb : int, float, str or Decimal
        The budget. For a URL it may be more than the file: then all of it is fetched, and is what it is there.
    seal : bool
        Write the length into the preamble, so that the cut is known to be meant. Without it the seal is 0, and an
        unsealed `src` gives exactly its first bytes.
    progress : callable or None
        Called with the number of bytes of each piece copied; never when cutting in place, which copies nothing.
    overwrite : bool
        Replace what is at `dst`. Without it that is refused at the start, and again at the end if it appeared meanwhile.

    Returns
    -------
    Cut
        What was kept.

    Raises
    ------
    UsageError
        `mb` is no positive number, or so large that nothing is cut; or `dst` is `src`, None for a URL, or there already.
    BusyError
        Another process changes the file in place, or fetches to the same `dst`.
    BudgetError
        The smallest model does not fit.
    UnsupportedVersionError
        The file has a feature this package can read but not rewrite.
    NotBstkError, DamagedError
        `src` is not a valid file, or a chunk of the cut is damaged.
    RemoteError
        The URL cannot be read; see its subclasses.
    ResourceError, OutputError
        The result cannot be written; nothing was changed.
    """
    if isinstance(src, Reader):
        return _truncate(src, dst, mb, seal, progress, overwrite)
    if dst is None and not urls.is_url(src):
        return _cut_in_place(os.fspath(src), mb, seal)
    with opening.open(src, warn=False) as source:  # cutting is the cure that the warning names
        return _truncate(source, dst, mb, seal, progress, overwrite)


def plan(source: Reader, mb: Budget) -> Cut:
    """Return what `truncate` would keep of an open file.

    Raises
    ------
    UsageError, BudgetError, UnsupportedVersionError
        As in `truncate`.
    """
    name = source.source.name
    opening.require_rewritable(source)
    cut = source.fit(mb)
    # A partial file that fits is still worth cutting: to the end of its last whole chunk, and sealed. And all of a file
    # on a server is worth fetching.
    if cut.chunks == len(source.chunks) and source.state != "partial" and not opening.is_remote(source):
        raise UsageError(
            f"{name}: nothing to cut: all of it fits in {mb_ceil(cut.budget)} MB, and the budget is {mb} MB. "
            "Give a smaller budget, or use the file as it is."
        )
    return cut


def _truncate(
    source: Reader,
    dst: str | os.PathLike[str] | None,
    mb: Budget,
    seal: bool,
    progress: Progress | None,
    overwrite: bool,
) -> Cut:
    name = source.source.name
    if dst is None:
        raise UsageError(f"{name}: an open file or one on a server is not cut in place. Name an output.")
    if opening.is_remote(source):
        try:
            return _fetch(source, dst, mb, seal, progress, overwrite)
        except RemoteChangedError:
            return _fetch(opening.reopen(source), dst, mb, seal, progress, overwrite)
    cut = plan(source, mb)
    if os.path.exists(dst) and os.path.exists(name) and os.path.samefile(name, dst):
        raise UsageError(f"{os.fspath(dst)}: the output is the input. To cut it in place, give no output.")
    write_cut(source, cut, dst, cut.file_bytes if seal else 0, progress, overwrite)
    return cut


def write_cut(
    source: Reader,
    cut: Cut,
    dst: str | os.PathLike[str],
    seal: int,
    progress: Progress | None = None,
    overwrite: bool = True,
    begun: LockedFile | None = None,
) -> None:
    """Write a cut of a file on disk to `dst`, which appears whole or not at all. Each chunk is checked.

    Parameters
    ----------
    source, cut
        The file and what to keep of it.
    dst : path
    seal : int
        The seal to write, or 0 for none.
    progress, overwrite
        As of `truncate`.
    begun : LockedFile or None
        What is at `dst`, if it is a smaller cut of the same file: its chunks are copied from there.
    """
    chunks = source.all_chunks[: cut.chunks]
    with replacing(dst, overwrite, begun) as (sink, temporary):

        def write(data: bytes | memoryview) -> None:
            with os_errors(os.fspath(dst)):
                sink.write(data)
            if progress is not None:
                progress(len(data))

        write(header_of(source, seal))
        there = 0
        if begun is not None:
            with opening.open(Borrowed(begun), warn=False) as smaller:
                there = len(smaller.chunks)
                copy_chunks(smaller, chunks[:there], write)
        copy_chunks(source, chunks[there:], write)
        opening.open(temporary, warn=False).close()
    remove_rests(dst, source.source.name)


def _fetch(
    source: Reader, dst: str | os.PathLike[str], mb: Budget, seal: bool, progress: Progress | None, overwrite: bool
) -> Cut:
    cut = plan(source, mb)
    everything = cut.chunks == len(source.chunks) and source.state != "partial"
    length = source.seal if everything else cut.file_bytes
    download(source, cut, dst, length if seal else 0, progress, overwrite)
    return cut


def _cut_in_place(path: str, mb: Budget, seal: bool) -> Cut:
    """Unseal, shorten, seal, each on disk before the next begins: unsealed, the file is valid at either length."""
    opening.open(
        path, warn=False
    ).close()  # what is no good file is refused as such, and not for want of the right to write
    with LockedFile(path) as file:
        # Read again: until it was locked, another process may have changed it.
        with opening.open(Borrowed(file), warn=False) as source:
            cut = plan(source, mb)
        steps = []
        if source.seal:
            steps.append(lambda: file.write(0, source.preamble.sealed(0).to_bytes()))
        steps.append(lambda: file.shorten(cut.file_bytes))
        if seal:
            steps.append(lambda: file.write(0, source.preamble.sealed(cut.file_bytes).to_bytes()))
        with os_errors(path):
            for step in steps:
                step()
                os.fsync(file.fileno())
    remove_rests(path)
    return cut
