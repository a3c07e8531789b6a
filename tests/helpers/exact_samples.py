"""Stacks of all kinds with originals that are not what their blocks predict, for exact chunks."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import samples

import bstk
from bstack.kernels import exact
from bstack.kernels.matrix import Matrix
from bstk import metadata

VECTORS = Path(__file__).parents[2] / "format" / "vectors"
# Name of the stack, the golden file with its blocks, and the type of the original.
STACKS = [
    ("even", "trellis5", "bf16"),
    ("odd", "trellis5", "f16"),
    ("above", "trellis5", "f32"),
    ("three", "spqr", "bf16"),
    ("sign", "weights", "f32"),
]
_SPECIAL = {
    "bf16": [0x8000, 0, 0x7F80, 0xFF80, 0x7FC1, 0xFF81, 0x0001, 0x8001, 0x7F7F, 0x3F80],
    "f16": [0x8000, 0, 0x7C00, 0xFC00, 0x7E01, 0xFD01, 0x0001, 0x8001, 0x7BFF, 0x3C00],
    "f32": [0x80000000, 0, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFF800001, 1, 0x80000001, 0x7F7FFFFF, 0x3F800000],
}


def special_values(dtype: str) -> np.ndarray:
    """Return -0, 0, infinities, NaNs with payloads, the smallest subnormal numbers, the largest number, 1; as bits of the type."""
    return np.array(_SPECIAL[dtype], np.uint32 if dtype == "f32" else np.uint16)


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 values in a type, as its bits (bf16: cut off)."""
    if dtype == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.view(np.uint32) if dtype == "f32" else values.astype(np.float16).view(np.uint16)


def original(predicted: np.ndarray, dtype: str, seed: int, spread: float = 0.02) -> np.ndarray:
    """Return bits near a prediction, some of them special values at random places."""
    rng = np.random.default_rng(seed)
    near = predicted * (1 + spread * rng.standard_normal(predicted.shape, np.float32))
    bits = to_bits(near.astype(np.float32), dtype).copy()
    special = special_values(dtype)
    places = rng.choice(bits.size, min(len(special), bits.size), replace=False)
    bits.reshape(-1)[places] = special[: len(places)]
    return bits


def entries() -> tuple[list[bstk.Entry], int]:
    """Return the entries of the golden file, and how many are its base model; write expected-exact.json."""
    import json

    kept, base, above, top, expected, data = [], [], [], [], {}, b""
    for number, (name, file, dtype) in enumerate(STACKS):
        with bstk.open(VECTORS / f"{file}.bstk") as reader:
            chunks = samples.chunks_of(reader, name)
            raws = [reader.read(chunk) for chunk in chunks]
        rows, columns = chunks[0].shape
        for chunk, raw in zip(chunks, raws, strict=True):
            given = {key: getattr(chunk, key) for key in ("level", "shape", "dtype", "rank")}
            (above if chunk.level else base).append(samples.entry(name, chunk.kind, raw, **given))
        stack = Matrix.of(rows, columns, [(c.kind.code, c.rank, raw) for c, raw in zip(chunks, raws, strict=True)])
        bits = original(exact.predict(stack), dtype, number)
        raw = b"".join(exact.encode(stack, bits, dtype))
        top.append(samples.entry(name, bstk.EXACT, raw, level=len(chunks), shape=(rows, columns), dtype=dtype))
        expected[name] = bits.tobytes().hex()
        kept.append(bits)
    head, rest = b"a file of ", b"weights"
    even, odd = kept[0], kept[1]
    data = head + even.tobytes() + rest + odd[:, 1::2].tobytes()
    pieces = [
        ["bytes", len(head)],
        ["parameter", "even"],
        ["chunk", ".parts/model.safetensors/1"],
        ["parameter", "odd", 1, [3, 3], [7, 2]],
    ]
    described = {
        "length": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "shapes": {"even": list(even.shape), "odd": list(odd.shape)},
        "pieces": pieces,
    }
    top.append(samples.entry(".parts/model.safetensors/1", bstk.ORIGINAL, rest))
    top.append(samples.entry("model.safetensors", bstk.ORIGINAL, metadata.dump(described) + b"\0" + head))
    expected["model.safetensors"] = data.hex()
    (VECTORS / "expected-exact.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
    return [*base, *sorted(above, key=lambda e: e.level), *top], len(base)


def payload(trailing: int, counts: dict[int, int], rows: int, rest: bytes) -> bytes:
    """Return an exact chunk's raw bytes with given counts of classes."""
    return struct.pack("<65I", trailing, *(counts.get(number, 0) for number in range(64))) + bytes(rows) + rest
