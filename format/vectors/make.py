"""Make the golden files. Existing ones are never made again, because a reader must read the bytes that old writers wrote.

To add one, add it to `FILES` and run ``python format/vectors/make.py``: existing files and their verdicts are left alone. Each
verdict holds the result that a reader must have: the error class on opening, or the state, the root digest and a digest of
everything in the file; and the result of checking all chunks.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "tests" / "helpers")]

import bad_files  # noqa: E402
import samples  # noqa: E402
import zstandard  # noqa: E402

import bstk  # noqa: E402


def digest(reader: bstk.Reader) -> str:
    """Return a SHA-256 over the fields and raw bytes of every present chunk."""
    total = hashlib.sha256()
    for name, kind, level, shape, dtype, rank, transposed, importance, error, raw in samples.content(reader):
        line = [name, kind, level, list(shape), dtype, rank, transposed, importance.hex(), error.hex(), len(raw)]
        total.update(json.dumps(line).encode() + b"\n" + raw)
    return total.hexdigest()


def verdict(path: Path) -> dict[str, object]:
    """Return the result of this reader on a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bstk.PartialWarning)
            reader = bstk.open(path)
    except bstk.BstkError as error:
        return {"open": type(error).__name__}
    with reader:
        found = {"open": "ok", "state": reader.state, "root": reader.root.hex(), "chunks": len(reader.chunks)}
        try:
            return {**found, "verify": "ok", "content": digest(reader)}
        except bstk.BstkError as error:
            return {**found, "verify": type(error).__name__}


def _whole() -> bytes:
    path = HERE / "whole.bstk"
    if not path.exists():
        samples.write(path)
    return path.read_bytes()


def _weights() -> bytes:
    """Blocks of every kind with plausible factors; expected-weights.json holds the matrices that they add up to."""
    entries = []
    for level, (kind, name, shape, rank) in enumerate(
        [
            (bstk.SIGN, "sign", (5, 11), 2),
            (bstk.SIGN, "sign", (5, 11), 1),
            (bstk.TRELLIS, "trellis", (6, 24), 2),
            (bstk.TRELLIS, "trellis", (6, 24), 2),
            (bstk.TRELLIS, "odd", (3, 7), 2),
        ]
    ):
        (m, n), sign = shape, kind is bstk.SIGN
        packed = m * -(-n // 8) if sign else (m + 3) * -(-n // 4)
        halves = rank * (m + n) if sign else m
        raw = samples.noise(f"weights {level}", packed + halves)
        factors = struct.pack(f"<{halves}e", *(byte / 64 - 2 for byte in raw[packed:]))
        own = sum(entry.name == name for entry in entries)
        entries.append(
            samples.entry(name, kind, raw[:packed] + factors, level=own, shape=shape, dtype="f16", rank=rank)
        )
    entries.sort(key=lambda entry: entry.level)
    return _written(entries, 3)


def _spqr() -> bytes:
    """SpQR stacks of both code widths and two group widths; expected-spqr.json holds the matrices that they add up to."""
    entries = []
    for name, (m, n), rank, counts in (
        ("three", (18, 40), 16 + 3, [2] * 18),
        ("four", (5, 33), 16 + 4, [0, 33, 1, 0, 2]),
        ("wide", (17, 70), 32 + 4, [0] * 17),
    ):
        entries.append(
            samples.entry(name, bstk.SPQR, _spqr_block(name, m, n, rank), shape=(m, n), dtype="f16", rank=rank)
        )
        entries.append(
            samples.entry(
                name, bstk.OUTLIERS, _outliers_block(name, n, counts), level=1, shape=(m, n), dtype="f16", rank=0
            )
        )
    packed, m = 21 * 10, 18
    noise = samples.noise("above", packed + m)
    scales = struct.pack(f"<{m}e", *(byte / 4096 for byte in noise[packed:]))
    entries.append(
        samples.entry("three", bstk.TRELLIS, noise[:packed] + scales, level=2, shape=(18, 40), dtype="f16", rank=2)
    )
    entries.sort(key=lambda entry: entry.level)
    return _written(entries, 3)


def _trellis5() -> bytes:
    """Stacks of trellis5 blocks, one of them on SpQR; expected-trellis5.json holds the matrices that they add up to."""
    entries = []
    for name, level, (m, n) in (("even", 0, (6, 24)), ("even", 1, (6, 24)), ("odd", 0, (3, 7)), ("above", 1, (18, 40))):
        packed = (m + 4) * -(-n // 4)
        noise = samples.noise(f"trellis5 {name} {level}", packed + m)
        raw = noise[:packed] + struct.pack(f"<{m}e", *(byte / 4096 for byte in noise[packed:]))
        entries.append(samples.entry(name, bstk.TRELLIS5, raw, level=level, shape=(m, n), dtype="f16", rank=2))
    entries.append(
        samples.entry("above", bstk.SPQR, _spqr_block("below", 18, 40, 19), shape=(18, 40), dtype="f16", rank=19)
    )
    entries.sort(key=lambda entry: entry.level)
    return _written(entries, 3)


def _exact() -> bytes:
    """Exact chunks on stacks of every kind; expected-exact.json holds what they give back.

    The blocks are those of other golden files, the originals what `EXACT` of tests/helpers/exact_samples.py says.
    """
    import exact_samples

    return _written(*exact_samples.entries())


def _spqr_block(seed: str, m: int, n: int, rank: int) -> bytes:
    bits, g = rank % 16, rank - rank % 16
    order = sorted(range(n), key=lambda column: hashlib.sha256(f"{seed} column {column}".encode()).digest())
    parts = [struct.pack(f"<{n}H", *order).ljust(-(-2 * n // 64) * 64, b"\0")]
    for tile in range(-(-m // 16) * -(-n // g)):
        raw = samples.noise(f"{seed} tile {tile}", 2 * bits * g + 16)
        s0, s1, z0, z1 = raw[-4:]
        parts.append(raw[:-4] + struct.pack("<4e", s0 / 2048, s1 / 4096, z0 / 32, z1 / 256))
    return b"".join(parts)


def _outliers_block(seed: str, n: int, counts: list[int]) -> bytes:
    pointer, columns = [0], []
    for row, count in enumerate(counts):
        ranked = sorted(range(n), key=lambda column: hashlib.sha256(f"{seed} {row} {column}".encode()).digest())
        columns += sorted(ranked[:count])
        pointer.append(len(columns))
    values = [byte / 64 - 2 for byte in samples.noise(f"{seed} outliers", len(columns))]
    return struct.pack(f"<{len(pointer)}I{len(columns)}H{len(columns)}e", *pointer, *columns, *values)


def _spqr_with(record: int, at: int, changed: bytes) -> bytes:
    return _with("spqr", record, at, changed)


def _with(name: str, record: int, at: int, changed: bytes) -> bytes:
    """A golden file with bytes of one chunk overwritten, all digests right."""

    def change(draft: samples.Draft) -> None:
        raw = bytearray(zstandard.ZstdDecompressor().decompress(draft.chunks[record]))
        raw[at : at + len(changed)] = changed
        draft.chunk(record, samples.frame(bytes(raw)))

    return bad_files.build(change, (HERE / f"{name}.bstk").read_bytes())


def _written(entries: list[bstk.Entry], base_count: int) -> bytes:
    path = HERE / "temporary"
    bstk.write(path, {}, entries, base_count)
    data = path.read_bytes()
    path.unlink()
    return data


def _cut(chunks: int, seal: bool) -> bytes:
    with bstk.open(HERE / "whole.bstk") as reader:
        size = reader.all_chunks[chunks - 1].end / bstk.MB
    path = HERE / "temporary"
    bstk.truncate(HERE / "whole.bstk", path, mb=size, seal=seal)
    data = path.read_bytes()
    path.unlink()
    return data


def _flag(name: str):
    def change(draft: samples.Draft) -> None:
        draft.forced[name] = 1 << 63

    return change


FILES = {
    "whole.bstk": lambda: _whole(),
    "sealed.bstk": lambda: _cut(6, seal=True),
    "smallest.bstk": lambda: _cut(5, seal=True),
    "unsealed-cut.bstk": lambda: _cut(6, seal=False),
    "partial-with-tail.bstk": lambda: _whole()[:-3],
    "compatible-flag.bstk": lambda: bad_files.build(_flag("compatible"), _whole()),
    "read-only-compatible-flag.bstk": lambda: bad_files.build(_flag("read_only_compatible"), _whole()),
    "weights.bstk": lambda: _weights(),
    "spqr.bstk": lambda: _spqr(),
    "trellis5.bstk": lambda: _trellis5(),
    "exact.bstk": lambda: _exact(),
    "bad-exact-trailing-23.bstk": lambda: _with("exact", 11, 0, b"\x17"),
    "bad-exact-more-symbols-than-weights.bstk": lambda: _with("exact", 11, 4, b"\x01"),
    "bad-exact-an-escape-without-bytes.bstk": lambda: _with("exact", 11, 260 + 7, b"\x80"),
    "bad-spqr-permutation-past-the-matrix.bstk": lambda: _spqr_with(0, 6, b"\x28\0"),
    "bad-spqr-permutation-column-twice.bstk": lambda: _spqr_with(0, 0, struct.pack("<H", 3) * 2),
    "bad-outliers-pointer-falls.bstk": lambda: _spqr_with(3, 8, struct.pack("<I", 1)),
    "bad-outliers-pointer-too-far.bstk": lambda: _spqr_with(3, 4 * 18, struct.pack("<I", 37)),
    "bad-outliers-column-past-the-matrix.bstk": lambda: _spqr_with(3, 4 * 19 + 2, b"\x28\0"),
    "bad-outliers-columns-fall.bstk": lambda: _spqr_with(3, 4 * 19, b"\x27\0"),
    "chunk-flip.bstk": lambda: _whole()[:-20] + bytes([_whole()[-20] ^ 4]) + _whole()[-19:],
    **{
        f"bad-{case}.bstk": lambda case=case: bad_files.build(bad_files.OPEN[case][0], _whole())
        for case in (
            "wrong-crc",
            "major-2",
            "incompatible-flag-63",
            "preamble-reserved",
            "below-smallest",
            "inside-the-index",
            "appended",
            "sealed-elsewhere",
            "index-digest",
            "offset-hole",
            "offset-overlap",
            "stored-wraps-around",
            "raw-bomb",
            "shape-wraps-around",
            "kind-unknown",
            "level-gap",
            "sign-rank-too-large",
            "importance-nan",
            "name-overlong-utf8",
            "name-twice",
            "file-parent",
            "metadata-repeated-key",
            "metadata-nan",
            "git-lfs-pointer",
            "html",
        )
    },
    **{
        f"bad-{case}.bstk": lambda case=case: bad_files.build(bad_files.CHUNK[case][1], _whole())
        for case in ("frame-without-checksum", "frame-and-a-byte", "frame-larger-than-the-index-says")
    },
}


def main() -> None:
    """Write the files and verdicts that are missing."""
    verdicts_path = HERE / "verdicts.json"
    verdicts = json.loads(verdicts_path.read_text()) if verdicts_path.exists() else {}
    for name, make in FILES.items():
        path = HERE / name
        if not path.exists() or name not in verdicts:
            path.write_bytes(make())
            verdicts[name] = verdict(path)
    verdicts_path.write_text(json.dumps(verdicts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
