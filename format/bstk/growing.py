"""Growing a cut: the blocks that come next are appended from a larger file of the same model."""

from __future__ import annotations

import os

from . import opening
from .budget import Budget, mb_ceil
from .copying import Progress, extend, overwrite_preamble
from .cuts import Cut
from .errors import OtherModelError, RemoteChangedError, UsageError
from .files import LockedFile
from .reader import Reader


def grow(
    path: str | os.PathLike[str],
    mb: Budget,
    source: str | os.PathLike[str] | Reader,
    progress: Progress | None = None,
) -> Cut:
    """Grow a file to at most `mb` megabytes (2**20 bytes), both as a file and as weights in memory.

    The result is byte for byte what `truncate` makes of the larger file with the same budget, or the larger file itself if
    all of it fits and it is whole. Only the missing bytes are read, each chunk of them is checked against its digest, and
    nothing is changed before the first of them have arrived. If this ends early the file is partial: valid, larger than
    before, not sealed; the same call goes on from there.

    Parameters
    ----------
    path : path
        The file to grow: sealed or partial.
    mb : int, float, str or Decimal
        The budget.
    source : path, URL or Reader
        A larger file of the same model. A reader is left open.
    progress : callable or None
        Called with the number of bytes of each piece appended.

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
        Another process changes the file.
    UnsupportedVersionError
        The file has a feature this package can read but not rewrite.
    NotBstkError, DamagedError
        One of the two is not a valid file, or a chunk of `source` is damaged.
    RemoteError
        The URL cannot be read; see its subclasses.
    ResourceError, OutputError
        The file cannot be written.
    """
    with opening.open(path, warn=False) as small:  # what is no good file is refused before anything is asked of a server
        opening.require_rewritable(small)
    if isinstance(source, Reader):
        return _grow(path, mb, source, progress)
    with opening.open(source, warn=False) as larger:
        return _grow(path, mb, larger, progress)


def _grow(path: str | os.PathLike[str], mb: Budget, larger: Reader, progress: Progress | None) -> Cut:
    with LockedFile(path) as file:
        try:
            return _append(file, mb, larger, progress)
        except RemoteChangedError:
            return _append(file, mb, opening.reopen(larger), progress)


def _append(file: LockedFile, mb: Budget, larger: Reader, progress: Progress | None) -> Cut:
    with opening.open(file.path, warn=False) as small:
        cut = plan_growth(small, mb, larger)
    unsealed = small.preamble.sealed(0).to_bytes()

    def unseal() -> None:
        if small.seal:
            overwrite_preamble(file, unsealed)

    extend(file, larger, larger.all_chunks[: cut.chunks], progress, before=unseal)
    seal = 0 if cut.file_bytes == larger.full_length else cut.file_bytes
    overwrite_preamble(file, small.preamble.sealed(seal).to_bytes())
    return cut


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
            why = f"{other} has no more than it, {mb_ceil(larger.fit().budget)} MB. Name a larger file of the same model."
        else:
            why = (
                f"it takes {mb_ceil(here.budget)} MB already, and the next block does not fit in {mb} MB. "
                f"Give a larger budget; all of {other} takes {mb_ceil(larger.fit().budget)} MB."
            )
        raise UsageError(f"{name}: nothing to add: {why}")
    return cut
