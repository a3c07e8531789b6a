"""The first 256 bytes: what the file is, how long it is, where its tables are, and the digests that pin them."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass, replace

from . import kinds, limits
from .errors import DamagedError, UnsupportedVersionError

MAGIC = b"\x89BSTK\r\n\x1a"
LENGTH = 256
MAJOR, MINOR = 1, 0  # what files say; flags say which later features they use
SPECIFICATION = "1.1"  # version of SPEC.md that is read and written
RECORD_LENGTH = 128

# magic, major, minor, preamble length | incompatible, read-only-compatible, compatible flags | full length, seal, base
# length | chunk count, base count | offset and length of index, names, metadata | their SHA-256 | reserved | CRC-32
_LAYOUT = struct.Struct("<8sHHI QQQ QQQ II QQQQQQ 32s32s32s 36s I")
SEAL = slice(48, 56)
_CRC = slice(252, 256)
_COPY_AGAIN = "Copy or download the file again."
_UPGRADE = "Upgrade bstack to read the file."


@dataclass(frozen=True)
class Preamble:
    """The fields of the preamble; lengths in bytes. Offsets follow from lengths, because there are no holes.

    `full_length` is that of the complete file, `base_length` that of the base model alone, `seal` the exact length this
    file was cut to on purpose, or 0.
    """

    full_length: int
    base_length: int
    chunk_count: int
    base_count: int
    names_length: int
    metadata_length: int
    index_digest: bytes
    names_digest: bytes
    metadata_digest: bytes
    seal: int = 0
    incompatible: int = 0
    read_only_compatible: int = 0
    compatible: int = 0
    minor: int = MINOR

    @property
    def index_length(self) -> int:
        """Bytes of the index."""
        return self.chunk_count * RECORD_LENGTH

    @property
    def header_length(self) -> int:
        """Bytes of preamble, index, names and metadata: the offset of the first chunk."""
        return LENGTH + self.index_length + self.names_length + self.metadata_length

    def to_bytes(self) -> bytes:
        """Return the 256 bytes."""
        index = LENGTH
        names = index + self.index_length
        metadata = names + self.names_length
        tables = (index, self.index_length, names, self.names_length, metadata, self.metadata_length)
        data = _LAYOUT.pack(
            *(MAGIC, MAJOR, self.minor, LENGTH, self.incompatible, self.read_only_compatible, self.compatible),
            *(self.full_length, self.seal, self.base_length, self.chunk_count, self.base_count, *tables),
            *(self.index_digest, self.names_digest, self.metadata_digest, bytes(36), 0),
        )
        return data[: _CRC.start] + struct.pack("<I", zlib.crc32(data[: _CRC.start]))

    def sealed(self, length: int) -> Preamble:
        """Return the same preamble with the seal at `length`, 0 for none."""
        return replace(self, seal=length)

    def root(self) -> bytes:
        """Return the root digest: SHA-256 over the preamble without seal and CRC.

        It covers the digests of the index, the names and the metadata, and through the index those of all chunks. So it
        authenticates a file and every cut of it, and is the same for all of them.
        """
        data = bytearray(self.to_bytes())
        data[SEAL] = bytes(8)
        return hashlib.sha256(data[: _CRC.start]).digest()


def parse(data: bytes) -> Preamble:
    """Parse and check the 256 bytes of a preamble, whose magic number the caller has recognised.

    Raises UnsupportedVersionError for another major version or an unknown incompatible flag, else DamagedError.
    """
    fields = _LAYOUT.unpack(data)
    _, major, minor, length, *flags, full_length, seal, base_length, chunk_count, base_count = fields[:12]
    index_offset, index_length, names_offset, names_length, metadata_offset, metadata_length = fields[12:18]
    *digests, reserved, crc = fields[18:]
    # A later version may have a longer preamble with its CRC elsewhere; within 256 bytes the CRC is checked first.
    if length == LENGTH and crc != zlib.crc32(data[: _CRC.start]):
        raise DamagedError(
            "the preamble (the first 256 bytes) is damaged: its CRC-32 does not match.", hint=_COPY_AGAIN
        )
    if major != MAJOR:
        raise UnsupportedVersionError(
            f"format version {major}.{minor}; this version of bstk reads {MAJOR}.x.", hint=_UPGRADE
        )
    _require(length == LENGTH, "preamble length", length, f"{LENGTH} in version {MAJOR}")
    unknown = flags[0] & ~kinds.known_features()
    if unknown:
        raise UnsupportedVersionError(
            f"the file uses features this version of bstk does not know (incompatible flags {unknown:#x}).",
            hint=_UPGRADE,
        )
    _require(not any(reserved), "reserved bytes 216 to 251", reserved.hex(), "zeros")

    lengths = (full_length, base_length, chunk_count, base_count, names_length, metadata_length)
    result = Preamble(*lengths, *digests, *(seal, *flags, minor))
    header_length = result.header_length
    names_start = index_offset + index_length
    metadata_start = names_offset + names_length
    _require(1 <= chunk_count <= limits.MAX_CHUNKS, "chunk count", chunk_count, f"1 to {limits.MAX_CHUNKS}")
    _require(1 <= base_count <= chunk_count, "base count", base_count, f"1 to the chunk count, {chunk_count}")
    allowed = f"1 to {limits.MAX_NAMES_LENGTH}"
    _require(1 <= names_length <= limits.MAX_NAMES_LENGTH, "names length", names_length, allowed)
    allowed = f"2 to {limits.MAX_METADATA_LENGTH}"
    _require(2 <= metadata_length <= limits.MAX_METADATA_LENGTH, "metadata length", metadata_length, allowed)
    _require(index_offset == LENGTH, "index offset", index_offset, LENGTH)
    _require(index_length == result.index_length, "index length", index_length, result.index_length)
    _require(names_offset == names_start, "names offset", names_offset, names_start)
    _require(metadata_offset == metadata_start, "metadata offset", metadata_offset, metadata_start)
    _require(full_length <= limits.MAX_FILE_LENGTH, "full length", full_length, f"at most {limits.MAX_FILE_LENGTH}")
    allowed = f"more than the header ({header_length}) and at most the full length ({full_length})"
    _require(header_length < base_length <= full_length, "base length", base_length, allowed)
    allowed = f"0, or {base_length} to {full_length}"
    _require(seal == 0 or base_length <= seal <= full_length, "seal", seal, allowed)
    return result


def _require(condition: bool, what: str, found: object, allowed: object) -> None:
    if not condition:
        raise DamagedError(f"preamble: {what} is {found}; allowed: {allowed}.", hint="The file was written wrongly.")
