"""Growing a cut: the blocks that come next are added from a larger file of the same model."""

from __future__ import annotations

import os
from typing import NamedTuple

from . import opening
from .budget import Budget, mb_ceil
from .copying import Progress, extend, overwrite_preamble
from .cuts import Cut
from .cutting import write_cut
from .download import download, part_of, remove_rests
from .errors import (
    BstkError,
    DamagedError,
    OtherModelError,
    OutputError,
    RemoteChangedError,
    RemoteError,
    ResourceError,
    UsageError,
    os_errors,
)
from .files import remove_leftovers
from .locked import Borrowed, LockedFile
from .preamble import LENGTH, SEAL, parse
from .reader import Reader


def grow(
    path: str | os.PathLike[str],
    mb: Budget,
    source: str | os.PathLike[str] | Reader,
    progress: Progress | None = None,
    in_place: bool = False,
) -> Cut:
    """Grow a file to at most `mb` megabytes (2**20 bytes), both as a file and as weights in memory.

    The result is byte for byte what `truncate` makes of the larger file with the same budget, or the larger file itself if
    all of it fits and it is whole. Only the missing bytes are read of `source`.

    A new file is written, with a copy of what is there, and takes the old one's place when it is whole. Whatever ends this
    earlier, a kill too, leaves the old file. Each chunk is checked against its digest. Of a URL, what has arrived is kept in
    ``PATH.part``, and the same call goes on from there.

    With `in_place` the file itself is extended, which needs no room for a second copy and checks only what is added. Nothing is
    changed before the first missing bytes have arrived. If it fails, the file is as it was before, byte for byte. With a URL it
    is so where the disk refuses; where the transfer fails or is interrupted, what has arrived is kept if the file is larger with
    it: then the file is partial, which is valid, and not sealed, and the same call goes on from there. A killed process leaves
    it partial too.

    Parameters
    ----------
    path : path
        The file to grow: sealed or partial.
    mb : int, float, str or Decimal
        The budget.
    source : path, URL or Reader
        A larger file of the same model. A reader is left open.
    progress : callable or None
        Called with the number of bytes of each piece of the new file, those copied from the old one included; with `in_place`,
        of each piece appended.
    in_place : bool
        Extend the file itself.

    Returns
    -------
    Cut
        What the file is now.

    Raises
    ------
    OtherModelError
        The two have different root digests.
    UsageError
        There is nothing to add within `mb`, or `source` is `path`.
    BusyError
        Another process cuts or grows the file, or fetches to it, or replaced or deleted it while it grew.
    UnsupportedVersionError
        The file has a feature this package can read but not rewrite.
    NotBstkError, DamagedError
        One of the two is not a valid file, or a chunk is damaged.
    RemoteError
        The URL cannot be read; see its subclasses.
    ResourceError, OutputError
        The file cannot be written. If it was extended in place and cannot be brought back to what it was either, the message
        says what it is now.
    """
    with opening.open(
        path, warn=False
    ) as small:  # what is no good file is refused before anything is asked of a server
        opening.require_rewritable(small)
    method = _grow_in_place if in_place else _replace
    if isinstance(source, Reader):
        return method(path, mb, source, progress)
    with opening.open(source, warn=False) as larger:
        return method(path, mb, larger, progress)


def _replace(path: str | os.PathLike[str], mb: Budget, larger: Reader, progress: Progress | None) -> Cut:
    """Write a new file and put it in the old one's place, which is locked against others that cut or grow it."""
    with LockedFile(path) as file:
        try:
            return _write(file, mb, larger, progress)
        except RemoteChangedError:
            return _write(file, mb, opening.reopen(larger), progress)


def _write(file: LockedFile, mb: Budget, larger: Reader, progress: Progress | None) -> Cut:
    with opening.open(Borrowed(file), warn=False) as small:
        cut = plan_growth(small, mb, larger)
        missing = max(0, cut.file_bytes - small.length)
    make = download if opening.is_remote(larger) else write_cut
    try:
        make(larger, cut, file.path, _seal(larger, cut), progress, begun=file)
    except (ResourceError, OutputError) as error:
        if error.__cause__ is None:  # not the system's refusal
            raise
        error.args = (
            f"{error.args[0]} To take the old file's place, a new one of {mb_ceil(cut.file_bytes)} MB was to be written beside "
            f"it; growing in place (--in-place) adds {mb_ceil(missing)} MB to the file itself.",
            *error.args[1:],
        )
        raise
    return cut


def _seal(larger: Reader, cut: Cut) -> int:
    """Return the seal of a cut: none for all of the complete file."""
    return 0 if cut.file_bytes == larger.full_length else cut.file_bytes


def _grow_in_place(path: str | os.PathLike[str], mb: Budget, larger: Reader, progress: Progress | None) -> Cut:
    with LockedFile(path) as file:
        remove_leftovers(os.path.realpath(path))
        old = _old(file)
        try:
            try:
                cut = _append(file, mb, larger, progress)
            except RemoteChangedError:
                cut = _append(file, mb, opening.reopen(larger), progress)
        except BaseException as error:
            arrived = opening.is_remote(larger) and isinstance(error, _TRANSFER)
            if not (arrived and file.length > old.length):
                _bring_back(file, old, error)
            if isinstance(error, ResourceError) and os.path.exists(part := part_of(path)):
                error.args = (f"{error.args[0]} {part} is of an earlier run and takes room too.", *error.args[1:])
            raise
        file.require_there()
    remove_rests(path, larger.source.name)
    return cut


# Of a URL, what has arrived when one of these comes is worth more than the old file.
_TRANSFER = (RemoteError, DamagedError, KeyboardInterrupt)


class _Old(NamedTuple):
    """What growing may change of a file. `tail` is what follows its last complete chunk, less than one chunk."""

    preamble: bytes
    length: int
    tail: bytes


def _old(file: LockedFile) -> _Old:
    with opening.open(Borrowed(file), warn=False) as small, os_errors(file.path):
        end = small.chunks[-1].end
        return _Old(file.read(0, LENGTH), file.length, file.read(end, file.length - end))


def _append(file: LockedFile, mb: Budget, larger: Reader, progress: Progress | None) -> Cut:
    with opening.open(Borrowed(file), warn=False) as small:
        cut = plan_growth(small, mb, larger)
    unsealed = small.preamble.sealed(0).to_bytes()

    def unseal() -> None:
        if small.seal:
            overwrite_preamble(file, unsealed)

    extend(file, larger, larger.all_chunks[: cut.chunks], progress, before=unseal)
    overwrite_preamble(file, small.preamble.sealed(_seal(larger, cut)).to_bytes())
    return cut


def _bring_back(file: LockedFile, old: _Old, error: BaseException) -> None:
    """Make a file that was not grown to the end what it was before: unseal, its length, seal, each on disk before the next.

    Raises
    ------
    OutputError
        It cannot be, and `error` is none of ours. To one of ours its message is added instead.
    """
    preamble, length, tail = old
    end = length - len(tail)
    try:
        there = file.read(0, LENGTH)
        if there == preamble and file.length == length and file.read(end, len(tail)) == tail:
            return
        # The last step of growing may have written the new seal. The old one is on the disk only once the length is.
        if any(there[SEAL]):
            file.write(0, parse(preamble).sealed(0).to_bytes())
            file.sync()
        file.shorten(min(length, file.length))
        if tail:
            file.write(end, tail)
        file.sync()
        file.write(0, preamble)
        file.sync()
    except OSError as problem:
        message = (
            f"The file could not be brought back to what it was: {problem.strerror or problem}. {_state_of(file.path)}"
        )
        if not isinstance(error, BstkError):
            raise OutputError(f"{file.path}: growing it failed ({type(error).__name__}). {message}") from error
        error.args = (f"{error.args[0]} {message}", *error.args[1:])


def _state_of(path: str) -> str:
    """Return what to say of a file that could be neither grown nor brought back."""
    try:
        with opening.open(path, warn=False) as file:
            if file.state == "partial":
                return (
                    f"It is partial now: a valid model with {len(file.chunks)} chunks in {file.length} bytes. Once the disk "
                    "can be written to, the same command goes on from there."
                )
            return f"It is {file.state} now, with {len(file.chunks)} chunks in {file.length} bytes."
    except (BstkError, OSError) as problem:
        return f"What it is now cannot be said ({problem}); check it with bstack verify."


def plan_growth(small: Reader, mb: Budget, larger: Reader) -> Cut:
    """Return what `grow` would make of an open file.

    Raises
    ------
    OtherModelError, UsageError, UnsupportedVersionError
        As in `grow`.
    """
    name, other = small.source.name, larger.source.name
    opening.require_rewritable(small)
    if small.root != larger.root:
        raise OtherModelError(
            f"{name}: {other} belongs to another model: its root digest is {larger.root.hex()}, that of {name} is "
            f"{small.root.hex()}. Grow it from the file it was cut from."
        )
    if os.path.exists(other) and os.path.samefile(name, other):
        raise UsageError(f"{name}: the file cannot grow from itself. Name a larger file of the same model.")
    cut = larger.fit(mb)
    here = small.fit()
    # A partial file that has all blocks already still gets its seal.
    if cut.chunks < here.chunks or (cut.chunks == here.chunks and small.state != "partial"):
        if here.chunks >= len(larger.chunks):
            why = (
                f"{other} has no more than it, {mb_ceil(larger.fit().budget)} MB. Name a larger file of the same model."
            )
        else:
            why = (
                f"it takes {mb_ceil(here.budget)} MB already, and the next block does not fit in {mb} MB. "
                f"Give a larger budget; all of {other} takes {mb_ceil(larger.fit().budget)} MB."
            )
        raise UsageError(f"{name}: nothing to add: {why}")
    return cut
