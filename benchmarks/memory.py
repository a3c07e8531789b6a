"""Peak memory of `bstack compress` for a model of N layers and for one of 2 N: it must not grow with the layers.

    python benchmarks/memory.py --layers 8

Two Llama-shaped folders of random bfloat16 weights with a small tokenizer are written to a temporary folder and
compressed with a text, by the command, in a process of its own each. Printed are the peaks as the system counted them
(ru_maxrss of the child), the peak of a process that only imports what compressing imports, and the ratio. The goal is
a ratio below 1.10. Figures are in docs/results.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from random_llama import write_model, write_text

GOAL = 1.10
IMPORTS = "import bstack.compression.stages, transformers.models.llama.modeling_llama"


def peak_of(command: list[str]) -> int:
    """Run a command and return its peak memory in bytes; its output goes to stderr."""
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="N; the other model has 2 N")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("options", nargs="*", help="further options of bstack compress, after --")
    arguments = parser.parse_args()

    constant = peak_of([sys.executable, "-c", IMPORTS])
    print(f"imports alone: {constant / 2**20:.0f} MB")
    peaks = []
    for layers in (arguments.layers, 2 * arguments.layers):
        with tempfile.TemporaryDirectory(prefix="bstack-memory-") as name:
            folder = Path(name)
            heads = arguments.width // 64
            size = write_model(
                folder / "model",
                num_hidden_layers=layers,
                vocab_size=arguments.vocabulary,
                hidden_size=arguments.width,
                intermediate_size=arguments.width * 8 // 3 // 64 * 64,
                num_attention_heads=heads,
                num_key_value_heads=heads // 4,
                tie_word_embeddings=True,
            )
            write_text(folder / "text.txt", 2**16)
            command = [
                sys.executable,
                "-m",
                "bstack",
                "compress",
                str(folder / "model"),
                "-o",
                str(folder / "out.bstk"),
                "-q",
                "--calibration",
                str(folder / "text.txt"),
                "--samples",
                str(arguments.samples),
                "--sequence-length",
                str(arguments.sequence_length),
                *arguments.options,
            ]
            peaks.append(peak_of(command))
        print(f"{layers:4d} layers, {size / 2**20:6.0f} MB of bfloat16 weights: peak {peaks[-1] / 2**20:.0f} MB")
    ratio = peaks[1] / peaks[0]
    print(f"ratio {ratio:.3f}; without the imports {(peaks[1] - constant) / (peaks[0] - constant):.3f}; goal < {GOAL}")
    sys.exit(ratio >= GOAL)


if __name__ == "__main__":
    main()
