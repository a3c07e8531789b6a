"""Fetching the first part of a file on a server, so that a transfer that breaks off goes on where it was."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from . import opening
from .copying import Progress, extend, extend_from_cut, header_of, intact, overwrite_preamble
from .cuts import Cut
from .descriptors import mode_of_new
from .errors import BstkError, DamagedError, OutputError, ResourceError, UnsupportedVersionError, os_errors
from .files import remove_leftovers, require_free, sync_folder, target_of
from .locked import Borrowed, LockedFile
from .preamble import LENGTH, MAGIC, parse
from .reader import Reader


def part_of(dst: str | os.PathLike[str]) -> str:
    """Return the path of the file that keeps what has arrived for `dst`."""
    return os.path.realpath(dst) + ".part"


def download(
    reader: Reader,
    cut: Cut,
    dst: str | os.PathLike[str],
    seal: int,
    progress: Progress | None = None,
    overwrite: bool = True,
    begun: LockedFile | None = None,
) -> None:
    """Fetch a cut of a file to `dst`, which appears whole or not at all.

    Until then what has arrived is in ``DST.part``, and stays there if this ends early. It is used again by a later call
    if its header is that of the file, byte for byte but for the seal, and each of its chunks matches its digest.

    Parameters
    ----------
    reader : Reader
        The file to read.
    cut : Cut
        What to keep.
    dst : path
        Where it goes.
    seal : int
        The seal to write, or 0 for none.
    progress : callable or None
        Called with the number of bytes that are there, for those of an earlier call at once.
    overwrite : bool
        Replace what is at `dst`.
    begun : LockedFile or None
        What is at `dst`, if it is a smaller cut of the same file. What it has and ``DST.part`` has not is copied from it and
        not fetched.

    Raises
    ------
    UsageError
        Something is at `dst` that is not to be replaced. If it appeared while this fetched, what has arrived is kept.
    BusyError
        Another process fetches to `dst`.
    DamagedError
        A chunk that arrived, or one of `begun`, does not match its digest. What came before it is kept.
    RemoteError
        The transfer broke off, or the file changed on the server.
    ResourceError, OutputError
        It cannot be written.
    """
    if not overwrite:
        require_free(dst)
    target = target_of(dst)
    _require_plain(part_of(dst))
    chunks = reader.all_chunks[: cut.chunks]
    remove_leftovers(target)
    with LockedFile(part_of(dst), create=True, mode=mode_of_new(target)) as part, _room_told(part):
        with os_errors(part.path):
            _require_ours(part, reader)
            part.prepare(target)
            begin(part, reader)
            part.shorten(intact(part, chunks))
            if progress is not None:
                progress(part.length)
        if begun is not None:
            with opening.open(Borrowed(begun), warn=False) as smaller:
                extend_from_cut(part, smaller, chunks, progress)
        extend(part, reader, chunks, progress)
        if not overwrite:
            require_free(dst)
        if begun is not None:
            begun.require_there()
        overwrite_preamble(part, reader.preamble.sealed(seal).to_bytes())
        try:
            with os_errors(os.fspath(dst)):
                part.rename(target, begun)
        except BstkError:  # and no interruption, which may come when the file is in its place
            with suppress(BstkError):  # sealed, what stays would be somebody's own file
                overwrite_preamble(part, reader.preamble.sealed(0).to_bytes())
            raise
    sync_folder(os.path.dirname(target))


def _require_plain(part: str) -> None:
    """Raise OutputError if ``DST.part`` is no file that can be written to: nothing is written through a link."""
    what = "a link" if os.path.islink(part) else "a folder" if os.path.isdir(part) else ""
    if what:
        raise _in_the_way(part, what)


def _in_the_way(part: str, what: str) -> OutputError:
    return OutputError(f"{part}: in the way: it is {what}. Move it away, and give the same command again.")


def _require_ours(part: LockedFile, reader: Reader) -> None:
    """Raise OutputError if ``DST.part`` is no .bstk file, or one of its own: complete, or cut on purpose, of another model."""
    there = part.read(0, LENGTH)
    if not _may_be_ours(there):
        raise _in_the_way(part.path, "no part of a .bstk file")
    try:
        if _is_stopped(part) or parse(there).root() == reader.root:
            return
    except DamagedError:  # nobody's good file; `begin` begins it anew
        return
    except UnsupportedVersionError:
        pass
    raise _in_the_way(part.path, "a .bstk file of its own")


def begin(part: LockedFile, reader: Reader) -> None:
    """Make `part` the beginning of the file: keep it if it is that already, else let it be the header alone.

    Raises
    ------
    OutputError
        It holds something else than a .bstk file, which is not overwritten.
    """
    header = header_of(reader, 0)
    there = part.read(0, len(header))
    if not _may_be_ours(there):
        raise _in_the_way(part.path, "no part of a .bstk file")
    # The preamble pins the tables and they pin all chunks, so equal headers mean the same file. Only the seal and its
    # CRC may differ.
    if _unsealed(there) != header:
        part.shorten(0)
    part.write(0, header)


def remove_rests(dst: str | os.PathLike[str], source: str = "") -> None:
    """Delete what earlier, stopped runs left beside `dst`, now that it is as it was to be: temporary files, and a download's part.

    Of that only what a stopped download is: the beginning of a .bstk file, not sealed. What is whole or sealed is left alone, and so is
    another file, a link, a download that still runs, and `source`, the file that `dst` was made from. If it cannot be deleted,
    it stays.
    """
    remove_leftovers(os.path.realpath(dst))
    path = part_of(dst)
    with suppress(OSError, BstkError):
        if not stat.S_ISREG(os.lstat(path).st_mode) or (os.path.exists(source) and os.path.samefile(path, source)):
            return
        with LockedFile(path) as part:
            ours = _is_stopped(part)
            if ours and os.name != "nt":  # which cannot delete an open file
                os.unlink(path)
        if ours and os.name == "nt":
            os.unlink(path)


@contextmanager
def _room_told(part: LockedFile) -> Iterator[None]:
    """Say of a full disk which file of this package takes room on it."""
    try:
        yield
    except ResourceError as error:
        if not part.length:
            raise
        error.args = (
            f"{error.args[0]} What has arrived is kept in {part.path} and is where the same command goes on; delete it to have "
            "its room back.",
            *error.args[1:],
        )
        raise


def _may_be_ours(there: bytes) -> bool:
    """Whether a file that begins so may be the beginning of a .bstk file."""
    return there[: len(MAGIC)] == MAGIC[: len(there)]


def _is_stopped(part: LockedFile) -> bool:
    """Whether a file is what a download leaves that was stopped: empty, a part of the preamble, or unsealed and not whole.

    Raises
    ------
    DamagedError, UnsupportedVersionError
        Its preamble is not one that a download writes.
    """
    there = part.read(0, LENGTH)
    if not _may_be_ours(there):
        return False
    if len(there) < LENGTH:
        return True
    preamble = parse(there)
    return not preamble.seal and part.length < preamble.full_length


def _unsealed(header: bytes) -> bytes:
    """Return a header with seal 0; one that is too short or damaged as it is."""
    try:
        return parse(header[:LENGTH]).sealed(0).to_bytes() + header[LENGTH:] if len(header) >= LENGTH else header
    except BstkError:
        return header
