"""Write a complete ``.bstk`` file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import frames, header, index, kinds, limits, preamble
from . import metadata as metadata_module
from .atomic import replacing
from .errors import DamagedError, UsageError, error_prefix, os_errors
from .index import Chunk
from .reader import open
from .transfer import remove_parts


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One chunk to write: the fields of `bstk.Chunk`, with the lengths and the digest of a `bstk.Frame`.

    `stored` is the frame, or a function that returns it. The function is called once, when the frame is written, so that a
    large file can be written from parts on disk with little memory.
    """

    name: str
    kind: kinds.Kind
    raw_length: int
    stored_length: int
    digest: bytes
    stored: bytes | Callable[[], bytes] = field(repr=False)
    level: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = "none"
    rank: int = 0
    transposed: bool = False
    importance: float = 0.0
    error: float = 0.0


def write(path: str | os.PathLike[str], metadata: dict[str, Any], chunks: Iterable[Entry], base_count: int) -> None:
    """Write a complete, unsealed file, which replaces what is at `path` when it is whole.

    Equal arguments give equal bytes. The ``PATH.part`` of an interrupted download is deleted.

    Parameters
    ----------
    path : path
    metadata : dict
        Plain JSON values.
    chunks : iterable of Entry
        In file order. The first `base_count` are the base model: all files, all tensors, block 0 of every linear.
    base_count : int

    Raises
    ------
    UsageError
        The chunks break a rule of the format (the message names the chunk), or the bytes of an entry contradict it.
    ResourceError, OutputError
        The file cannot be written; `path` is unchanged.
    """
    entries = list(chunks)
    shown = os.fspath(path)
    with error_prefix(shown):
        head, tables = build_header(metadata, entries, base_count)
    with replacing(path) as (sink, temporary):
        with os_errors(shown):
            sink.write(head.to_bytes())
            sink.write(tables)
        for entry in entries:
            stored = entry.stored() if callable(entry.stored) else entry.stored
            with error_prefix(shown):
                _check_stored(entry, stored)
            with os_errors(shown):
                sink.write(stored)
        # A reader checks it before it replaces anything.
        open(temporary, strict=True).close()
    remove_parts(path)


def build_header(
    metadata: dict[str, Any], entries: Sequence[Entry], base_count: int
) -> tuple[preamble.Preamble, bytes]:
    """Return the preamble and the tables (index, names, metadata) of a complete file, checked as a reader checks them."""
    if not 1 <= base_count <= len(entries) <= limits.MAX_CHUNKS:
        raise UsageError(
            f"a file has 1 to {limits.MAX_CHUNKS} chunks, of which at least one and at most all are its base model; "
            f"found {len(entries)} and base_count {base_count}."
        )
    for entry in entries:
        _check_types(entry)
    metadata_bytes = metadata_module.dump(metadata)
    names_length = sum(4 + len(name.encode()) for name in {entry.name for entry in entries})
    offset = preamble.LENGTH + preamble.RECORD_LENGTH * len(entries) + names_length + len(metadata_bytes)
    chunks, features = [], 0
    shared = ("name", "kind", "level", "stored_length", "raw_length", "dtype", "rank", "transposed", "digest")
    for entry in entries:
        chunk = Chunk(
            **{name: getattr(entry, name) for name in shared},
            offset=offset,
            shape=tuple(entry.shape),
            importance=float(entry.importance),
            error=float(entry.error),
        )
        chunks.append(chunk)
        offset = chunk.end
        features |= entry.kind.feature
    index_bytes, names_bytes = index.dump(chunks)
    head = preamble.Preamble(
        full_length=offset,
        base_length=chunks[base_count - 1].end,
        chunk_count=len(chunks),
        base_count=base_count,
        names_length=len(names_bytes),
        metadata_length=len(metadata_bytes),
        index_digest=hashlib.sha256(index_bytes).digest(),
        names_digest=hashlib.sha256(names_bytes).digest(),
        metadata_digest=hashlib.sha256(metadata_bytes).digest(),
        incompatible=features,
    )
    tables = index_bytes + names_bytes + metadata_bytes
    try:
        preamble.parse(head.to_bytes())
        header.parse_tables(head, tables)
    except DamagedError as error:
        raise UsageError(f"cannot write this: {error}") from error
    return head, tables


def _check_types(entry: Entry) -> None:
    """Check what the binary record would refuse or silently change; the reader checks all other rules afterwards."""
    where = f"chunk {entry.name!r} level {entry.level}"
    numbers = {
        "level": (entry.level, 0xFFFF),
        "rank": (entry.rank, 0xFFFF),
        "raw_length": (entry.raw_length, limits.MAX_RAW_LENGTH),
        "stored_length": (entry.stored_length, limits.MAX_FILE_LENGTH),
        **{f"shape[{i}]": (length, limits.MAX_DIMENSION) for i, length in enumerate(entry.shape)},
    }
    for what, (value, largest) in numbers.items():
        if not isinstance(value, int) or not 0 <= value <= largest:
            raise UsageError(f"{where}: {what} is {value!r}; allowed: a whole number, 0 to {largest}.")
    if len(entry.shape) > limits.MAX_NDIM:
        raise UsageError(f"{where}: {len(entry.shape)} dimensions; allowed: at most {limits.MAX_NDIM}.")
    if entry.dtype not in kinds.DTYPE_BY_NAME:
        raise UsageError(f"{where}: dtype {entry.dtype!r}; allowed: {', '.join(kinds.DTYPE_BY_NAME)}.")
    if len(entry.digest) != 32:
        raise UsageError(f"{where}: the digest has {len(entry.digest)} bytes; allowed: the 32 of SHA-256.")
    try:
        if len(entry.name.encode("utf-8")) > limits.MAX_NAME_LENGTH:
            raise UsageError(f"{where}: the name is longer than {limits.MAX_NAME_LENGTH} bytes.")
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: the name is not Unicode text.") from error


def _check_stored(entry: Entry, stored: bytes) -> None:
    where = f"chunk {entry.name!r} level {entry.level}"
    if len(stored) != entry.stored_length:
        raise UsageError(f"{where}: {len(stored)} stored bytes came; announced: {entry.stored_length}.")
    if hashlib.sha256(stored).digest() != entry.digest:
        raise UsageError(f"{where}: its stored bytes do not match its digest.")
    try:
        frames.check(stored, entry.raw_length)
    except DamagedError as error:
        raise UsageError(f"{where}: {error}") from error
