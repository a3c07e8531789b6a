"""The fuzz target: any bytes as a file. Hypothesis calls it in the tests, libFuzzer in `run.py`."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from pathlib import PurePosixPath, PureWindowsPath

import bstk

MOST_CHUNKS = 64


def check(data: bytes) -> None:
    """Raise for bytes on which the reader breaks its word: an error that is not documented, or an impossible file."""
    read_all(data)
    read_all(repaired(data))


def read_all(data: bytes) -> bool:
    """Open bytes and read every chunk; say whether they are a file. Checked is what every user of a reader relies on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bstk.PartialWarning)
        try:
            reader = bstk.open(data)
        except bstk.BstkError as error:
            require(str(error).startswith("<bytes>: "), f"a message that does not name the file: {error}")
            return False
        with reader:
            require(
                reader.base_length <= reader.length <= reader.full_length, "a file longer or shorter than it may be"
            )
            require(len(reader.chunks) >= reader.base_count, "a base model that is not there")
            for name in reader.files:
                require(is_inside(name), f"a file name that leads out of its folder: {name!r}")
            for chunk in reader.chunks:
                try:
                    require(len(reader.read(chunk)) == chunk.raw_length, "a chunk of another length")
                except bstk.DamagedError as error:
                    require(error.chunk == chunk, "damage that names another chunk")
            if not reader.seal:
                with bstk.open(bytes(data[: reader.base_length])) as smallest:
                    require(smallest.root == reader.root, "a cut with another root")
                    require(smallest.chunks == reader.chunks[: reader.base_count], "a cut with other chunks")
            return True


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder, here and on Windows."""
    windows = PureWindowsPath(name)
    return ".." not in windows.parts and not PurePosixPath(name).is_absolute() and not (windows.drive or windows.root)


def repaired(data: bytes) -> bytes:
    """Return the bytes with digests and CRC made to fit, so that the rules behind them are met."""
    if len(data) < 256:
        return data
    fixed = bytearray(data)
    fixed[:8] = b"\x89BSTK\r\n\x1a"
    count, names, metadata = (
        struct.unpack_from(code, data, at)[0] for code, at in (("<I", 64), ("<Q", 96), ("<Q", 112))
    )
    lengths = (128 * count, names, metadata)
    for number in range(min(count, MOST_CHUNKS, (len(data) - 256) // 128)):
        record = 256 + 128 * number
        offset, stored = struct.unpack_from("<QQ", data, record + 8)
        if offset + stored <= len(data):
            fixed[record + 96 : record + 128] = hashlib.sha256(fixed[offset : offset + stored]).digest()
    start = 256
    for at, length in zip((120, 152, 184), lengths, strict=True):
        fixed[at : at + 32] = hashlib.sha256(fixed[start : start + length]).digest()
        start += length
    struct.pack_into("<I", fixed, 252, zlib.crc32(fixed[:252]))
    return bytes(fixed)


def require(condition: bool, problem: str) -> None:
    if not condition:
        raise AssertionError(f"the reader gives {problem}")
