"""Reading the header: preamble, then tables, each checked before it is believed."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import index, metadata, preamble, sniff, stacks
from .errors import DamagedError, NotBstkError, TruncatedError
from .index import Chunk
from .sources import Source, read_exactly


def read(source: Source) -> tuple[preamble.Preamble, tuple[Chunk, ...], dict[str, Any]]:
    """Read and check the header with two reads, the first of them small and of a fixed length.

    Returns
    -------
    preamble, chunks, metadata
        Of the complete file.

    Raises
    ------
    NotBstkError, UnsupportedVersionError
        It is something else, or from a newer version.
    TruncatedError
        The source ends before its smallest model does.
    DamagedError
        A check failed.
    """
    head = _read_preamble(source)
    _check_length(head, source.length)
    # The length has been checked, so the file is at least as long as what is allocated here.
    tables = read_exactly(source, preamble.LENGTH, head.header_length - preamble.LENGTH, "header")
    _check_digests(head, tables)
    try:
        return head, *parse_tables(head, tables)
    except DamagedError as error:
        error.args = (f"{error.args[0]} The digests match, so the file was written wrongly; make it again.",)
        raise


def parse_tables(head: preamble.Preamble, tables: bytes) -> tuple[tuple[Chunk, ...], dict[str, Any]]:
    """Parse what stands between the preamble and the first chunk, and check its rules.

    Parameters
    ----------
    head : Preamble
        The parsed preamble.
    tables : bytes
        Index, names and metadata.

    Returns
    -------
    chunks, metadata

    Raises
    ------
    DamagedError
        A rule is broken.
    """
    index_bytes, names_bytes, metadata_bytes = _split(head, tables)
    with _no_collecting():
        chunks = index.parse(index_bytes, index.parse_names(names_bytes, head.chunk_count), head.header_length)
        stacks.check(chunks, head)
    return tuple(chunks), metadata.parse(metadata_bytes)


@contextmanager
def _no_collecting() -> Iterator[None]:
    """Pause the search for circular garbage, which looks through all chunks again and again while they are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _split(head: preamble.Preamble, tables: bytes) -> tuple[memoryview, bytes, bytes]:
    names_start = head.index_length
    metadata_start = names_start + head.names_length
    # The index is large, and only read from.
    return memoryview(tables)[:names_start], tables[names_start:metadata_start], tables[metadata_start:]


def _check_digests(head: preamble.Preamble, tables: bytes) -> None:
    digests = (head.index_digest, head.names_digest, head.metadata_digest)
    for what, part, digest in zip(("index", "names table", "metadata"), _split(head, tables), digests, strict=True):
        if hashlib.sha256(part).digest() != digest:
            raise DamagedError(f"the {what} is damaged: its SHA-256 does not match. Copy or download the file again.")


def _read_preamble(source: Source) -> preamble.Preamble:
    head = source.read(0, preamble.LENGTH)
    if not head or not preamble.MAGIC.startswith(head[:8]):
        raise NotBstkError(sniff.describe(source.read(0, sniff.HEAD)))
    if len(head) < preamble.LENGTH:
        raise TruncatedError(
            f"the file ends after {len(head)} bytes, within its preamble of {preamble.LENGTH}. Copy or download it again."
        )
    return preamble.parse(head)


def _check_length(head: preamble.Preamble, length: int) -> None:
    if head.seal and length != head.seal:
        raise DamagedError(
            f"the file was sealed at {head.seal} bytes and has {length}. "
            "Something cut or extended it afterwards; copy or download it again."
        )
    if length > head.full_length:
        raise DamagedError(
            f"the file has {length} bytes, {length - head.full_length} more than the {head.full_length} it was written "
            "with. Something was appended; copy or download it again."
        )
    if length < head.smallest_length:
        raise TruncatedError(
            f"the file ends after {length} bytes, before its smallest model does: that takes {head.smallest_length} of the "
            f"{head.full_length} bytes of the complete file. Copy or download at least the first {head.smallest_length}."
        )
