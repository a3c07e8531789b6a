"""Tokens a second of the native engine, beside transformers and llama.cpp, in turn in one run.

    python benchmarks/engine.py FILE --mb 92 [--prompt 512] [--tokens 64] [--rounds 5] [--parallel 4]
    python benchmarks/engine.py FILE --mb 92 --llama-bench build/bin/llama-bench --gguf model-q4_1.gguf

A prompt of random tokens is read; then a text is written greedily from its first eight, one token at a time. Beside the native engine run transformers
with the file's weights as float32, transformers with packed weights, `--parallel` texts in one step of the native engine, and
llama.cpp's llama-bench if its path and a GGUF file are given. All take turns, `--rounds` times. Where other programs use the
machine only the ratios count, of the fastest rounds and the median of those within each round; with `--threads 1` they are the
steadiest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of torch that wait take no processor from the others

import numpy as np
import torch

import bstack
from bstack.engine.native.load import load
from bstack.kernels.native import instructions, set_threads

Speeds = tuple[float, float]  # tokens a second of the prompt, and of writing


def native(arguments: argparse.Namespace, ids: list[int]) -> Callable[[], Speeds]:
    model, _ = load(arguments.file, mb=arguments.mb)

    def run() -> Speeds:
        started = time.perf_counter()
        model.read(model.sequence(), ids)
        reading, text = time.perf_counter() - started, model.sequence()
        logits = model.read(text, ids[:8])
        started = time.perf_counter()
        for _ in range(arguments.tokens):
            logits = model.step([text], [int(logits.argmax())])[0]
        return len(ids) / reading, arguments.tokens / (time.perf_counter() - started)

    return run


def several(arguments: argparse.Namespace, ids: list[int]) -> Callable[[], Speeds]:
    """Tokens of all texts together; their prompts are read before."""
    model, _ = load(arguments.file, mb=arguments.mb)

    def run() -> Speeds:
        texts = [model.sequence() for _ in range(arguments.parallel)]
        tokens = np.array([model.read(text, ids[: 8 + number]).argmax() for number, text in enumerate(texts)])
        started = time.perf_counter()
        for _ in range(arguments.tokens):
            tokens = model.step(texts, tokens).argmax(1)
        return float("nan"), arguments.parallel * arguments.tokens / (time.perf_counter() - started)

    return run


def transformers(mode: str) -> Callable[[argparse.Namespace, list[int]], Callable[[], Speeds]]:
    def prepare(arguments: argparse.Namespace, ids: list[int]) -> Callable[[], Speeds]:
        model, _ = bstack.load(arguments.file, mb=arguments.mb, mode=mode)

        @torch.inference_mode()
        def run() -> Speeds:
            started = time.perf_counter()
            model(torch.tensor([ids]), logits_to_keep=1)
            reading = time.perf_counter() - started
            out = model(torch.tensor([ids[:8]]), logits_to_keep=1)
            started = time.perf_counter()
            for _ in range(arguments.tokens):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, logits_to_keep=1)
            return len(ids) / reading, arguments.tokens / (time.perf_counter() - started)

        return run

    return prepare


def llama_cpp(arguments: argparse.Namespace, ids: list[int]) -> Callable[[], Speeds]:
    command = [arguments.llama_bench, "-m", arguments.gguf, "-p", str(len(ids)), "-n", str(arguments.tokens), "-r", "1"]
    command += ["-t", str(arguments.threads), "-o", "json"]

    def run() -> Speeds:
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        speeds = {entry["n_prompt"] > 0: entry["avg_ts"] for entry in found}
        return speeds[True], speeds[False]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a .bstk file")
    parser.add_argument("--mb", type=float, help="size of the cut; default: the whole file")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--parallel", type=int, default=4, help="texts in one step")
    parser.add_argument("--only", nargs="+", help="names of the rows to measure beside the first")
    parser.add_argument("--llama-bench", help="llama.cpp's program of that name")
    parser.add_argument("--gguf", help="the same model for llama.cpp")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    rows = {"native": native, "float32": transformers("dense"), "packed": transformers("packed"), "parallel": several}
    if arguments.llama_bench:
        rows["llama.cpp"] = llama_cpp
    rows = {name: row for name, row in rows.items() if name in ("native", *(arguments.only or rows))}
    ids = np.random.default_rng(0).integers(1000, 2000, arguments.prompt).tolist()
    calls = {name: prepare(arguments, ids) for name, prepare in rows.items()}
    for call in calls.values():
        call()
    rounds = [{name: call() for name, call in calls.items()} for _ in range(arguments.rounds)]
    print(
        f"{instructions()}, {arguments.threads} thread(s), {arguments.rounds} rounds, load {os.getloadavg()[0]:.1f}; native relative to each row\n"
    )
    print("| | prompt t/s | native: best, median | write t/s | native: best, median |\n|---|---|---|---|---|")
    for name in calls:
        shown = []
        for kind in (0, 1):
            own, other = ([speeds[row][kind] for speeds in rounds] for row in ("native", name))
            median = statistics.median(a / b for a, b in zip(own, other, strict=True))
            shown += [f"{max(other):.1f}", f"{max(own) / max(other):.2f}, {median:.2f}"]
        print(f"| {name} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
