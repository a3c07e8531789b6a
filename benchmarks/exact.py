"""Time coding and restoring a bfloat16 matrix by its exact chunk, as processor time of one thread: `python benchmarks/exact.py`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["BSTACK_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import exact_samples
import numpy as np

import bstk
from bstack.kernels import exact
from bstack.kernels.matrix import TRELLIS5, Matrix
from bstack.kernels.selftest import random_payload
from bstk.frames import unpack


def main() -> None:
    rng = np.random.default_rng(0)
    print("rows x columns, blocks   predict  restore  decode zstd  encode   million weights a second and core")
    for rows, columns, blocks in ((1536, 576, 4), (576, 1536, 4), (4096, 4096, 4), (4096, 14336, 3)):
        payloads = [(TRELLIS5, 2, random_payload(rng, rows, columns, TRELLIS5, 2)) for _ in range(blocks)]
        stack = Matrix.of(rows, columns, payloads)
        bits = exact_samples.original(exact.predict(stack), "bf16", 1, spread=0.01)
        encoded, parts = _speed(lambda: exact.encode(stack, bits, "bf16"), bits.size, 1)
        raw, frame = b"".join(parts), bstk.pack_parts(parts)
        predicted, _ = _speed(lambda: exact.predict(stack), bits.size)
        restored, _ = _speed(lambda: exact.restore(stack, raw, "bf16"), bits.size)
        unpacked, _ = _speed(lambda: unpack(frame.stored, len(raw)), bits.size)
        speeds = f"{predicted:8.0f} {restored:8.0f} {unpacked:12.0f} {encoded:7.1f}"
        print(f"{rows:5} x {columns:5}, {blocks:2}          {speeds}")


def _speed(function: Callable[[], Any], weights: int, repeats: int = 5) -> tuple[float, Any]:
    """Return the best of some runs, in million weights a second, and what the function gives."""
    times, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return weights / min(times) / 1e6, result


if __name__ == "__main__":
    main()
