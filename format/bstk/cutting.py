"""Cutting a file: a shorter prefix, with the length it was cut to written into its preamble."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

from . import preamble, reader
from .budget import Budget, mb_ceil
from .errors import PartialWarning, UnsupportedVersionError, UsageError, writing
from .files import replacing
from .reader import Cut, Reader
from .sources import read_exactly

_PIECE = 4 * 2**20  # bytes copied at a time


def truncate(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str] | None,
    mb: Budget,
    seal: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Cut:
    """Cut a file to at most `mb` megabytes (2**20 bytes), both as a file and as weights in memory.

    The bytes of the chunks are those of `src`; only the seal and the CRC in the preamble differ. Memory stays small
    however large the file is.

    Parameters
    ----------
    src : path
        The file to cut: whole, sealed or partial.
    dst : path or None
        Where the cut goes, replacing what is there when all of it is written. None cuts `src` in place; at every step of
        that the file on disk is valid, so a crash leaves it whole, partial or sealed, never broken.
    mb : int, float, str or Decimal
        The budget.
    seal : bool
        Write the length into the preamble, so that the cut is known to be meant. Without it the seal is 0, and an
        unsealed `src` gives exactly its first bytes.
    progress : callable or None
        Called with the number of bytes of each piece copied; never when cutting in place, which copies nothing.

    Returns
    -------
    Cut
        What was kept.

    Raises
    ------
    UsageError
        `mb` is no positive number, or so large that nothing is cut; or `dst` is `src`.
    BudgetError
        The smallest model does not fit.
    UnsupportedVersionError
        The file has a feature this package can read but not rewrite.
    NotBstkError, DamagedError
        `src` is not a valid file.
    ResourceError, OutputError
        The result cannot be written; nothing was changed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PartialWarning)  # cutting is the cure that the warning names
        source = reader.open(src)
    with source:
        cut = plan(source, mb)
        if dst is None:
            # Windows refuses to shorten a file that is open elsewhere.
            source.close()
            _cut_in_place(os.fspath(src), source, cut, seal)
            return cut
        if os.path.exists(dst) and os.path.samefile(src, dst):
            raise UsageError(f"{os.fspath(dst)}: the output is the input. To cut it in place, give no output.")
        with replacing(dst) as (sink, temporary):
            with writing(os.fspath(dst)):
                sink.write(_preamble_of(source, cut, seal))
            position = preamble.LENGTH
            while position < cut.file_bytes:
                length = min(_PIECE, cut.file_bytes - position)
                piece = read_exactly(source.source, position, length, os.fspath(src))
                with writing(os.fspath(dst)):
                    sink.write(piece)
                position += length
                if progress is not None:
                    progress(length)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PartialWarning)  # what seal=False asks for
                reader.open(temporary).close()
    return cut


def plan(source: Reader, mb: Budget) -> Cut:
    """Return what `truncate` would keep of an open file.

    Raises
    ------
    UsageError, BudgetError, UnsupportedVersionError
        As in `truncate`.
    """
    name = source.source.name
    if source.preamble.read_only_compatible:
        raise UnsupportedVersionError(
            f"{name}: the file has features this version of bstk can read but not rewrite (read-only-compatible flags "
            f"{source.preamble.read_only_compatible:#x}). Upgrade bstack to cut it."
        )
    cut = source.fit(mb)
    # A partial file that fits is still worth cutting: to the end of its last whole chunk, and sealed.
    if cut.chunks == len(source.chunks) and source.state != "partial":
        raise UsageError(
            f"{name}: nothing to cut: all of it fits in {mb_ceil(cut.budget)} MB, and the budget is {mb} MB. "
            "Give a smaller budget, or use the file as it is."
        )
    return cut


def _preamble_of(source: Reader, cut: Cut, seal: bool) -> bytes:
    return source.preamble.sealed(cut.file_bytes if seal else 0).to_bytes()


def _cut_in_place(path: str, source: Reader, cut: Cut, seal: bool) -> None:
    """Unseal, shorten, seal, each on disk before the next begins: unsealed, the file is valid at either length."""
    with writing(path), open(path, "r+b", buffering=0) as file:
        steps = []
        if source.seal:
            steps.append(lambda: _overwrite_preamble(file, source.preamble.sealed(0).to_bytes()))
        steps.append(lambda: file.truncate(cut.file_bytes))
        if seal:
            steps.append(lambda: _overwrite_preamble(file, _preamble_of(source, cut, seal)))
        for step in steps:
            step()
            os.fsync(file.fileno())


def _overwrite_preamble(file, data: bytes) -> None:
    file.seek(0)
    if file.write(data) != len(data):
        raise OSError("the preamble was written only in part")
