"""One chunk's bytes: exactly one zstd frame, with its content size and checksum, without a dictionary (RFC 8878)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import zstandard

from . import limits
from .errors import DamagedError, ResourceError, UsageError

_MAGIC = b"\x28\xb5\x2f\xfd"
_SHORT_BLOCK = 1024
_FED = 256  # a block of 128 KiB may take 4 bytes, so this becomes at most 8 MiB


class Frame(NamedTuple):
    """A compressed chunk: the zstd frame as it is stored, the bytes before compression, and the SHA-256 of `stored`."""

    stored: bytes
    raw_length: int
    digest: bytes

    @property
    def stored_length(self) -> int:
        """Bytes of the frame."""
        return len(self.stored)


def max_raw(stored_length: int) -> int:
    """Return the largest raw length a frame of `stored_length` bytes may have."""
    return min(limits.MAX_RAW_LENGTH, limits.EXPANSION_SLACK + limits.MAX_EXPANSION * stored_length)


def pack(raw: bytes | bytearray | memoryview, level: int = 3) -> Frame:
    """Compress one chunk. Equal input gives equal output (with the same zstd library).

    Parameters
    ----------
    raw : bytes-like, C-contiguous
        1 to 2**31 bytes.
    level : int
        zstd level, 1 to 19; above 19 zstd would need a window larger than readers must support. Sign bits do not compress at
        any level; factors shrink by about 8 % at every level.

    Raises
    ------
    UsageError
        `raw` is empty or too large, or `level` is out of range.
    """
    view = memoryview(raw).cast("B")
    if not 1 <= view.nbytes <= limits.MAX_RAW_LENGTH:
        raise UsageError(f"a chunk holds 1 to {limits.MAX_RAW_LENGTH} bytes, found {view.nbytes}.")
    if not 1 <= level <= 19:
        raise UsageError(f"a zstd level is 1 to 19 here, found {level}.")
    compressor = zstandard.ZstdCompressor(
        level=level, write_checksum=True, write_content_size=True, write_dict_id=False, threads=0
    )
    stored = compressor.compress(view)
    if view.nbytes > max_raw(len(stored)):
        stored = _pack_short(compressor, view)
    return Frame(stored, view.nbytes, hashlib.sha256(stored).digest())


def pack_parts(parts: Sequence[bytes]) -> Frame:
    """Compress one chunk of parts whose bytes have different frequencies and no repetitions: each gets codes of its own."""
    length = sum(map(len, parts))
    # Long matches, and few of them: short ones are chance, and cost more than the codes that they replace.
    few_matches = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        min_match=7,
        hash_log=6,
        chain_log=6,
        search_log=1,
        window_log=17,
        write_checksum=True,
        write_content_size=True,
        write_dict_id=False,
    )
    writer = zstandard.ZstdCompressor(compression_params=few_matches).compressobj(size=length)
    pieces: list[bytes] = []
    for part in filter(None, parts):
        pieces += writer.compress(part), writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    stored = b"".join([*pieces, writer.flush()])
    if length > max_raw(len(stored)):
        return pack(b"".join(parts))
    return Frame(stored, length, hashlib.sha256(stored).digest())


def check(stored: bytes, raw_length: int) -> None:
    """Check the head of a frame without decoding it, because the decoder allocates the size that the frame declares."""
    # Skippable frames and formats before zstd 1.0 have other magic numbers.
    if stored[:4] != _MAGIC:
        raise DamagedError("it does not start with a zstd frame.")
    try:
        head = zstandard.get_frame_parameters(stored)
    except zstandard.ZstdError as error:
        raise DamagedError(f"its zstd frame cannot be read: {error}.") from error
    if head.content_size != raw_length:
        raise DamagedError(f"its zstd frame declares {head.content_size} raw bytes, the index {raw_length}.")
    if not head.has_checksum:
        raise DamagedError("its zstd frame has no checksum.")
    if head.dict_id:
        raise DamagedError(f"its zstd frame needs dictionary {head.dict_id}; dictionaries are not allowed.")
    if head.window_size > limits.MAX_WINDOW_LENGTH:
        raise DamagedError(
            f"its zstd window has {head.window_size} bytes; at most {limits.MAX_WINDOW_LENGTH} are allowed."
        )


def unpack(stored: bytes, raw_length: int) -> bytes:
    """Decode one chunk; raise DamagedError unless it is exactly one valid frame of `raw_length` raw bytes."""
    check(stored, raw_length)
    try:
        raw = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedError(f"its zstd frame does not decode: {error}.") from error
    except MemoryError as error:
        raise ResourceError(f"no memory for the {raw_length} bytes of one chunk.") from error
    if len(raw) != raw_length:
        raise DamagedError(f"its zstd frame decodes to {len(raw)} bytes, the index says {raw_length}.")
    return raw


def unpack_pieces(stored: bytes, raw_length: int) -> Iterator[bytes]:
    """Decode one chunk as `unpack` does, in pieces that need little memory; if it raises, no piece may be used."""
    check(stored, raw_length)
    decoder = zstandard.ZstdDecompressor().decompressobj()
    length = 0
    for start in range(0, len(stored), _FED):
        if decoder.eof:
            raise DamagedError("its zstd frame is followed by other bytes.")
        try:
            piece = decoder.decompress(stored[start : start + _FED])
        except zstandard.ZstdError as error:
            raise DamagedError(f"its zstd frame does not decode: {error}.") from error
        length += len(piece)
        # If the declared size is larger than the window, zstd compares it only where the frame ends.
        if length > raw_length:
            raise DamagedError(f"its zstd frame decodes to more than {raw_length} bytes.")
        if piece:
            yield piece
    if not decoder.eof or decoder.unused_data or length != raw_length:
        raise DamagedError(f"its zstd frame does not decode to {raw_length} bytes and end there.")


def _pack_short(compressor: zstandard.ZstdCompressor, view: memoryview) -> bytes:
    """Compress data that shrinks more than the format allows (a large matrix of zeros) in short blocks.

    zstd turns a block of equal bytes into four bytes, so the length of a block bounds the expansion.
    """
    writer = compressor.compressobj(size=view.nbytes)
    parts = []
    for start in range(0, view.nbytes, _SHORT_BLOCK):
        parts.append(writer.compress(view[start : start + _SHORT_BLOCK]))
        parts.append(writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    parts.append(writer.flush())
    return b"".join(parts)
