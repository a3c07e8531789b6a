"""Weights a second of the encoder's search on a GPU, and of a whole matrix with all that belongs to it.

    python benchmarks/gpu_search.py [--device cuda] [--rows 4096] [--columns 1024] [--planes 4] [--seconds 5]

The search alone takes groups of 64 columns of random targets: with the rows of one matrix, and with 64 times as many, which fill a GPU.
Then the trellis codec encodes a matrix of that shape; factors, products and refits are in its time. Figures are of the fastest of
some runs. `--device cpu` times the C kernels for comparison.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

from bstack.codecs.trellis import TrellisCodec
from bstack.compression.device import Device
from bstack.errors import BstkError
from bstack.kernels.encode import encode_columns
from bstack.kernels.feedback import GROUP
from bstack.kernels.reference import TABLE5


def fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the seconds of the fastest run, at least two of them."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--planes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    try:
        device = torch.device("cpu") if arguments.device == "cpu" else Device(arguments.device).device
    except BstkError as error:
        print(f"Nothing is measured: {error}", file=sys.stderr)
        return error.exit_code
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    for rows in (arguments.rows, 64 * arguments.rows):
        target = torch.randn(GROUP, rows).to(device)
        feedback = (0.1 * torch.randn(GROUP, GROUP)).to(device)
        given = (
            target,
            target,
            feedback,
            target.new_tensor(TABLE5),
            target.new_full((rows,), 0.023),
            target.new_ones(rows),
        )
        taken = fastest(lambda given=given: encode_columns(given[0].clone(), *given[1:]), device, arguments.seconds)
        print(f"{name}: search, {rows} rows: {target.numel() / taken / 1e9:.3f} G weights/s")
    inputs = torch.randn(4 * arguments.columns, arguments.columns).to(device)
    weight = torch.randn(arguments.rows, arguments.columns).to(device)
    task = weight, inputs.t() @ inputs, len(inputs), weight.new_ones(arguments.rows)
    codec = TrellisCodec(arguments.planes)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = fastest(lambda: list(codec.encode(*task)), device, arguments.seconds)
    print(
        f"{name}: {arguments.rows} x {arguments.columns}, {arguments.planes} blocks: {taken:.2f} s, "
        f"{weight.numel() * arguments.planes / taken / 1e9:.3f} G weights/s"
    )
    if device.type == "cuda":
        print(f"{name}: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of its memory at the peak")
    return 0


if __name__ == "__main__":
    sys.exit(main())
