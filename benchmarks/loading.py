"""How fast blocks come into memory, beside reading the file and decoding its frames alone, in one run.

    python benchmarks/loading.py FILE [--seconds 1]

Rates are raw bytes of blocks a second, the fastest of the passes that fit the time, with two threads each: reading the blocks' bytes
from the file (the system has them in memory), decoding their zstd frames, their SHA-256 digests, all of it as `bstk.Reader.read` does it,
and a growth of a model from its smallest size to the whole file. The goal: growth at 60 % of the slower of the first two. Then one
shrink back to the smallest size: its time, and how much of the blocks' bytes left the process' resident memory.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import bstack
import bstk
from bstack.memory.process import resident_bytes
from bstk.frames import unpack

THREADS = 2
PARTS = 64


def rate(call: Callable[[], Any], size: int, seconds: float, undo: Callable[[], Any] = lambda: None) -> float:
    """Bytes a second of the fastest of the calls that fit the time, two at least; `undo` is not timed."""
    best, end, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        best, calls = min(best, time.perf_counter() - started), calls + 1
        undo()
    return size / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--seconds", type=float, default=1.0, help="time a figure")
    arguments = parser.parse_args()

    model, _ = bstack.load(arguments.file, mode="stack")
    with bstk.open(arguments.file) as file, open(arguments.file, "rb") as plain, ThreadPoolExecutor(THREADS) as pool:
        smallest = bstk.mb_ceil(file.base_length)
        blocks = [chunk for chunk in file.chunks[file.base_count :] if chunk.is_block]
        frames = [os.pread(plain.fileno(), chunk.stored_length, chunk.offset) for chunk in blocks]
        size = sum(chunk.raw_length for chunk in blocks)

        def spread(one: Callable[[int], Any]) -> Callable[[], Any]:
            parts = [range(start, len(blocks), PARTS) for start in range(PARTS)]
            return lambda: list(pool.map(lambda part: [one(i) for i in part] and None, parts))

        steps = {
            "read": spread(lambda i: os.pread(plain.fileno(), blocks[i].stored_length, blocks[i].offset)),
            "decode": spread(lambda i: unpack(frames[i], blocks[i].raw_length)),
            "digest": spread(lambda i: sha256(frames[i]).digest()),
            "read, digest and decode": spread(lambda i: file.read(blocks[i])),
        }
        found = {name: rate(step, size, arguments.seconds) for name, step in steps.items()}
    bstack.resize(model, mb=smallest)
    found["growth"] = rate(
        lambda: bstack.resize(model), size, arguments.seconds, lambda: bstack.resize(model, mb=smallest)
    )
    print(f"{len(blocks)} blocks above the base model, {size / 2**20:.1f} MB of them")
    for name, value in found.items():
        print(f"{name:24} {value / 1e6:8,.0f} MB/s")
    resized = bstack.resize(model)
    before, started = resident_bytes(), time.perf_counter()
    bytes_ = resized.block_bytes - bstack.resize(model, mb=smallest).block_bytes
    taken = time.perf_counter() - started
    print(
        f"growth is {found['growth'] / min(found['read'], found['decode']):.0%} of the slower of reading and decoding"
    )
    print(
        f"shrink {taken * 1e3:.1f} ms; {(before - resident_bytes()) / bytes_:.1%} of {bytes_ / 2**20:.1f} MB went back"
    )


if __name__ == "__main__":
    main()
