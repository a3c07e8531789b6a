"""Copy chunks from a file to another, each checked against its digest before its last byte is written, and fetch cuts."""

from __future__ import annotations

import hashlib
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from .atomic import LockedFile, mode_of_new, remove_leftovers, replacing, require_free, sync_folder, target_of
from .budget import Cut
from .errors import BstkError, DamagedError, OutputError, ResourceError, UnsupportedVersionError, os_errors
from .index import Chunk
from .preamble import LENGTH, MAGIC, parse
from .reader import Reader, is_remote, open
from .sources import PIECE, pieces, read_exactly

Progress = Callable[[int], None]  # called with the number of bytes of each piece that was written


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
    skip: int = 0,
    digest: hashlib._Hash | None = None,
) -> None:
    """Copy consecutive chunks of a file; `write` gets the last bytes of a chunk after the chunk's digest was checked.

    Only the source of `reader` is used, so `chunks` may be those of another cut of it. The copy has the first `skip` bytes of
    the first chunk already, whose unfinished SHA-256 is `digest`.
    """
    if not chunks:
        return
    name = reader.source.name
    position = chunks[0].offset + skip
    digest = digest or hashlib.sha256()
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
                    hint = "The file is damaged: make or fetch it again."
                    if is_remote(reader):
                        hint = "Give the same command again; if that does not help, the file is damaged on the server."
                    raise DamagedError(
                        f"{name}: {chunk.describe()}: its SHA-256 does not match the index.",
                        hint=f"{hint} A cut that ends before this chunk is good.",
                        chunk=chunk,
                    )
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

    Only the missing bytes are read. Stopped at any moment, an unsealed file is valid, with at least as much of the model as
    before; bytes of an incomplete chunk are kept, and the next call continues there.

    Parameters
    ----------
    file : LockedFile
        At least as long as the header, and unsealed after `before` was called.
    reader : Reader
        The file to read from.
    chunks : sequence of Chunk
        Those that `file` is to hold, from chunk 0 on.
    before : callable or None
        Called once, when the first missing bytes have arrived, before they are written.

    Raises
    ------
    DamagedError
        A chunk does not match its digest. `file` was cut back to the start of that chunk; if part of it was in `file`
        before, the whole chunk was read again first.
    OutputError, ResourceError
        `file` cannot be written.
    """
    with os_errors(file.name):
        position = file.length
    first = bisect_right([chunk.end for chunk in chunks], position)
    if first == len(chunks):
        return
    there = position - chunks[first].offset
    digest: hashlib._Hash | None = _digest_of(file, chunks[first].offset, there)

    def start() -> None:
        nonlocal before
        if before is not None:
            before()
            before = None

    def write(data: memoryview) -> None:
        nonlocal position
        with os_errors(file.name):
            start()
            file.write(position, data)
        position += len(data)

    while True:
        try:
            return copy_chunks(reader, chunks[first:], write, progress, there, digest)
        except DamagedError as error:
            if error.chunk is not None and file.length > error.chunk.offset:
                with os_errors(file.name):
                    start()
                    file.shorten(error.chunk.offset)
            if not (there and error.chunk is chunks[first]):
                raise
        # The bytes that were there may be the damaged ones.
        position, there, digest = chunks[first].offset, 0, None


def intact(file: LockedFile, chunks: Sequence[Chunk]) -> int:
    """Return how many bytes of `file` can be kept: those before its first damaged chunk, an incomplete last chunk included."""
    length = file.length
    for chunk in chunks:
        if chunk.end > length:
            break
        if _digest_of(file, chunk.offset, chunk.stored_length).digest() != chunk.digest:
            return chunk.offset
    return min(length, chunks[-1].end)


def overwrite_preamble(file: LockedFile, data: bytes) -> None:
    """Write a preamble with another seal, and wait until it is on the disk."""
    with os_errors(file.name):
        file.write(0, data)
        file.sync()


def _digest_of(file: LockedFile, offset: int, length: int) -> hashlib._Hash:
    digest = hashlib.sha256()
    stop = offset + length
    while offset < stop and (piece := file.read(offset, min(PIECE, stop - offset))):
        digest.update(piece)
        offset += len(piece)
    return digest


def write_cut(
    reader: Reader, cut: Cut, dst: str | os.PathLike[str], seal: int, progress: Progress | None, overwrite: bool
) -> None:
    """Write a cut of a file on disk to `dst`, which appears whole or not at all, with the seal `seal` or 0 for none."""
    with replacing(dst, overwrite) as (sink, temporary):

        def write(data: bytes | memoryview) -> None:
            with os_errors(os.fspath(dst)):
                sink.write(data)
            if progress is not None:
                progress(len(data))

        write(header_of(reader, seal))
        copy_chunks(reader, reader.all_chunks[: cut.chunks], write)
        open(temporary, warn=False).close()
    remove_parts(dst, reader.source.name)


def download(
    reader: Reader, cut: Cut, dst: str | os.PathLike[str], seal: int, progress: Progress | None, overwrite: bool
) -> None:
    """Fetch a cut of a file to `dst`, which appears whole or not at all, with the seal `seal` or 0 for none.

    Until then the bytes that have arrived are in ``DST.part``, and stay there if this ends early. A later call uses them if
    their header is that of the file, byte for byte except for the seal, up to the first chunk that does not match its digest.
    `progress` is called with the number of bytes that are there, at once for those of an earlier call.
    """
    if not overwrite:
        require_free(dst)
    target = target_of(dst)
    path = target + ".part"
    for what, found in (("a link", os.path.islink(path)), ("a folder", os.path.isdir(path))):
        if found:
            raise _in_the_way(path, what)
    chunks = reader.all_chunks[: cut.chunks]
    remove_leftovers(target)
    with LockedFile(path, create=True, mode=mode_of_new(target)) as part, _full_disk_hint(part):
        with os_errors(path):
            _require_part(part, reader)
            part.copy_mode(target)
            begin(part, reader)
            part.shorten(intact(part, chunks))
            if progress is not None:
                progress(part.length)
        extend(part, reader, chunks, progress)
        with os_errors(path):
            part.sync()  # before it is sealed
        if not overwrite:
            require_free(dst)
        overwrite_preamble(part, reader.preamble.sealed(seal).to_bytes())
        try:
            with os_errors(os.fspath(dst)):
                part.rename(target)
        except BstkError:  # but not an interruption, which may come after the renaming
            with suppress(BstkError):  # sealed, the part would count as the user's own file
                overwrite_preamble(part, reader.preamble.sealed(0).to_bytes())
            raise
    sync_folder(os.path.dirname(target))


def begin(part: LockedFile, reader: Reader) -> None:
    """Make `part` the beginning of the file: keep it if it is that already, else reduce it to the header."""
    header = header_of(reader, 0)
    there = part.read(0, len(header))
    # The preamble pins the tables, and they pin all chunks; so equal headers, except for the seal, mean the same file.
    with suppress(BstkError):
        if len(there) >= LENGTH:
            there = parse(there[:LENGTH]).sealed(0).to_bytes() + there[LENGTH:]
    if there != header:
        part.shorten(0)
    part.write(0, header)


def remove_parts(dst: str | os.PathLike[str], source: str = "") -> None:
    """Delete the leftovers of interrupted runs next to `dst`: temporary files, and the ``.part`` of a download.

    A whole or sealed file, a link, a running download, and `source`, the file that `dst` was made from, stay.
    """
    target = os.path.realpath(dst)
    remove_leftovers(target)
    path = target + ".part"
    with suppress(OSError, BstkError):
        if not stat.S_ISREG(os.lstat(path).st_mode) or (os.path.exists(source) and os.path.samefile(path, source)):
            return
        with LockedFile(path) as part:
            if _is_unfinished(part):
                if os.name == "nt":  # cannot delete an open file
                    part.close()
                os.unlink(path)


@contextmanager
def _full_disk_hint(part: LockedFile) -> Iterator[None]:
    """Add to the error of a full disk that the part takes space on it."""
    try:
        yield
    except ResourceError as error:
        if part.length:
            error.hint = (
                f"{error.hint} The bytes that have arrived are kept in {part.name}, where the same command continues; delete it "
                "to free its space."
            )
        raise


def _in_the_way(part: str, what: str) -> OutputError:
    return OutputError(f"{part}: in the way: it is {what}.", hint="Move it away, and give the same command again.")


def _require_part(part: LockedFile, reader: Reader) -> None:
    """Raise OutputError if ``DST.part`` is not a .bstk file, or a whole or sealed file of another model."""
    there = part.read(0, LENGTH)
    if not MAGIC.startswith(there[: len(MAGIC)]):
        raise _in_the_way(part.name, "not the beginning of a .bstk file")
    try:
        if _is_unfinished(part) or parse(there).root() == reader.root:
            return
    except DamagedError:  # useless; `begin` starts over
        return
    except UnsupportedVersionError:
        pass
    raise _in_the_way(part.name, "a .bstk file of its own")


def _is_unfinished(part: LockedFile) -> bool:
    """Return whether a file is the start of a .bstk file, unsealed and not whole; BstkError if its preamble cannot be read."""
    there = part.read(0, LENGTH)
    if len(there) < LENGTH:
        return MAGIC.startswith(there[: len(MAGIC)])
    preamble = parse(there)
    return not preamble.seal and part.length < preamble.full_length
