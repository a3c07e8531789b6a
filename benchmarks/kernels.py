"""Packed bytes a second of the kernels, beside what the memory gives, in one run.

    python benchmarks/kernels.py [--megabytes 256] [--seconds 0.3] [--instructions avx512 avx2]

A roofline: each line is one kernel reading matrices that together are larger than the caches, as a fraction of a plain
read of a buffer as large, by as many threads. Then SpQR beside that read and torch's product with a dense matrix, all products
of a token of SmolLM2-135M, and the decoding of rows.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import torch

from bstack.kernels.matrix import OUTLIERS, PLAIN, ROTATED, SIGN, SPQR, TRELLIS, TRELLIS5, Matrix, block_bytes
from bstack.kernels.multiply import decode_rows, multiply_many
from bstack.kernels.native import CHOICES, instructions, library, set_threads
from bstack.kernels.selftest import random_payload
from bstack.kernels.spqr import rank_of

MB = 2**20


def rate(call, size: int, seconds: float) -> float:
    """Bytes a second of the fastest of the calls that fit the time, two at least; the first is not counted."""
    call()
    best, end, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        best, calls = min(best, time.perf_counter() - started), calls + 1
    return size / best


def read_rate(buffer: np.ndarray, threads: int, seconds: float) -> float:
    """Of a plain read: numpy's sum of 64-bit words, an equal part of the buffer to each thread."""
    parts = np.array_split(buffer.view(np.uint64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return rate(lambda: list(pool.map(np.sum, parts)), buffer.nbytes, seconds)


def copies(rows: int, columns: int, kind: int, rank: int, size: int) -> list[Matrix]:
    """Matrices of one block each, of `size` bytes in all."""
    payload = random_payload(np.random.default_rng(0), rows, columns, kind, rank)
    return [Matrix.of(rows, columns, [(kind, rank, payload)]) for _ in range(max(2, size // len(payload)))]


def roofline(arguments: argparse.Namespace, threads: list[int]) -> None:
    size = arguments.megabytes * MB
    buffer = np.ones(size, np.uint8)
    memory = {count: read_rate(buffer, count, arguments.seconds) for count in threads}
    del buffer
    for count, found in memory.items():
        print(f"plain read, {count} thread(s): {found / 1e9:.1f} GB/s")
    print("\n| kernel | matrix | tokens | " + " | ".join(f"{n} thread(s), GB/s | of the read" for n in threads) + " |")
    print("|---|---|---|" + "---|---|" * len(threads))
    shapes = [(4096, 4096, 1), (4096, 4096, 4), (4096, 4096, 8), (4096, 14336, 1), (576, 576, 1), (576, 1536, 1)]
    # Those of the old kind alternate with those that files have now, as a measure of both.
    cases = [(kind, 2, *shape) for shape in shapes for kind in (TRELLIS, TRELLIS5)]
    cases += [(SIGN, 1, 576, 576, 1)]
    cases += [(SIGN, rank, 4096, 4096, 1) for rank in (1, 2, 4, 8, 16)]
    for kind, rank, rows, columns, tokens in cases:
        matrices = copies(rows, columns, kind, rank, size)
        x = np.random.default_rng(1).standard_normal((tokens, columns)).astype(np.float32)
        bytes_ = len(matrices) * block_bytes(rows, columns, kind, rank)
        for name in arguments.instructions:
            library().bstack_use(name.encode())
            shown = []
            for count in threads:
                set_threads(count)
                found = rate(lambda: multiply_many(matrices, x), bytes_, arguments.seconds)
                shown.append(f"{found / 1e9:.1f} | {found / memory[count]:.0%}")
            label = {TRELLIS: "trellis", TRELLIS5: "trellis5"}.get(kind, f"sign, rank {rank}")
            print(f"| {label}, {name} | {rows} x {columns} | {tokens} | " + " | ".join(shown) + " |", flush=True)


def spqr_blocks(rows: int, columns: int, bits: int, fraction: float) -> list[tuple[int, int, bytes]]:
    """The dense part of a matrix, in groups of 16, and its outliers."""
    rng, rank = np.random.default_rng(0), rank_of(bits, 16)
    dense = SPQR, rank, random_payload(rng, rows, columns, SPQR, rank)
    return [dense, (OUTLIERS, 0, random_payload(rng, rows, columns, OUTLIERS, 0, int(fraction * rows * columns)))]


def spqr(arguments: argparse.Namespace, threads: list[int]) -> None:
    """SpQR at batch 1, with 1 % outliers, beside the plain read and the dense product in float32."""
    side, size = 4096, arguments.megabytes * MB
    buffer = np.ones(size, np.uint8)
    weights = [torch.randn(side, side) for _ in range(2)]
    x = torch.randn(side)
    cases = {}
    for bits in (3, 4):
        blocks = spqr_blocks(side, side, bits, 0.01)
        bytes_ = sum(len(payload) for *_, payload in blocks)
        cases[bits] = bytes_, [Matrix.of(side, side, blocks) for _ in range(max(2, size // bytes_))]
    print(f"\nSpQR, {side} x {side}, 1 % outliers, 1 token:\n\n| | threads | ms a product | GB/s | of the read |")
    print("|---|---|---|---|---|")
    for count in threads:
        set_threads(count)
        torch.set_num_threads(count)
        memory = read_rate(buffer, count, arguments.seconds)
        print(f"| plain read | {count} | | {memory / 1e9:.1f} | 100% |")
        found = rate(
            lambda: [torch.mv(weight, x) for weight in weights], 4 * side * side * len(weights), arguments.seconds
        )
        print(
            f"| dense, float32, torch | {count} | {4 * side * side / found * 1e3:.2f} | {found / 1e9:.1f} | {found / memory:.0%} |"
        )
        for bits, (bytes_, matrices) in cases.items():
            for name in arguments.instructions:
                library().bstack_use(name.encode())
                found = rate(
                    lambda: multiply_many(matrices, x[None].numpy()), bytes_ * len(matrices), arguments.seconds
                )
                label = f"{bits} bits ({8 * bytes_ / side**2:.2f} in all), {name}"
                print(
                    f"| {label} | {count} | {bytes_ / found * 1e3:.2f} | {found / 1e9:.1f} | {found / memory:.0%} |",
                    flush=True,
                )


def token(arguments: argparse.Namespace, threads: list[int]) -> None:
    """All products of one token of SmolLM2-135M, trellis5 blocks, 2.4 of them a matrix on average."""
    rng = np.random.default_rng(0)

    def stack(rows: int, columns: int) -> Matrix:
        depth = 2 + int(rng.random() < 0.4)
        return Matrix.of(rows, columns, [(TRELLIS5, 2, random_payload(rng, rows, columns, TRELLIS5, 2))] * depth)

    shapes = [((576, 576), (192, 576), (192, 576)), ((576, 576),), ((1536, 576), (1536, 576)), ((576, 1536),)] * 30
    shapes.append(((16384, 576),) * 3)
    calls = [[stack(*shape) for shape in together] for together in shapes]
    inputs = {n: rng.standard_normal((1, n)).astype(np.float32) for n in (576, 1536)}
    size = sum(block_bytes(m.rows, m.columns, TRELLIS5, 2) * m.count for call in calls for m in call)

    def step() -> None:
        for call in calls:
            multiply_many(call, inputs[call[0].columns])

    print(f"\nA token of SmolLM2-135M, {size / MB:.1f} MB of blocks, {len(calls)} calls from Python:")
    for name in arguments.instructions:
        library().bstack_use(name.encode())
        for count in threads:
            set_threads(count)
            print(f"  {name}, {count} thread(s): {size / rate(step, size, arguments.seconds) * 1e3:.2f} ms", flush=True)


def decoding(arguments: argparse.Namespace, threads: list[int]) -> None:
    """Rows as floats, which long prompts multiply with."""
    print("\nRows of 256 x 4096 decoded:")
    out = np.empty((256, 4096), np.float32)
    cases = {
        "trellis": (copies(256, 4096, TRELLIS, 2, 0)[0], ROTATED),
        "trellis5": (copies(256, 4096, TRELLIS5, 2, 0)[0], ROTATED),
    }
    for bits in (3, 4):
        cases[f"SpQR, {bits} bits"] = Matrix.of(256, 4096, spqr_blocks(256, 4096, bits, 0.01)), PLAIN
    for (label, (matrix, kinds)), name in product(cases.items(), arguments.instructions):
        library().bstack_use(name.encode())
        for count in threads:
            set_threads(count)
            found = rate(lambda: decode_rows(matrix, kinds, 0, 256, out), out.size, arguments.seconds)
            print(f"  {label}, {name}, {count} thread(s): {found / 1e9:.2f} billion weights a second", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="memory that the matrices of a line take")
    parser.add_argument("--seconds", type=float, default=0.3, help="time a figure")
    parser.add_argument(
        "--instructions", nargs="+", choices=CHOICES[1:], help="default: all that this CPU has but portable"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--only", choices=("roofline", "spqr", "token", "decoding"))
    arguments = parser.parse_args()
    if library() is None:
        parser.error("there are no C kernels to measure")
    print(f"best instruction set here: {instructions()}")
    offered = [name for name in reversed(CHOICES[1:]) if library().bstack_offers(name.encode()) == 0]
    arguments.instructions = arguments.instructions or [name for name in offered if name != "portable"]
    for name, measure in (("roofline", roofline), ("spqr", spqr), ("token", token), ("decoding", decoding)):
        if arguments.only in (None, name):
            measure(arguments, arguments.threads)


if __name__ == "__main__":
    main()
