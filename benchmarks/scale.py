"""Compress a model of Llama-3-8B's shapes under a limit on memory, and project to its depth and to 70B.

    python benchmarks/scale.py --layers 2 --limit-gb 6

Writes a folder of random bfloat16 weights with the true widths (4096 and 14336, 128256 words, head and embedding untied)
and as many layers as are asked for, and compresses it in a child process with `--planes 4 --samples 4 --sequence-length 128`
and a text. The child may have no more private writable memory than the limit (RLIMIT_DATA: heap and anonymous mappings, used or
not; maps of the weight files, which the system can drop at any time, do not count). Printed are the seconds on the clock and of
processors, and the peak memory of each stage. With --ranges N the embedding and the head are given up after N of their 126 ranges
of rows, which all take the same time and memory, and the stages after them do not run. Figures are in docs/results.md. Nothing is kept,
unless --folder is given: all 32 layers take hours, and the same command goes on there where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from random_llama import write_model, write_text

VOCABULARY = 128256
WIDTHS = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def compress(folder: Path, limit_gb: float, ranges: int | None, planes: int) -> None:
    """Compress in this process under the limit; print a line for each step."""
    from bstack.compression.api import compress as run
    from bstack.memory.process import peak_bytes
    from bstack.settings import Settings

    limit = int(limit_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    @contextmanager
    def progress(stage: str, steps: int) -> Iterator[Callable[[], None]]:
        last, worked, done = time.monotonic(), time.process_time(), 0

        def step() -> None:
            nonlocal last, worked, done
            now, processor, done = time.monotonic(), time.process_time(), done + 1
            print(
                f"{stage:17} {done:3} of {steps:3}  {now - last:7.1f} s, {processor - worked:7.1f} s of processors  "
                f"peak {peak_bytes() / 2**20:6,.0f} MB",
                flush=True,
            )
            last, worked = now, processor
            if stage == "embeddings" and done == ranges:
                raise EnoughError

        yield step

    settings = Settings(calibration=str(folder / "text.txt"), planes=planes, samples=4, sequence_length=128)
    try:
        report = run(folder / "model", folder / "out.bstk", settings=settings, progress=progress)
    except EnoughError:
        return
    print(f"whole file: {report.file_bytes / 2**20:,.0f} MB, {report.seconds:.0f} s")


def prepare(folder: Path, layers: int, vocabulary: int) -> int:
    """Write model and text, unless they are there; return the bytes of the weights."""
    model, text = folder / "model", folder / "text.txt"
    shape = WIDTHS | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    if text.exists():  # which is written last
        found = json.loads((model / "config.json").read_text())
        if any(found[key] != value for key, value in shape.items()):
            sys.exit(f"{folder} holds a model of other --layers or --vocabulary. Name another folder.")
        return sum(path.stat().st_size for path in model.glob("*.safetensors"))
    size = write_model(model, **shape, tie_word_embeddings=False)
    write_text(text, 2**14)
    return size


class EnoughError(Exception):
    """Ends the run after as many ranges of rows as were asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--limit-gb", type=float, default=6.0, help="of private writable memory, GiB")
    parser.add_argument("--planes", type=int, default=4)
    parser.add_argument("--ranges", type=int, help="stop after this many ranges of rows of the embedding")
    parser.add_argument(
        "--folder", type=Path, help="where to write model and file, and keep them; a temporary folder by default"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        compress(arguments.folder, arguments.limit_gb, arguments.ranges, arguments.planes)
        return
    with (
        nullcontext(arguments.folder)
        if arguments.folder
        else tempfile.TemporaryDirectory(prefix="bstack-scale-") as name
    ):
        size = prepare(Path(name), arguments.layers, arguments.vocabulary)
        print(
            f"{arguments.layers} layers, {size / 2**30:.2f} GiB of bfloat16 weights; limit {arguments.limit_gb} GiB",
            flush=True,
        )
        if (Path(name) / "out.bstk.work").exists():
            print("goes on where it was stopped: times and peaks are of what is left", flush=True)
        options = ["--limit-gb", str(arguments.limit_gb), "--folder", str(name), "--planes", str(arguments.planes)]
        options += ["--ranges", str(arguments.ranges)] if arguments.ranges else []
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        command = [sys.executable, __file__, "--child", *options]
        sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
