"""An open ``.bstk`` file: what is in it, what cuts of it keep, its chunks on demand."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType

from . import frames, header, kinds
from .budget import Budget, budget_bytes, mb_ceil
from .cuts import Cut
from .errors import BudgetError, DamagedError, RootMismatchError, UsageError, error_prefix
from .index import Chunk
from .sources import Source, read_exactly


class Reader:
    """An open ``.bstk`` file; `bstk.open` makes one. Reading chunks is thread-safe.

    Attributes
    ----------
    source : Source
        Where the bytes come from.
    preamble : bstk.preamble.Preamble
        The preamble, parsed.
    metadata : dict
        The metadata.
    all_chunks : tuple of Chunk
        Every chunk of the complete file.
    chunks : tuple of Chunk
        Those that stand wholly in this file, a prefix of `all_chunks`.
    root : bytes
        32 bytes that authenticate the file and every cut of it.
    state : str
        "whole": all of the complete file. "sealed": cut on purpose, at the seal. "partial": shorter than the complete
        file and not sealed, so nobody can tell whether that was meant.
    """

    def __init__(self, source: Source):
        self.source = source
        with error_prefix(source.name):
            self.preamble, self.all_chunks, self.metadata = header.read(source)
        self.root = self.preamble.root()
        self._ends = [chunk.end for chunk in self.all_chunks]
        self.chunks = self.all_chunks[: bisect_right(self._ends, source.length)]
        if self.preamble.seal:
            self.state = "sealed"
        else:
            self.state = "whole" if source.length == self.preamble.full_length else "partial"

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
    def full_length(self) -> int:
        """Bytes of the complete file."""
        return self.preamble.full_length

    @property
    def smallest_length(self) -> int:
        """Bytes of the smallest model's file."""
        return self.preamble.smallest_length

    @property
    def seal(self) -> int:
        """Length the file is sealed at, or 0."""
        return self.preamble.seal

    @property
    def base_count(self) -> int:
        """Chunks of the smallest model."""
        return self.preamble.base_count

    @property
    def memory_bytes(self) -> int:
        """Raw bytes of the weights in this file."""
        return self._memory[len(self.chunks)]

    @property
    def smallest(self) -> Cut:
        """The smallest model."""
        return self.cut(self.base_count)

    @property
    def complete(self) -> Cut:
        """The complete file, of which this one may be a part."""
        return self.cut(len(self.all_chunks))

    @property
    def blocks(self) -> tuple[Chunk, ...]:
        """The blocks after the smallest model that this file has, in the order of the universal stack."""
        return tuple(chunk for chunk in self.chunks[self.base_count :] if chunk.is_block)

    @cached_property
    def files(self) -> Mapping[str, Chunk]:
        """The embedded files by name."""
        return MappingProxyType({chunk.name: chunk for chunk in self.chunks if chunk.kind is kinds.FILE})

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all chunks, in order of first appearance."""
        return tuple(self._stacks)

    def stack(self, name: str) -> list[Chunk]:
        """Return the chunks of `name` that this file has, by level.

        Raises
        ------
        KeyError
            There is no such name.
        """
        return list(self._stacks[name])

    def file(self, name: str) -> bytes:
        """Return an embedded file.

        Raises
        ------
        KeyError
            There is no such file.
        DamagedError
            It does not match its digest, or does not decode.
        """
        return self.read(self.files[name])

    def read(self, chunk: Chunk) -> bytes:
        """Return the raw bytes of a chunk, after checking its digest.

        Raises
        ------
        DamagedError
            The chunk does not match its digest, does not decode, or holds positions outside its matrix.
        UsageError
            The chunk is cut off: it is one of `all_chunks`, but not of `chunks`.
        OSError
            The source cannot be read.
        """
        with self._reading(chunk):
            raw = frames.unpack(self._stored(chunk), chunk.raw_length)
            if chunk.kind.check is not None:
                chunk.kind.check(raw, chunk.shape)
            return raw

    def file_pieces(self, name: str) -> Iterator[bytes]:
        """Yield an embedded file in pieces, so that a large one needs little memory.

        Raises
        ------
        KeyError
            There is no such file.
        DamagedError
            As `file`; perhaps not before the last piece.
        """
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
        """Return the stored bytes of a chunk, which match its digest."""
        if chunk.end > self.length:
            raise UsageError(f"it ends at {chunk.end}, and this file at {self.length}. Read it from a larger cut.")
        stored = read_exactly(self.source, chunk.offset, chunk.stored_length, "chunk")
        if hashlib.sha256(stored).digest() != chunk.digest:
            raise DamagedError("its SHA-256 does not match the index. Copy or download the file again.")
        return stored

    @contextmanager
    def _reading(self, chunk: Chunk) -> Iterator[None]:
        """Let errors say which chunk it was."""
        with error_prefix(f"{self.source.name}: {chunk.describe()}"):
            try:
                yield
            except ValueError as problem:
                error = DamagedError(f"{problem}. Its digest matches, so the file was written wrongly; make it again.")
                error.chunk = chunk
                raise error from problem
            except DamagedError as error:
                error.chunk = chunk
                raise

    def require_root(self, root: bytes) -> None:
        """Raise RootMismatchError unless the root digest is `root`: then this is the model that was meant, or a cut of it."""
        if self.root != root:
            raise RootMismatchError(
                f"{self.source.name}: the root digest is {self.root.hex()}, expected was {root.hex()}. This is another model, "
                "or somebody changed it: do not use it before you know why."
            )

    def fit(self, mb: Budget | None = None) -> Cut:
        """Return the largest cut of this file within `mb` megabytes (2**20 bytes), as a file and as weights in memory.

        Parameters
        ----------
        mb : int, float, str, Decimal or None
            The budget; decimals are exact. None for everything in this file.

        Raises
        ------
        UsageError
            `mb` is not a positive number.
        BudgetError
            The smallest model does not fit.
        """
        if mb is None:
            return self.cut(len(self.chunks))
        budget = budget_bytes(mb)
        if budget < self.smallest.budget:
            raise BudgetError(
                f"{self.source.name}: {mb} MB is below the smallest model, which takes "
                f"{mb_ceil(self.smallest.file_bytes)} MB as a file and {mb_ceil(self.smallest.memory_bytes)} MB of weights "
                f"in memory. The smallest budget is {mb_ceil(self.smallest.budget)} MB.",
                self.smallest.budget,
            )
        return self.fit_bytes(budget)

    def fit_bytes(self, budget: int) -> Cut:
        """Return the largest cut of this file within `budget` bytes, as `fit` does; but never below the smallest model."""
        count = min(bisect_right(self._ends, budget), bisect_right(self._memory, budget) - 1, len(self.chunks))
        return self.cut(max(count, self.base_count))

    def even_cuts(self, count: int) -> dict[Cut, int]:
        """Return the cuts within `count` budgets in equal steps, from the smallest model to all of this file.

        Parameters
        ----------
        count : int
            At least 2.

        Returns
        -------
        dict of Cut to int
            Smallest first, with the first of those budgets, in bytes, that it is the answer to. A file of few blocks has fewer.
        """
        first, last = self.smallest.budget, self.fit().budget
        cuts: dict[Cut, int] = {}
        for step in range(count):
            budget = first + (last - first) * step // (count - 1)
            cuts.setdefault(self.fit_bytes(budget), budget)
        return cuts

    def cut(self, count: int) -> Cut:
        """Return the first `count` chunks of the complete file as a cut; those of less than the smallest model are none of use.

        Raises
        ------
        UsageError
            There are not so many.
        """
        if not 0 <= count <= len(self.all_chunks):
            raise UsageError(f"{self.source.name} has {len(self.all_chunks)} chunks; a cut of {count} was asked for.")
        return Cut(count, self._ends[count - 1] if count else self.all_chunks[0].offset, self._memory[count])

    def bits_per_weight(self, cut: Cut | None = None) -> float | None:
        """Return the bits a weight of the linears takes in memory, over all their blocks in a cut.

        Parameters
        ----------
        cut : Cut or None
            A cut of this file; None for everything in it.

        Returns
        -------
        float or None
            None if the file has no linears.
        """
        count = len(self.chunks) if cut is None else cut.chunks
        return 8 * self._block_bytes[count] / self._weights[count] if self._weights[count] else None

    def verify(self, progress: Callable[[Chunk], None] | None = None) -> None:
        """Check the digest of every chunk in this file and decode it. Preamble and tables were checked by opening.

        Parameters
        ----------
        progress : callable or None
            Called with each chunk after it has passed.

        Raises
        ------
        DamagedError
            A chunk is damaged; ``error.chunk`` is the first such.
        """
        for chunk in self.chunks:
            self.read(chunk)
            if progress is not None:
                progress(chunk)

    def partial_message(self) -> str:
        """Return what to tell the user about a partial file."""
        return (
            f"the file is partial: {self.length} of {self.full_length} bytes, not sealed. It is a valid smaller model, with "
            f"{len(self.chunks)} of {len(self.all_chunks)} chunks. If a transfer was cut short, repeat it; if the cut "
            "was meant, seal it with bstack truncate."
        )

    # For each number of chunks, from none to all.

    @cached_property
    def _memory(self) -> list[int]:
        return list(accumulate((chunk.raw_length * chunk.is_weight for chunk in self.all_chunks), initial=0))

    @cached_property
    def _block_bytes(self) -> list[int]:
        return list(accumulate((chunk.raw_length * chunk.is_block for chunk in self.all_chunks), initial=0))

    @cached_property
    def _weights(self) -> list[int]:
        # Every linear has exactly one block of level 0, so this counts each weight once.
        first = (math.prod(chunk.shape) if chunk.is_block and chunk.level == 0 else 0 for chunk in self.all_chunks)
        return list(accumulate(first, initial=0))

    @cached_property
    def _stacks(self) -> Mapping[str, list[Chunk]]:
        by_name: dict[str, list[Chunk]] = {}
        for chunk in self.chunks:
            by_name.setdefault(chunk.name, []).append(chunk)
        return by_name
