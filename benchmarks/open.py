"""How long opening a file with a large index takes, and how much memory: python benchmarks/open.py [CHUNKS]

The header alone is made, as of a model with 4 blocks a linear; chunks are never read, so the file is a hole after it.
"""

from __future__ import annotations

import hashlib
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bstk
from bstk import writer

BLOCKS = 4
SHAPE = (4096, 4096)


def make(path: Path, chunks: int) -> None:
    """Write a file whose header is good and whose chunks are zeros that take no room on the disk."""
    rows, columns = SHAPE
    raw = rows * columns // 8 + 2 * (rows + columns)
    linears = -(-chunks // BLOCKS)
    entries = [
        bstk.Entry(
            name=f"model.layers.{linear // 7}.linear_{linear % 7}.weight",
            kind=bstk.SIGN,
            level=level,
            shape=SHAPE,
            dtype="f16",
            rank=1,
            raw_length=raw,
            stored_length=raw - linear % 1000,
            importance=1 / (1 + level),
            error=0.5**level,
            digest=hashlib.sha256(struct.pack("<II", level, linear)).digest(),
            stored=b"",
        )
        for level in range(BLOCKS)
        for linear in range(linears)
    ][:chunks]
    head, tables = writer.build_header({"model": {}}, entries, linears)
    with open(path, "wb") as stream:
        stream.write(head.to_bytes() + tables)
        stream.truncate(head.full_length)


def measure(path: str) -> None:
    """Open the file in this process, three times for the clock, and print what it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, processor = [], []
    for _ in range(3):
        start, start_processor = time.perf_counter(), time.process_time()
        with bstk.open(path) as reader:
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - start_processor)
            count = len(reader.all_chunks)
        if len(seconds) == 1:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        del reader
    print(
        f"{count:,} chunks: {min(seconds):.2f} s, {min(processor):.2f} s of it on the processor; peak {peak / 1024:.0f} MB of the "
        f"process, {(peak - before) / 1024:.0f} MB of it for the file"
    )


def main() -> None:
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]), int(sys.argv[3]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "large.bstk")
        # In a process of its own: making the file takes more memory than opening it.
        subprocess.run(
            [sys.executable, __file__, "--make", path, sys.argv[1] if len(sys.argv) > 1 else "300000"], check=True
        )
        measure(path)


if __name__ == "__main__":
    main()
