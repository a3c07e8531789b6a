"""Read the header: preamble, then tables, each checked before it is used."""

from __future__ import annotations

import gc
import hashlib
import struct
from contextlib import suppress
from typing import Any

from . import index, metadata, preamble
from .errors import DamagedError, NotBstkError, TruncatedError
from .index import Chunk
from .sources import Source, read_exactly


def read(source: Source) -> tuple[preamble.Preamble, tuple[Chunk, ...], dict[str, Any]]:
    """Read and check the header with two reads, the first of them small: preamble, chunks and metadata of the complete file.

    Raises NotBstkError, UnsupportedVersionError, TruncatedError (it ends before its base model) or DamagedError.
    """
    head = _read_preamble(source)
    _check_length(head, source.length)
    # The length has been checked, so the file is at least as long as what is allocated here.
    tables = read_exactly(source, preamble.LENGTH, head.header_length - preamble.LENGTH, "header")
    _check_digests(head, tables)
    try:
        return head, *parse_tables(head, tables)
    except DamagedError as error:
        error.hint = "The digests match, so the file was written wrongly; make it again."
        raise


def parse_tables(head: preamble.Preamble, tables: bytes) -> tuple[tuple[Chunk, ...], dict[str, Any]]:
    """Return the chunks and the metadata of `tables`, the bytes between the preamble and the first chunk, checked."""
    index_bytes, names_bytes, metadata_bytes = _split(head, tables)
    collects = gc.isenabled()
    gc.disable()  # the collector would scan all chunks again and again while they are created
    try:
        chunks = index.parse(index_bytes, index.parse_names(names_bytes, head.chunk_count), head.header_length)
        index.check_stacks(chunks, head)
    finally:
        if collects:
            gc.enable()
    return tuple(chunks), metadata.parse(metadata_bytes)


def _split(head: preamble.Preamble, tables: bytes) -> tuple[memoryview, bytes, bytes]:
    """Return index, names and metadata; the index, which is large, without a copy."""
    names_start = head.index_length
    metadata_start = names_start + head.names_length
    return memoryview(tables)[:names_start], tables[names_start:metadata_start], tables[metadata_start:]


def _check_digests(head: preamble.Preamble, tables: bytes) -> None:
    digests = (head.index_digest, head.names_digest, head.metadata_digest)
    parts: tuple[bytes | memoryview, ...] = _split(head, tables)
    for what, part, digest in zip(("index", "names table", "metadata"), parts, digests, strict=True):
        if hashlib.sha256(part).digest() != digest:
            raise DamagedError(
                f"the {what} is damaged: its SHA-256 does not match.", hint="Copy or download the file again."
            )


def _read_preamble(source: Source) -> preamble.Preamble:
    head = source.read(0, preamble.LENGTH)
    if not head or not preamble.MAGIC.startswith(head[:8]):
        raise NotBstkError(describe(source.read(0, 512)))
    if len(head) < preamble.LENGTH:
        raise TruncatedError(
            f"the file ends after {len(head)} bytes, within its preamble of {preamble.LENGTH}.",
            hint="Copy or download it again.",
        )
    return preamble.parse(head)


def _check_length(head: preamble.Preamble, length: int) -> None:
    if head.seal and length != head.seal:
        raise DamagedError(
            f"the file was sealed at {head.seal} bytes and has {length}.",
            hint="Something cut or extended it afterwards; copy or download it again.",
        )
    if length > head.full_length:
        raise DamagedError(
            f"the file has {length} bytes, {length - head.full_length} more than the {head.full_length} it was written with.",
            hint="Something was appended; copy or download it again.",
        )
    if length < head.base_length:
        raise TruncatedError(
            f"the file ends after {length} bytes, before its base model does: that takes {head.base_length} of the "
            f"{head.full_length} bytes of the complete file.",
            hint=f"Copy or download at least the first {head.base_length}.",
        )


def describe(head: bytes) -> str:
    """Return what a file that starts with `head` seems to be, and what to do about it."""
    if not head:
        return "the file is empty. Copy or download it again."
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith((b"\x89BSTK\n", b"\x89BSTK\r\r\n", b"\tBSTK", b"\xc2\x89BSTK", b"\xef\xbf\xbdBSTK")):
        return "this was a .bstk file, broken by a transfer as text. Transfer it as binary."
    if text.startswith(b"version https://git-lfs.github.com/"):
        return "this is a git-lfs pointer, not the file it points to. Run: git lfs pull"
    if text[:15].lower().startswith((b"<!doctype html", b"<html", b"<head")) or text.startswith(b"<?xml"):
        return "this is a web page (HTML), not a .bstk file: the download ended at an error or log-in page."
    if head.startswith(b"GGUF"):
        return "this is a GGUF file, not a .bstk file. To make one of it: bstack compress FILE -o OUT.bstk"
    if head.startswith(b"PK\x03\x04"):
        return "this is a zip archive (or a PyTorch .bin/.pt file), not a .bstk file."
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh")):
        return "this is a compressed file, not a .bstk file. Unpack it first."
    if len(head) > 8 and head[8:9] == b"{" and 2 <= struct.unpack_from("<Q", head)[0] < 2**30:
        return (
            "this is a safetensors file, not a .bstk file. To make one: bstack compress FOLDER -o OUT.bstk, with the "
            "folder it is in."
        )
    if text.startswith((b"{", b"[")):
        return "this is JSON, not a .bstk file."
    with suppress(UnicodeDecodeError):
        # Without the last bytes, where a character may be cut.
        if all(character.isprintable() or character in "\t\r\n" for character in head[:508].decode("utf-8")):
            return f"this is text, not a .bstk file. It starts with {head[:40]!r}."
    return f"this is not a .bstk file: it starts with {head[:8].hex(' ')}, not with 89 42 53 54 4b 0d 0a 1a."
