"""Time of one block of a large matrix, trellis5 and sign codec.

    python benchmarks/encode.py [--rows 4096] [--columns 14336]

Prints seconds per block and, for scale, the time of one product of the matrix with its Hessian in the same run.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from bstack.codecs import SignCodec, TrellisCodec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--planes", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    m, n = arguments.rows, arguments.columns
    x = torch.randn(4096, n) * torch.rand(n)
    hessian, weight = x.t() @ x, torch.randn(m, n)
    started = time.monotonic()
    weight @ hessian
    print(f"{m} x {n}, {torch.get_num_threads()} threads; one product W H: {time.monotonic() - started:.1f} s")
    for codec in (TrellisCodec(arguments.planes), SignCodec(arguments.planes)):
        started = time.monotonic()
        for level, _ in enumerate(codec.encode(weight, hessian, 4096, torch.ones(m))):
            print(
                f"{codec.name}, block {level}: {time.monotonic() - started:.1f} s (with what precedes it)", flush=True
            )
            started = time.monotonic()


if __name__ == "__main__":
    main()
