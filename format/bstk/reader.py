"""Open ``.bstk`` files: their content, the cuts of them, their chunks on demand."""

from __future__ import annotations

import hashlib
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from . import frames, header, http, kinds
from .budget import Budget, Cut, budget_of, mb_ceil, mb_text
from .errors import (
    BudgetError,
    DamagedError,
    PartialError,
    PartialWarning,
    RemoteChangedError,
    UnsupportedVersionError,
    UsageError,
    error_prefix,
)
from .index import Chunk, bits_per_weight
from .sources import Opened, Source, as_source, read_exactly


class Reader:
    """An open ``.bstk`` file; `bstk.open` makes one. Reading chunks is thread-safe.

    Attributes
    ----------
    source, preamble, metadata
        The source of the bytes, the parsed preamble, and the metadata, a dictionary.
    all_chunks, chunks : tuple of Chunk
        Every chunk of the complete file, and those that are wholly in this file, a prefix.
    base_count : int
        Chunks of the base model.
    base_length, full_length, seal : int
        Bytes of the file of the base model and of the complete file; the length this file is sealed at, or 0.
    root : bytes
        32 bytes that authenticate the file and every cut of it.
    state : str
        "whole": the complete file. "sealed": cut on purpose, at the seal. "partial": shorter than the complete file and not
        sealed, which may be an accident.
    """

    def __init__(self, source: Source):
        self.source = source
        with error_prefix(source.name):
            self.preamble, self.all_chunks, self.metadata = header.read(source)
        self.root = self.preamble.root()
        self.seal = self.preamble.seal
        self.base_count = self.preamble.base_count
        self.base_length = self.preamble.base_length
        self.full_length = self.preamble.full_length
        self._ends = [chunk.end for chunk in self.all_chunks]
        self.chunks = self.all_chunks[: bisect_right(self._ends, source.length)]
        if self.seal:
            self.state = "sealed"
        else:
            self.state = "whole" if source.length == self.full_length else "partial"

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<bstk.Reader {self.source.name!r}: {self.state}, {self.length} of {self.full_length} bytes, "
            f"{len(self.chunks)} of {len(self.all_chunks)} chunks>"
        )

    def close(self) -> None:
        """Close the source."""
        self.source.close()

    @property
    def length(self) -> int:
        """Bytes of this file."""
        return self.source.length

    @property
    def memory_bytes(self) -> int:
        """Raw bytes of the weights in this file."""
        return self._memory[len(self.chunks)]

    @property
    def base(self) -> Cut:
        """The base model: the smallest valid cut."""
        return self.cut(self.base_count)

    @property
    def complete(self) -> Cut:
        """The complete file, of which this one may be a part."""
        return self.cut(len(self.all_chunks))

    @property
    def model(self) -> Cut:
        """What of this file makes up the model: all but what restores the original."""
        return self.cut(next((i for i, chunk in enumerate(self.chunks) if chunk.kind.restores), len(self.chunks)))

    @property
    def restores(self) -> bool:
        """Return whether this file gives back the original's weights bit for bit: it was made so, and nothing is cut off."""
        return self.chunks[-1].kind.restores and len(self.chunks) == len(self.all_chunks)

    @cached_property
    def files(self) -> Mapping[str, Chunk]:
        """The embedded files by name."""
        return MappingProxyType({chunk.name: chunk for chunk in self.chunks if chunk.kind is kinds.FILE})

    def file(self, name: str) -> bytes:
        """Return an embedded file; KeyError if there is none of that name."""
        return self.read(self.files[name])

    def read(self, chunk: Chunk) -> bytes:
        """Return the raw bytes of a chunk, after checking its digest.

        Raises
        ------
        DamagedError
            The chunk does not match its digest, does not decode, or holds positions outside its matrix.
        UsageError
            The chunk is cut off: it is in `all_chunks`, but not in `chunks`.
        """
        with self._reading(chunk):
            raw = frames.unpack(self._stored(chunk), chunk.raw_length)
            if chunk.kind.check is not None:
                try:
                    chunk.kind.check(raw, chunk.shape)
                except ValueError as problem:
                    hint = "Its digest matches, so the file was written wrongly; make it again."
                    raise DamagedError(f"{problem}.", hint=hint) from problem
            return raw

    def file_pieces(self, name: str) -> Iterator[bytes]:
        """Yield an embedded file in pieces, so that a large one needs little memory; damage may show after the last."""
        chunk = self.files[name]
        with self._reading(chunk):
            pieces = frames.unpack_pieces(self._stored(chunk), chunk.raw_length)
        while True:
            with self._reading(chunk):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _stored(self, chunk: Chunk) -> bytes:
        """Return the stored bytes of a chunk, after checking its digest."""
        if chunk.end > self.length:
            message = f"it ends at {chunk.end}, and this file at {self.length}."
            raise UsageError(message, hint="Read it from a larger cut.")
        stored = read_exactly(self.source, chunk.offset, chunk.stored_length, "chunk")
        if hashlib.sha256(stored).digest() != chunk.digest:
            raise DamagedError("its SHA-256 does not match the index.", hint="Copy or download the file again.")
        return stored

    @contextmanager
    def _reading(self, chunk: Chunk) -> Iterator[None]:
        """Add the chunk to errors."""
        with error_prefix(f"{self.source.name}: {chunk.describe()}"):
            try:
                yield
            except DamagedError as error:
                error.chunk = chunk
                raise

    def require_root(self, root: bytes) -> None:
        """Raise DamagedError unless the root digest is `root`: that of the expected model and every cut of it."""
        if self.root != root:
            raise DamagedError(
                f"{self.source.name}: the root digest is {self.root.hex()}, expected was {root.hex()}.",
                hint="This is another model, or somebody changed it: do not use it before you know why.",
            )

    def fit(self, mb: Budget | None = None, *, budget: int | None = None) -> Cut:
        """Return the largest cut of this file within a budget, as a file and as weights in memory.

        Parameters
        ----------
        mb, budget : number or str, int
            The budget: megabytes (2**20 bytes; decimals are exact), or bytes instead; by default everything in this file.

        Raises
        ------
        UsageError, BudgetError
            `mb` is not a positive number, or both are given; the base model does not fit.
        """
        if mb is None and budget is None:
            return self.cut(len(self.chunks))
        base = self.base
        if (budget := budget_of(mb, budget)) < base.budget:
            raise BudgetError(
                f"{self.source.name}: {mb_text(budget)} MB is below the base model, which takes {mb_ceil(base.file_bytes)} MB as "
                f"a file and {mb_ceil(base.memory_bytes)} MB of weights in memory.",
                base.budget,
                hint=f"The smallest budget is {mb_ceil(base.budget)} MB.",
            )
        return self.fit_bytes(budget)

    def fit_bytes(self, budget: int) -> Cut:
        """Return the largest cut of this file within `budget` bytes, as `fit` does, but at least the base model."""
        count = min(bisect_right(self._ends, budget), bisect_right(self._memory, budget) - 1, len(self.chunks))
        return self.cut(max(count, self.base_count))

    def even_cuts(self, count: int) -> dict[Cut, int]:
        """Return the cuts within `count` budgets (at least 2) in equal steps, from the base model to all blocks of this file.

        Smallest first, each with the first of those budgets, in bytes, that gives it. A file of few blocks has fewer.
        """
        first, last = self.base.budget, self.model.budget
        cuts: dict[Cut, int] = {}
        for step in range(count):
            budget = first + (last - first) * step // (count - 1)
            cuts.setdefault(self.fit_bytes(budget), budget)
        return cuts

    def cut(self, count: int) -> Cut:
        """Return the first `count` chunks of the complete file as a cut; fewer than `base_count` are not a model."""
        if not 0 <= count <= len(self.all_chunks):
            raise UsageError(f"{self.source.name} has {len(self.all_chunks)} chunks; found a cut of {count}.")
        return Cut(count, self._ends[count - 1] if count else self.all_chunks[0].offset, self._memory[count])

    def bits_per_weight(self, cut: Cut | None = None) -> float | None:
        """Return the bits that a weight of the linears takes in memory in a cut (None: this file); None without linears."""
        return bits_per_weight(self.all_chunks[: len(self.chunks) if cut is None else cut.chunks])

    def verify(self, progress: Callable[[Chunk], None] | None = None) -> None:
        """Check the digest of every chunk in this file and decode it; `progress` is called with each chunk after its check.

        Opening has checked preamble and tables. Raises DamagedError, with the first damaged chunk as ``error.chunk``.
        """
        for chunk in self.chunks:
            self.read(chunk)
            if progress is not None:
                progress(chunk)

    def partial_message(self) -> str:
        """Return the warning about a partial file."""
        return (
            f"the file is partial: {self.length} of {self.full_length} bytes, not sealed. It is a valid smaller model, with "
            f"{len(self.chunks)} of {len(self.all_chunks)} chunks. If a transfer was cut short, repeat it; if the cut "
            "was meant, seal it with bstack truncate."
        )

    @cached_property
    def _memory(self) -> list[int]:
        """Bytes of the weights in the first chunks, for each number of chunks from none to all."""
        return list(accumulate((chunk.raw_length * chunk.is_weight for chunk in self.all_chunks), initial=0))


def open(what: Opened, strict: bool = False, *, warn: bool = True) -> Reader:
    """Open a ``.bstk`` file for reading.

    Parameters
    ----------
    what : path, URL, bytes, or a source
        The header of a URL is read with at most two requests; chunks are read on demand. A source has ``name``, ``length``,
        ``read(offset, length)`` and ``close()``; it is closed with the reader.
    strict : bool
        Refuse a partial file (unsealed, and shorter than the complete file) instead of warning about it.
    warn : bool
        Warn about a partial file, with PartialWarning.

    Returns
    -------
    Reader
        A context manager; close it when done.

    Raises
    ------
    NotBstkError, UnsupportedVersionError
        It is something else, or from a newer version.
    TruncatedError, DamagedError
        It ends before its base model does; a check failed.
    PartialError
        It is partial and `strict` is set.
    OSError, RemoteError
        It cannot be read.
    """
    source = as_source(what)
    try:
        reader = _read_twice_if_changed(source)
        if reader.state == "partial":
            if strict:
                raise PartialError(f"{source.name}: {reader.partial_message()}")
            if warn:
                warnings.warn(f"{source.name}: {reader.partial_message()}", PartialWarning, stacklevel=2)
    except BaseException:
        source.close()
        raise
    return reader


def reopen(reader: Reader) -> Reader:
    """Return a new reader of the same source, after the file behind it was replaced on its server."""
    source: Any = reader.source  # only one behind a URL has `restart`
    source.restart()
    return Reader(source)


def is_remote(reader: Reader) -> bool:
    """Return whether a reader reads from a server."""
    return http.is_url(reader.source.name)


def require_rewritable(reader: Reader) -> None:
    """Raise UnsupportedVersionError if the file has features that allow reading it, but not writing parts of it."""
    if reader.preamble.read_only_compatible:
        raise UnsupportedVersionError(
            f"{reader.source.name}: the file has features this version of bstk can read but not rewrite "
            f"(read-only-compatible flags {reader.preamble.read_only_compatible:#x}).",
            hint="Upgrade bstack to cut it.",
        )


def _read_twice_if_changed(source: Source) -> Reader:
    """Read the header; once more if the file was replaced on a server, or written to on disk, in the meantime."""
    try:
        return Reader(source)
    except (DamagedError, RemoteChangedError) as error:
        changed = isinstance(error, RemoteChangedError) if not hasattr(source, "changed") else source.changed()
        if not (changed and hasattr(source, "restart")):
            raise
        source.restart()
        return Reader(source)
