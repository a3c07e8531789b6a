"""How the golden files were made. They are never made again: a reader must go on reading the very bytes that old writers wrote.

To add one, add it to `FILES` and run ``python format/vectors/make.py``: files that exist are left alone, and so are their
verdicts. Each verdict says what a reader must come to: the error class on opening, or the state, the root digest and a
digest of everything in the file; and what checking all chunks comes to.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "tests" / "format")]

import bad_files  # noqa: E402
import bstk  # noqa: E402
import samples  # noqa: E402


def digest(reader: bstk.Reader) -> str:
    """Return a SHA-256 over what every present chunk says of itself and its raw bytes."""
    total = hashlib.sha256()
    for name, kind, level, shape, dtype, rank, transposed, importance, error, raw in samples.content(reader):
        line = [name, kind, level, list(shape), dtype, rank, transposed, importance.hex(), error.hex(), len(raw)]
        total.update(json.dumps(line).encode() + b"\n" + raw)
    return total.hexdigest()


def verdict(path: Path) -> dict[str, object]:
    """Return what this reader comes to on a file."""
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
    """Blocks of every kind with plausible factors; what they add up to is pinned in expected-weights.json."""
    import struct

    entries = []
    for level, (kind, name, shape, rank) in enumerate(
        [(bstk.SIGN, "sign", (5, 11), 2), (bstk.SIGN, "sign", (5, 11), 1), (bstk.TRELLIS, "trellis", (6, 24), 2),
         (bstk.TRELLIS, "trellis", (6, 24), 2), (bstk.TRELLIS, "odd", (3, 7), 2)]
    ):  # fmt: skip
        (m, n), sign = shape, kind is bstk.SIGN
        packed = m * -(-n // 8) if sign else (m + 3) * -(-n // 4)
        halves = rank * (m + n) if sign else m
        raw = samples.noise(f"weights {level}", packed + halves)
        factors = struct.pack(f"<{halves}e", *(byte / 64 - 2 for byte in raw[packed:]))
        own = sum(entry.name == name for entry in entries)
        entries.append(samples.entry(name, kind, raw[:packed] + factors, level=own, shape=shape, dtype="f16", rank=rank))
    entries.sort(key=lambda entry: entry.level)
    path = HERE / "temporary"
    bstk.write(path, {}, entries, 3)
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
    "chunk-flip.bstk": lambda: _whole()[:-20] + bytes([_whole()[-20] ^ 4]) + _whole()[-19:],
    **{
        f"bad-{case}.bstk": lambda case=case: bad_files.build(bad_files.OPEN[case][0], _whole())
        for case in (
            "wrong-crc", "major-2", "incompatible-flag-63", "preamble-reserved", "below-smallest", "inside-the-index",
            "appended", "sealed-elsewhere", "index-digest", "offset-hole", "offset-overlap", "stored-wraps-around",
            "raw-bomb", "shape-wraps-around", "kind-unknown", "level-gap", "sign-rank-too-large", "importance-nan",
            "name-overlong-utf8", "name-twice", "file-parent", "metadata-repeated-key", "metadata-nan",
            "git-lfs-pointer", "html",
        )
    },
    **{
        f"bad-{case}.bstk": lambda case=case: bad_files.build(bad_files.CHUNK[case][1], _whole())
        for case in ("frame-without-checksum", "frame-and-a-byte", "frame-larger-than-the-index-says")
    },
}  # fmt: skip


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
