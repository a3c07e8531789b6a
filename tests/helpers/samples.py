"""A small good file, and `Draft`: the same file taken to pieces, to be changed and put together again.

`Draft` lays out bytes from the tables of SPEC.md with `struct` alone, so that it can write what `bstk` refuses to write, and
does not share its mistakes.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib

import zstandard

import bstk

PREAMBLE = {
    "magic": (0, "8s"),
    "major": (8, "H"),
    "minor": (10, "H"),
    "preamble_length": (12, "I"),
    "incompatible": (16, "Q"),
    "read_only_compatible": (24, "Q"),
    "compatible": (32, "Q"),
    "full_length": (40, "Q"),
    "seal": (48, "Q"),
    "base_length": (56, "Q"),
    "chunk_count": (64, "I"),
    "base_count": (68, "I"),
    "index_offset": (72, "Q"),
    "index_length": (80, "Q"),
    "names_offset": (88, "Q"),
    "names_length": (96, "Q"),
    "metadata_offset": (104, "Q"),
    "metadata_length": (112, "Q"),
    "index_digest": (120, "32s"),
    "names_digest": (152, "32s"),
    "metadata_digest": (184, "32s"),
    "reserved": (216, "36s"),
    "crc": (252, "I"),
}
RECORD = {
    "name": (0, "I"),
    "kind": (4, "H"),
    "level": (6, "H"),
    "offset": (8, "Q"),
    "stored": (16, "Q"),
    "raw": (24, "Q"),
    "shape": (32, "16s"),
    "dtype": (48, "B"),
    "ndim": (49, "B"),
    "rank": (50, "H"),
    "flags": (52, "I"),
    "importance": (56, "d"),
    "error": (64, "d"),
    "reserved": (72, "24s"),
    "digest": (96, "32s"),
}


def noise(seed: str, length: int) -> bytes:
    """Return `length` bytes that do not compress and never change."""
    return b"".join(hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(-(-length // 32)))[:length]


def entry(name: str, kind: bstk.Kind, raw: bytes, **fields) -> bstk.Entry:
    frame = bstk.pack(raw)
    return bstk.Entry(
        name=name,
        kind=kind,
        raw_length=len(raw),
        stored_length=frame.stored_length,
        digest=frame.digest,
        stored=frame.stored,
        **fields,
    )


def sign(name: str, level: int, shape: tuple[int, int] = (4, 10), rank: int = 1, **fields) -> bstk.Entry:
    rows, columns = shape
    length = rows * ((columns + 7) // 8) + 2 * rank * (rows + columns)
    raw = noise(f"{name} {level}", length)
    fields = {"importance": 8.0 - level, "error": 0.5 ** (level + 1), **fields}
    return entry(name, bstk.SIGN, raw, level=level, shape=shape, dtype="f16", rank=rank, **fields)


METADATA = {
    "model": {"name": "tiny", "architecture": "TinyForCausalLM", "parameters": 88, "original_bytes": 176},
    "quality": [
        {"file_bytes": 1900, "memory_bytes": 90, "blocks": 2, "bits_per_weight": 5.4, "kld": 0.9},
        {"file_bytes": 2100, "memory_bytes": 160, "blocks": 4, "bits_per_weight": 10.8, "kld": 0.2},
    ],
}
BASE = 5


def entries() -> list[bstk.Entry]:
    return [
        entry("config.json", bstk.FILE, b'{"model_type": "tiny"}'),
        entry("norm.weight", bstk.TENSOR, noise("norm", 12), shape=(3,), dtype="f32"),
        entry("scale", bstk.TENSOR, noise("scale", 2), shape=(), dtype="bf16"),
        sign("layers.0.up", 0),
        sign("layers.0.down", 0, shape=(6, 8), rank=2, transposed=True),
        sign("layers.0.up", 1),
        sign("layers.0.down", 1, shape=(6, 8), rank=1, transposed=True),
        sign("layers.0.up", 2),
    ]


def write(path) -> bytes:
    bstk.write(path, METADATA, entries(), BASE)
    return path.read_bytes()


def content(reader: bstk.Reader) -> list[tuple]:
    """Everything a user gets from a file: what each present chunk says of itself, and its raw bytes."""
    return [
        (c.name, c.kind.code, c.level, c.shape, c.dtype, c.rank, c.transposed, c.importance, c.error, reader.read(c))
        for c in reader.chunks
    ]


def frame(raw: bytes, **settings) -> bytes:
    settings = {"write_checksum": True, "write_content_size": True, **settings}
    return zstandard.ZstdCompressor(**settings).compress(raw)


_BLOCKS = {  # kind -> code, rank, incompatible flag, raw bytes of a block of 4 x 10
    "sign": (3, 1, 0, noise("sign", 36)),
    "trellis": (4, 2, 0, noise("trellis", 21) + bytes(8)),
    "spqr": (5, 19, 1, struct.pack("<10H", *range(10)).ljust(64, b"\0") + noise("spqr", 108) + bytes(8)),
    "outliers": (6, 0, 2, bytes(20)),
    "trellis5": (7, 2, 4, noise("trellis5", 24) + bytes(8)),
    "exact": (8, 0, 8, struct.pack("<65I", 16, *[0] * 10, 40, *[0] * 53) + bytes(44)),
}


def chunks_of(reader: bstk.Reader, name: str) -> list[bstk.Chunk]:
    """Return the chunks of `name` that a file has, by level."""
    return [chunk for chunk in reader.chunks if chunk.name == name]


def stack(draft: Draft, *kinds: str) -> None:
    """Have the stack of three blocks in the good file (records 3, 5 and 7) be one of up to three blocks of these kinds."""
    records = (3, 5, 7)
    for record, kind in zip(records, kinds, strict=False):
        code, rank, flag, raw = _BLOCKS[kind]
        draft.chunk(record, frame(raw), kind=code, rank=rank, raw=len(raw))
        draft.forced["incompatible"] = draft.forced.get("incompatible", 0) | flag
    for record in reversed(records[len(kinds) :]):
        draft.drop(record)


class Draft:
    """A file in pieces: `preamble` and each of `records` are dicts; `names`, `metadata` and `chunks` are bytes.

    `bytes()` fits lengths, offsets, digests and the CRC to the pieces; a key set in `forced` (for the preamble) or in a
    record's ``"forced"`` is left as it was set.
    """

    def __init__(self, data: bytes):
        self.preamble = _unpack(PREAMBLE, data, 0)
        p = self.preamble
        self.records = [_unpack(RECORD, data, p["index_offset"] + 128 * i) for i in range(p["chunk_count"])]
        self.names = _split_names(data[p["names_offset"] :][: p["names_length"]])
        self.metadata = data[p["metadata_offset"] :][: p["metadata_length"]]
        self.chunks = [data[r["offset"] :][: r["stored"]] for r in self.records]
        self.forced: dict[str, object] = {}
        self.names_table: bytes | None = None

    def set(self, record: int, **values) -> None:
        self.records[record].setdefault("forced", {}).update(values)

    def shape(self, record: int, *lengths: int, ndim: int | None = None) -> None:
        self.set(
            record, shape=struct.pack("<4I", *((*lengths, 0, 0, 0, 0))[:4]), ndim=len(lengths) if ndim is None else ndim
        )

    def chunk(self, record: int, stored: bytes, **values) -> None:
        self.chunks[record] = stored
        self.set(record, **values)

    def drop(self, record: int) -> None:
        del self.records[record], self.chunks[record]

    def bytes(self) -> bytes:
        names = self.names_table
        if names is None:
            names = b"".join(struct.pack("<I", len(name)) + name for name in self.names)
        count = self.forced.get("chunk_count", len(self.records))
        base = min(self.preamble["base_count"], len(self.records))
        offset = header = 256 + 128 * len(self.records) + len(names) + len(self.metadata)
        ends, index = [], []
        for record, stored in zip(self.records, self.chunks, strict=True):
            fitted = {"offset": offset, "stored": len(stored), "digest": hashlib.sha256(stored).digest()}
            index.append(_pack(RECORD, 128, {**record, **fitted, **record.get("forced", {})}))
            offset += len(stored)
            ends.append(offset)
        index_bytes = b"".join(index)
        preamble = {
            **self.preamble,
            "chunk_count": count,
            "base_count": base,
            "full_length": offset,
            "base_length": ends[base - 1],
            "index_offset": 256,
            "index_length": len(index_bytes),
            "names_offset": 256 + len(index_bytes),
            "names_length": len(names),
            "metadata_offset": header - len(self.metadata),
            "metadata_length": len(self.metadata),
            "index_digest": hashlib.sha256(index_bytes).digest(),
            "names_digest": hashlib.sha256(names).digest(),
            "metadata_digest": hashlib.sha256(self.metadata).digest(),
            **self.forced,
        }
        head = _pack(PREAMBLE, 256, preamble)
        if "crc" not in self.forced:
            head = head[:252] + struct.pack("<I", zlib.crc32(head[:252]))
        return head + index_bytes + names + self.metadata + b"".join(self.chunks)

    def put_metadata(self, value: object) -> None:
        self.metadata = value if isinstance(value, bytes) else json.dumps(value).encode()


def _unpack(table: dict, data: bytes, start: int) -> dict:
    return {name: struct.unpack_from("<" + code, data, start + at)[0] for name, (at, code) in table.items()}


def _pack(table: dict, length: int, values: dict) -> bytes:
    out = bytearray(length)
    for name, (at, code) in table.items():
        struct.pack_into("<" + code, out, at, values[name])
    return bytes(out)


def _split_names(data: bytes) -> list[bytes]:
    names, position = [], 0
    while position < len(data):
        (length,) = struct.unpack_from("<I", data, position)
        names.append(data[position + 4 : position + 4 + length])
        position += 4 + length
    return names
