"""The named bad files: what is done to the good file, and what a reader must say.

Each is a function of a `Draft` that returns bytes, or changes the draft and returns None. `OPEN` fail when they are opened,
`CHUNK` when the changed chunk is read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import samples
import zstandard

D, U, N, T = "DamagedError", "UnsupportedVersionError", "NotBstkError", "TruncatedError"

# The records of the good file.
FILE, NORM, SCALE, UP0, DOWN0, UP1, DOWN1, UP2 = range(8)


def forced(**values) -> Callable:
    return lambda draft: draft.forced.update(values)


def more(field: str, by: int) -> Callable:
    return lambda draft: draft.forced.update({field: draft.preamble[field] + by})


def record(number: int, **values) -> Callable:
    return lambda draft: draft.set(number, **values)


def shape(number: int, *lengths: int, ndim: int | None = None) -> Callable:
    return lambda draft: draft.shape(number, *lengths, ndim=ndim)


def name(number: int, text: bytes) -> Callable:
    return lambda draft: draft.names.__setitem__(number, text)


def stack(*kinds: str) -> Callable:
    return lambda draft: samples.stack(draft, *kinds)


def table(change: Callable[[list[bytes]], bytes]) -> Callable:
    return lambda draft: setattr(draft, "names_table", change([struct.pack("<I", len(n)) + n for n in draft.names]))


def meta(data: bytes) -> Callable:
    return lambda draft: draft.put_metadata(data)


def both(*changes: Callable) -> Callable:
    def change(draft):
        for one in changes:
            one(draft)

    return change


def chunk(number: int, change: Callable[[bytes, bytes], bytes], **values) -> Callable:
    """Replace a chunk's frame with what `change` makes of (frame, raw); digests and lengths follow."""

    def apply(draft):
        stored = draft.chunks[number]
        draft.chunk(number, change(stored, zstandard.ZstdDecompressor().decompress(stored)), **values)

    return apply


def _seal_inside(draft):
    draft.forced["seal"] = len(draft.bytes()) - 1
    return draft.bytes()[:-1]


def _smaller_base(draft):
    draft.preamble["base_count"] = DOWN0


def _tensor_twice(draft):
    draft.names.pop(2)
    for number in range(SCALE, len(draft.records)):
        draft.set(number, name=draft.records[number]["name"] - 1)


def _two_long_files(draft):
    draft.chunk(FILE, bytes(2**18), raw=2**28 - 11)
    draft.set(NORM, kind=1, shape=bytes(16), ndim=0, dtype=0, raw=12)


def _far_window(stored: bytes, raw: bytes) -> bytes:
    # Magic, descriptor (content size of 8 bytes, checksum), window 2**24, content size, one empty last block.
    return b"\x28\xb5\x2f\xfd\xc4" + bytes([(24 - 10) << 3]) + struct.pack("<Q", len(raw)) + b"\x01\x00\x00" + bytes(4)


def _original(draft, record, **fields):
    """Make a record one of an original chunk, of a name of its own unless it is the first of its name."""
    names = [b"config.json", b"norm.weight", b"scale", b"layers.0.up", b"layers.0.down", b"model.safetensors"]
    if record > 4:
        draft.names, fields = names, {**fields, "name": 5}
    draft.chunk(record, samples.frame(b"bytes"), kind=9, level=0, rank=0, raw=5)
    draft.set(record, **{"shape": bytes(16), "ndim": 0, "dtype": 0, "flags": 0, **fields})
    draft.forced["incompatible"] = 16


OPEN = {
    # preamble
    "wrong-crc": (forced(crc=1), D),
    "major-0": (forced(major=0), U),
    "major-2": (forced(major=2), U),
    "major-2-long-preamble": (forced(major=2, preamble_length=512), U),
    "long-preamble": (forced(preamble_length=512), D),
    "preamble-length-0": (forced(preamble_length=0), D),
    "incompatible-flag-0-without-its-kind": (forced(incompatible=1), D),
    "incompatible-flag-2-without-its-kind": (forced(incompatible=4), D),
    "incompatible-flag-3-without-its-kind": (forced(incompatible=8), D),
    "incompatible-flag-4-without-its-kind": (forced(incompatible=16), D),
    "incompatible-flag-5": (forced(incompatible=32), U),
    "incompatible-flag-63": (forced(incompatible=1 << 63), U),
    "preamble-reserved": (forced(reserved=b"\x01" + bytes(35)), D),
    "full-length-short": (more("full_length", -1), D),
    "full-length-long": (more("full_length", 1), D),
    "full-length-huge": (forced(full_length=2**64 - 1), D),
    "base-length-0": (forced(base_length=0), D),
    "base-length-less": (more("base_length", -1), D),
    "base-length-more": (more("base_length", 1), D),
    "base-length-huge": (forced(base_length=2**64 - 1), D),
    "no-chunks": (forced(chunk_count=0), D),
    "chunk-count-less": (forced(chunk_count=7), D),
    "chunk-count-more": (forced(chunk_count=9), D),
    "chunk-count-huge": (forced(chunk_count=2**32 - 1), D),
    "base-count-0": (forced(base_count=0), D),
    "base-count-less": (forced(base_count=4), D),
    "base-count-more": (forced(base_count=9), D),
    "index-offset": (forced(index_offset=255), D),
    "index-length": (more("index_length", 1), D),
    "index-length-huge": (forced(index_length=2**64 - 128), D),
    "names-offset": (more("names_offset", 1), D),
    "names-offset-huge": (forced(names_offset=2**64 - 1), D),
    "names-length-0": (forced(names_length=0), D),
    "names-length-huge": (forced(names_length=2**64 - 1), D),
    "metadata-offset": (more("metadata_offset", -1), D),
    "metadata-length-more": (more("metadata_length", 1), D),
    "metadata-length-1": (forced(metadata_length=1), D),
    "metadata-length-huge": (forced(metadata_length=2**63), D),
    "index-digest": (forced(index_digest=bytes(32)), D),
    "names-digest": (forced(names_digest=bytes(32)), D),
    "metadata-digest": (forced(metadata_digest=bytes(32)), D),
    # length and seal
    "appended": (lambda draft: draft.bytes() + b"\0", D),
    "sealed-elsewhere": (lambda draft: draft.forced.update(seal=len(draft.bytes()) - len(draft.chunks[-1])), D),
    "seal-1": (forced(seal=1), D),
    "seal-huge": (forced(seal=2**64 - 1), D),
    "seal-inside-a-chunk": (_seal_inside, D),
    "below-smallest": (lambda draft: draft.bytes()[:1500], T),
    "inside-the-index": (lambda draft: draft.bytes()[:300], T),
    "inside-the-preamble": (lambda draft: draft.bytes()[:100], T),
    "inside-the-magic": (lambda draft: draft.bytes()[:5], T),
    # index
    "name-id-out-of-range": (record(UP2, name=5), D),
    "name-id-huge": (record(UP2, name=2**32 - 1), D),
    "name-id-not-in-order": (both(record(FILE, name=1), record(NORM, name=0)), D),
    "kind-0": (record(NORM, kind=0), D),
    "kind-unknown": (record(NORM, kind=999), D),
    "level-gap": (record(UP2, level=3), D),
    "level-twice": (record(UP2, level=1), D),
    "first-level-1": (record(UP0, level=1), D),
    "level-of-a-tensor": (record(NORM, level=1), D),
    "offset-hole": (lambda draft: draft.set(UP1, offset=draft.records[UP1]["offset"] + 1), D),
    "offset-overlap": (lambda draft: draft.set(UP1, offset=draft.records[UP1]["offset"] - 1), D),
    "offset-in-the-header": (record(UP1, offset=0), D),
    "offset-huge": (record(UP1, offset=2**64 - 1), D),
    "stored-0": (record(UP2, stored=0), D),
    "stored-huge": (record(UP2, stored=2**64 - 1), D),
    "stored-wraps-around": (lambda draft: draft.set(UP1, stored=2**64 - draft.records[UP1]["offset"]), D),
    "stored-less": (record(UP2, stored=5), D),
    "raw-0": (record(FILE, raw=0), D),
    "raw-less": (record(UP2, raw=35), D),
    "raw-more": (record(NORM, raw=13), D),
    "raw-huge": (record(FILE, raw=2**64 - 1), D),
    "raw-bomb": (record(FILE, raw=2**21), D),
    "file-of-256-mib-and-a-byte": (chunk(FILE, lambda s, raw: bytes(2**18), raw=2**28 + 1), D),
    "files-of-256-mib-and-more": (_two_long_files, D),
    "ndim-5": (shape(NORM, 3, ndim=5), D),
    "ndim-255": (shape(NORM, 3, ndim=255), D),
    "dimension-0": (shape(NORM, 0, ndim=1), D),
    "dimension-after-the-last": (shape(NORM, 3, 1, ndim=1), D),
    "dimension-huge": (shape(NORM, 2**31), D),
    "shape-overflows": (shape(NORM, 2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1), D),
    "shape-wraps-around": (shape(NORM, 2**31 - 1, 2**31 - 1, 4, 3), D),
    "dtype-11": (record(NORM, dtype=11), D),
    "dtype-255": (record(NORM, dtype=255), D),
    "dtype-of-another-size": (record(NORM, dtype=2), D),
    "tensor-without-dtype": (record(NORM, dtype=0), D),
    "tensor-with-rank": (record(NORM, rank=1), D),
    "file-with-shape": (shape(FILE, 21), D),
    "file-with-dtype": (record(FILE, dtype=6), D),
    "file-with-rank": (record(FILE, rank=1), D),
    "file-transposed": (record(FILE, flags=1), D),
    "vector-transposed": (record(NORM, flags=1), D),
    "unknown-record-flag": (record(UP0, flags=2), D),
    "sign-in-f32": (record(UP0, dtype=1), D),
    "sign-rank-0": (record(UP0, rank=0), D),
    "sign-rank-too-large": (record(UP0, rank=5), D),
    "sign-of-one-dimension": (shape(UP0, 40), D),
    "sign-of-three-dimensions": (shape(UP0, 4, 10, 1), D),
    "importance-nan": (record(UP1, importance=float("nan")), D),
    "importance-infinite": (record(UP1, importance=float("-inf")), D),
    "error-nan": (record(UP1, error=float("nan")), D),
    "error-infinite": (record(UP1, error=float("inf")), D),
    "error-negative": (record(UP1, error=-1.0), D),
    "record-reserved": (record(UP1, reserved=bytes(23) + b"\x01"), D),
    "blocks-of-two-shapes": (shape(UP2, 3, 12), D),
    "blocks-of-two-orientations": (record(UP2, flags=1), D),
    "tensor-twice": (_tensor_twice, D),
    "stack-of-outliers": (stack("outliers"), D),
    "stack-of-outliers-and-trellis": (stack("outliers", "trellis"), D),
    "stack-of-outliers-and-spqr": (stack("outliers", "spqr"), D),
    "stack-of-spqr-twice": (stack("spqr", "spqr"), D),
    "stack-of-spqr-and-sign": (stack("spqr", "sign"), D),
    "stack-of-spqr-and-outliers-twice": (stack("spqr", "outliers", "outliers"), D),
    "stack-of-spqr-trellis-and-outliers": (stack("spqr", "trellis", "outliers"), D),
    "stack-of-spqr-outliers-and-spqr": (stack("spqr", "outliers", "spqr"), D),
    "stack-of-trellis-and-outliers": (stack("trellis", "outliers"), D),
    "stack-of-trellis-spqr-and-outliers": (stack("trellis", "spqr", "outliers"), D),
    "stack-of-trellis-and-sign": (stack("trellis", "trellis", "sign"), D),
    "stack-of-sign-and-trellis": (stack("sign", "trellis"), D),
    "stack-of-trellis-and-trellis5": (stack("trellis", "trellis5"), D),
    "stack-of-trellis5-and-trellis": (stack("trellis5", "trellis"), D),
    "stack-of-trellis5-and-outliers": (stack("trellis5", "outliers"), D),
    "stack-of-sign-and-spqr": (stack("sign", "spqr"), D),
    "stack-of-exact": (stack("exact"), D),
    "stack-of-sign-exact-and-sign": (stack("sign", "exact", "sign"), D),
    "exact-before-a-block": (stack("sign", "exact"), D),
    "exact-of-i32": (lambda draft: (samples.stack(draft, "sign", "sign", "exact"), draft.set(7, dtype=8)), D),
    "exact-of-rank-1": (lambda draft: (samples.stack(draft, "sign", "sign", "exact"), draft.set(7, rank=1)), D),
    "exact-of-another-shape": (lambda draft: (samples.stack(draft, "sign", "sign", "exact"), draft.shape(7, 10, 4)), D),
    "exact-too-short": (lambda draft: (samples.stack(draft, "sign", "sign", "exact"), draft.set(7, raw=303)), D),
    "original-in-the-base-model": (lambda draft: _original(draft, NORM), D),
    "original-before-a-block": (lambda draft: _original(draft, 5), D),
    "original-with-a-shape": (lambda draft: _original(draft, 7, ndim=1, shape=struct.pack("<4I", 3, 0, 0, 0)), D),
    "stack-of-sign-and-outliers": (stack("sign", "outliers"), D),
    "block-on-a-file": (record(UP1, name=0), D),
    "name-after-the-smallest-model": (_smaller_base, D),
    # names
    "name-empty": (name(1, b""), D),
    "name-too-long": (name(1, b"x" * 1025), D),
    "name-past-the-table": (table(lambda names: b"".join(names[:-1]) + struct.pack("<I", 2**32 - 1) + b"x"), D),
    "names-left-over": (table(lambda names: b"".join(names) + b"\0\0"), D),
    "name-missing": (table(lambda names: b"".join(names[:-1])), D),
    "names-more-than-chunks": (table(lambda names: b"".join(struct.pack("<I", 1) + b"x" for _ in range(50_000))), D),
    "name-unused": (lambda draft: draft.names.append(b"unused"), D),
    "name-twice": (name(1, b"scale"), D),
    "name-not-utf8": (name(1, b"\xff"), D),
    "name-overlong-utf8": (name(1, b"\xc0\xaf"), D),
    "name-surrogate": (name(1, b"\xed\xa0\x80"), D),
    "name-nul": (name(1, b"a\0b"), D),
    "name-newline": (name(1, b"a\nb"), D),
    "name-escape-sequence": (name(1, b"\x1b[31m"), D),
    "name-c1-control": (name(1, "\x9b31m".encode()), D),
    "name-right-to-left": (name(1, "a\u202eb".encode()), D),
    "file-absolute": (name(0, b"/etc/passwd"), D),
    "file-parent": (name(0, b"../config.json"), D),
    "file-parent-inside": (name(0, b"a/../../config.json"), D),
    "file-dot": (name(0, b"."), D),
    "file-folder": (name(0, b"a/"), D),
    "file-empty-segment": (name(0, b"a//b"), D),
    "file-backslash": (name(0, b"a\\b"), D),
    "file-drive": (name(0, b"C:config.json"), D),
    # metadata
    "metadata-nan": (meta(b'{"a":NaN}'), D),
    "metadata-infinity": (meta(b'{"a":-Infinity}'), D),
    "metadata-1e999": (meta(b'{"a":1e999}'), D),
    "metadata-400-digits": (meta(b'{"a":' + b"9" * 400 + b"}"), D),
    "metadata-repeated-key": (meta(b'{"a":1,"a":1}'), D),
    "metadata-repeated-key-inside": (meta(b'{"b":[{"a":1,"\\u0061":2}]}'), D),
    "metadata-array": (meta(b"[]"), D),
    "metadata-number": (meta(b"12"), D),
    "metadata-not-json": (meta(b"{'a':1}"), D),
    "metadata-cut-off": (meta(b'{"a":'), D),
    "metadata-two-values": (meta(b"{}{}"), D),
    "metadata-not-utf8": (meta(b'{"a":"\xff"}'), D),
    "metadata-byte-order-mark": (meta(b"\xef\xbb\xbf{}"), D),
    "metadata-lone-surrogate": (meta(b'{"a":"\\ud800"}'), D),
    "metadata-lone-surrogate-as-a-key": (meta(b'{"\\ud800":1}'), D),
    "metadata-lone-surrogate-inside": (meta(b'{"a":[[{"b":["","\\udfff"]}]]}'), D),
    "metadata-key-repeated-after-10000": (
        meta(b"{" + b"".join(b'"%d":0,' % i for i in range(10_000)) + b'"9999":0}'),
        D,
    ),
    "metadata-string-without-end": (meta(b"{" + rb"\"" * 100_000), D),
    "metadata-string-without-end-and-a-backslash": (meta(b"{" + rb"\"" * 100_000 + b"\\"), D),
    "metadata-262145-values": (meta(b'{"a":[' + b"[]," * 2**18 + b"0]}"), D),
    "metadata-huge-integer": (meta(b'{"a":' + b"1" * 5000 + b"}"), D),
    "metadata-33-levels": (meta(b'{"a":' + b"[" * 32 + b"]" * 32 + b"}"), D),
    "metadata-100000-levels": (meta(b'{"a":' + b"[" * 100_000), D),
    # not a .bstk file at all
    "empty": (lambda draft: b"", N),
    "zeros": (lambda draft: bytes(4096), N),
    "magic-of-another-file": (forced(magic=b"\x89PNG\r\n\x1a\n"), N),
    "transferred-as-text": (lambda draft: draft.bytes().replace(b"\r\n", b"\n"), N),
    "git-lfs-pointer": (lambda draft: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", N),
    "html": (lambda draft: b"<!DOCTYPE html><html><title>404</title></html>", N),
    "html-after-blank-lines": (lambda draft: b"\n\n  <HTML lang=en><body>log in</body>", N),
    "json": (lambda draft: b'{"error": "not found"}', N),
    "text": (lambda draft: b"hello, world\n", N),
    "gguf": (lambda draft: b"GGUF\x03\0\0\0" + bytes(64), N),
    "safetensors": (lambda draft: struct.pack("<Q", 64) + b'{"__metadata__":{}}' + bytes(45), N),
    "zip": (lambda draft: b"PK\x03\x04" + bytes(64), N),
    "zstd": (lambda draft: samples.frame(draft.bytes()), N),
    "random": (lambda draft: samples.noise("random", 4096), N),
}

CHUNK = {
    "frame-without-checksum": (FILE, chunk(FILE, lambda s, raw: samples.frame(raw, write_checksum=False))),
    "frame-without-content-size": (FILE, chunk(FILE, lambda s, raw: samples.frame(raw, write_content_size=False))),
    "frame-of-another-size": (UP1, chunk(UP1, lambda s, raw: samples.frame(raw + b"x"))),
    "frame-larger-than-the-index-says": (FILE, chunk(FILE, lambda s, raw: samples.frame(bytes(2**26)))),
    "frame-and-a-byte": (UP1, chunk(UP1, lambda s, raw: s + b"\0")),
    "frame-twice": (UP1, chunk(UP1, lambda s, raw: s + s)),
    "frame-and-a-skippable-frame": (UP1, chunk(UP1, lambda s, raw: s + b"\x50\x2a\x4d\x18\0\0\0\0")),
    "skippable-frame-first": (UP1, chunk(UP1, lambda s, raw: b"\x50\x2a\x4d\x18\0\0\0\0" + s)),
    "only-a-skippable-frame": (FILE, chunk(FILE, lambda s, raw: b"\x50\x2a\x4d\x18\x04\0\0\0abcd")),
    "frame-cut-off": (UP1, chunk(UP1, lambda s, raw: s[:-1])),
    "frame-head-cut-off": (UP1, chunk(UP1, lambda s, raw: s[:5])),
    "frame-is-garbage": (UP1, chunk(UP1, lambda s, raw: samples.noise("garbage", 40))),
    "frame-is-raw": (UP1, chunk(UP1, lambda s, raw: raw)),
    "frame-of-empty-data": (FILE, chunk(FILE, lambda s, raw: samples.frame(b""))),
    "frame-bit-flip": (UP1, chunk(UP1, lambda s, raw: s[:-8] + bytes([s[-8] ^ 1]) + s[-7:])),
    "frame-checksum-flip": (UP1, chunk(UP1, lambda s, raw: s[:-1] + bytes([s[-1] ^ 1]))),
    "frame-window-16-mib": (UP1, chunk(UP1, _far_window)),
    "frame-with-dictionary": (FILE, chunk(FILE, lambda s, raw: samples.frame(raw, dict_data=_dictionary()))),
    "chunk-digest": (UP1, record(UP1, digest=bytes(32))),
}


def _dictionary() -> zstandard.ZstdCompressionDict:
    return zstandard.train_dictionary(1024, [samples.noise(f"dictionary {i}", 64) * 2 for i in range(100)])


def build(change: Callable, good: bytes) -> bytes:
    """Return the bad file that `change` makes of the good one."""
    draft = samples.Draft(good)
    made = change(draft)
    return made if isinstance(made, bytes) else draft.bytes()
