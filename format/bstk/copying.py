"""Copying chunks, each checked against its digest before the last of its bytes is written."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence

from .errors import DamagedError, os_errors
from .index import Chunk
from .locked import LockedFile
from .preamble import LENGTH
from .reader import Reader
from .sources import pieces, read_exactly
from .urls import is_url

_PIECE = 4 * 2**20  # bytes hashed at a time

Progress = Callable[[int], None]
"""Called with the number of bytes of each piece that was written."""


def header_of(reader: Reader, seal: int) -> bytes:
    """Return the bytes of a file before its first chunk, with another seal."""
    length = reader.preamble.header_length - LENGTH
    tables = read_exactly(reader.source, LENGTH, length, f"{reader.source.name}: header")
    return reader.preamble.sealed(seal).to_bytes() + tables


def copy_chunks(
    reader: Reader,
    chunks: Sequence[Chunk],
    write: Callable[[memoryview], None],
    progress: Progress | None = None,
    there: int = 0,
    begun: hashlib._Hash | None = None,
) -> None:
    """Copy consecutive chunks of a file.

    Parameters
    ----------
    reader : Reader
        The file; what it reads is all it is used for, so `chunks` may be those of another cut of it.
    chunks : sequence of Chunk
    write : callable
        Takes the bytes in order. When it has all of a chunk, the chunk's digest was checked.
    progress : callable or None
    there : int
        Bytes of the first chunk that the copy has already and that are not read again.
    begun : hashlib object or None
        SHA-256 of these bytes, not finished.

    Raises
    ------
    DamagedError
        A chunk does not match its digest; ``error.chunk`` is that chunk. Less than all of it was written.
    """
    if not chunks:
        return
    name = reader.source.name
    position = chunks[0].offset + there
    digest = hashlib.sha256() if begun is None else begun
    left = iter(chunks)
    chunk = next(left)
    for piece in pieces(reader.source, position, chunks[-1].end - position, name):
        view = memoryview(piece)
        while view:
            part = view[: chunk.end - position]
            digest.update(part)
            position += len(part)
            if position == chunk.end:
                if digest.digest() != chunk.digest:
                    raise _damaged(name, chunk)
                chunk, digest = next(left, chunk), hashlib.sha256()
            write(part)
            if progress is not None:
                progress(len(part))
            view = view[len(part) :]


def extend(
    file: LockedFile,
    reader: Reader,
    chunks: Sequence[Chunk],
    progress: Progress | None = None,
    before: Callable[[], None] | None = None,
) -> None:
    """Append to a file that holds the first bytes of another until it ends with the last of `chunks`.

    Only what is missing is read. Whatever ends this early leaves an unsealed file valid, with more of the model than
    before: bytes of a chunk that is not complete are kept and are where the next call goes on.

    Parameters
    ----------
    file : LockedFile
        Unsealed, and at least as long as the header.
    reader : Reader
        The file to read from.
    chunks : sequence of Chunk
        Those that `file` is to hold, from chunk 0 on.
    progress : callable or None
    before : callable or None
        Called once, when the first missing bytes have arrived, before they are written.

    Raises
    ------
    DamagedError
        A chunk does not match its digest. `file` was cut back to the end of the chunk before it. If part of the chunk was in
        `file` before, it was first read anew, whole.
    OutputError, ResourceError
        `file` cannot be written.
    """
    with os_errors(file.path):
        position = file.length
    first = bisect_right([chunk.end for chunk in chunks], position)
    if first == len(chunks):
        return
    there = position - chunks[first].offset
    begun = _digest_of(file, chunks[first].offset, there)
    waiting = before

    def write(data: memoryview) -> None:
        nonlocal position, waiting
        with os_errors(file.path):
            if waiting is not None:
                waiting()
                waiting = None
            file.write(position, data)
        position += len(data)

    while True:
        try:
            return copy_chunks(reader, chunks[first:], write, progress, there, begun)
        except DamagedError as error:
            if error.chunk is not None:
                with os_errors(file.path):
                    file.shorten(min(file.length, error.chunk.offset))
            if not (there and error.chunk is chunks[first]):
                raise
        # What was there may be what is damaged.
        position, there, begun = chunks[first].offset, 0, None


def extend_from_cut(file: LockedFile, cut: Reader, chunks: Sequence[Chunk], progress: Progress | None = None) -> None:
    """As `extend`, from a smaller cut that may not have all of `chunks`: as far as it goes, its incomplete last chunk included."""
    own = chunks[: len(cut.chunks)]
    extend(file, cut, own, progress)
    if len(own) < len(chunks) and own[-1].end == file.length < cut.length:
        rest = cut.source.read(own[-1].end, min(cut.length, chunks[len(own)].end) - own[-1].end)
        with os_errors(file.path):
            file.write(own[-1].end, rest)
        if progress is not None:
            progress(len(rest))


def intact(file: LockedFile, chunks: Sequence[Chunk]) -> int:
    """Return how many bytes of `file` can be kept: up to its first damaged chunk. What follows its last chunk counts."""
    length = file.length
    for chunk in chunks:
        if chunk.end > length:
            break
        if _digest_of(file, chunk.offset, chunk.stored_length).digest() != chunk.digest:
            return chunk.offset
    return min(length, chunks[-1].end)


def overwrite_preamble(file: LockedFile, data: bytes) -> None:
    """Write a preamble of another seal, and wait until it is on the disk with all that was written before it."""
    with os_errors(file.path):
        file.sync()
        file.write(0, data)
        file.sync()


def _digest_of(file: LockedFile, offset: int, length: int) -> hashlib._Hash:
    digest = hashlib.sha256()
    stop = offset + length
    while offset < stop and (piece := file.read(offset, min(_PIECE, stop - offset))):
        digest.update(piece)
        offset += len(piece)
    return digest


def _damaged(name: str, chunk: Chunk) -> DamagedError:
    advice = "The file is damaged: make or fetch it anew."
    if is_url(name):
        advice = "Give the same command again; if that does not help, the file is damaged there."
    error = DamagedError(
        f"{name}: {chunk.describe()}: its SHA-256 does not match the index. {advice} A cut that ends before this chunk is good."
    )
    error.chunk = chunk
    return error
