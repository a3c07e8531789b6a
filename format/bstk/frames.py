"""One chunk's bytes: exactly one zstd frame, with its content size and checksum, without a dictionary (RFC 8878)."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import limits
from .errors import DamagedError, ResourceError, UsageError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_MAGIC = b"\x28\xb5\x2f\xfd"
_SHORT_BLOCK = 1024
_FED, _PIECE = 2**16, 2**15  # bytes that the decoder takes and gives at a time


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
    stored = b"".join(_compress([view], compression_level=level))
    if view.nbytes > max_raw(len(stored)):
        # Data that shrinks more than the format allows, such as a large matrix of zeros. zstd turns a block of equal bytes into
        # four bytes, so the length of a block bounds the expansion.
        short = [view[start : start + _SHORT_BLOCK] for start in range(0, view.nbytes, _SHORT_BLOCK)]
        stored = b"".join(_compress(short, compression_level=level))
    return Frame(stored, view.nbytes, hashlib.sha256(stored).digest())


def pack_parts(parts: Sequence[bytes]) -> Frame:
    """Compress one chunk of parts whose bytes have different frequencies and no repetitions: each gets codes of its own."""
    length = sum(map(len, parts))
    # Long matches, and few of them: short ones are chance, and cost more than the codes that they replace.
    few_matches = {"min_match": 7, "hash_log": 6, "chain_log": 6, "search_log": 1, "window_log": 17}
    views = [memoryview(part) for part in parts if part]
    stored = b"".join(_compress(views, strategy=zstd.Strategy.fast, **few_matches))
    if length > max_raw(len(stored)):
        return pack(b"".join(parts))
    return Frame(stored, length, hashlib.sha256(stored).digest())


def check(stored: bytes, raw_length: int) -> None:
    """Check the head of a frame without decoding it, because the decoder allocates the size that the frame declares."""
    # Skippable frames and formats before zstd 1.0 have other magic numbers.
    if stored[:4] != _MAGIC:
        raise DamagedError("it does not start with a zstd frame.")
    window, content, dictionary, has_checksum = _head(stored)
    if content != raw_length:
        raise DamagedError(f"its zstd frame declares {content} raw bytes, the index {raw_length}.")
    if not has_checksum:
        raise DamagedError("its zstd frame has no checksum.")
    if dictionary:
        raise DamagedError(f"its zstd frame needs dictionary {dictionary}; dictionaries are not allowed.")
    if window > limits.MAX_WINDOW_LENGTH:
        raise DamagedError(f"its zstd window has {window} bytes; at most {limits.MAX_WINDOW_LENGTH} are allowed.")


def unpack(stored: bytes, raw_length: int) -> bytes:
    """Decode one chunk; raise DamagedError unless it is exactly one valid frame of `raw_length` raw bytes."""
    try:
        # Its memory becomes that of the result; joined pieces would take it twice.
        raw = io.BytesIO(bytes(raw_length))
        for piece in unpack_pieces(stored, raw_length):
            raw.write(piece)
        return raw.getvalue()
    except MemoryError as error:
        raise ResourceError(f"no memory for the {raw_length} bytes of one chunk.") from error


def unpack_pieces(stored: bytes, raw_length: int) -> Iterator[bytes]:
    """Decode one chunk as `unpack` does, in pieces that need little memory; if it raises, no piece may be used."""
    check(stored, raw_length)
    decoder = zstd.ZstdDecompressor()
    view, length = memoryview(stored), 0
    while not decoder.eof:
        fed = view[:_FED] if decoder.needs_input else view[:0]
        view = view[len(fed) :]
        try:
            piece = decoder.decompress(fed, _PIECE)
        except zstd.ZstdError as error:
            raise DamagedError(f"its zstd frame does not decode: {error}.") from error
        length += len(piece)
        # If the declared size is larger than the window, zstd compares it only where the frame ends.
        if length > raw_length:
            raise DamagedError(f"its zstd frame decodes to more than {raw_length} bytes.")
        if piece:
            yield piece
        elif decoder.needs_input and not view:
            break
    if view or decoder.unused_data:
        raise DamagedError("its zstd frame is followed by other bytes.")
    if not decoder.eof or length != raw_length:
        raise DamagedError(f"its zstd frame does not decode to {raw_length} bytes and end there.")


def _compress(parts: Sequence[memoryview], **settings: int) -> Iterator[bytes]:
    """Compress parts into one frame, each in blocks of its own; `settings` are zstd's parameters."""
    settings |= {"content_size_flag": 1, "checksum_flag": 1, "dict_id_flag": 0}
    options: dict[int, int] = {zstd.CompressionParameter[name]: value for name, value in settings.items()}
    compressor = zstd.ZstdCompressor(options=options)
    compressor.set_pledged_input_size(sum(part.nbytes for part in parts))
    if len(parts) == 1:
        yield compressor.compress(parts[0], compressor.FLUSH_FRAME)
        return
    for part in parts:
        yield compressor.compress(part, compressor.FLUSH_BLOCK)
    yield compressor.flush(compressor.FLUSH_FRAME)


def _head(stored: bytes) -> tuple[int, int | None, int, bool]:
    """Read the head of a frame: window, content size, dictionary, and whether a checksum follows the blocks (RFC 8878, 3.1.1.1)."""
    flags = stored[4] if len(stored) > 4 else 0
    single = bool(flags & 0x20)
    sizes = (0 if single else 1, (0, 1, 2, 4)[flags & 3], (1 if single else 0, 2, 4, 8)[flags >> 6])
    if len(stored) < 5 + sum(sizes) or flags & 0x08:
        raise DamagedError("the head of its zstd frame cannot be read.")
    at = 5
    numbers = []
    for size in sizes:
        numbers.append(int.from_bytes(stored[at : at + size], "little"))
        at += size
    window, dictionary, content = numbers
    if sizes[2] == 2:
        content += 256
    window = content if single else (1 << (10 + (window >> 3))) // 8 * (8 + (window & 7))
    return window, content if sizes[2] else None, dictionary, bool(flags & 0x04)
