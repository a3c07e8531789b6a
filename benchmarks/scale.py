"""Compress a model of Llama-3-8B's shapes under a limit on memory, and project to its depth and to 70B.

    python benchmarks/scale.py --layers 2 --limit-gb 6

Writes a folder of random bfloat16 weights with the true widths (4096 and 14336, 128256 words, head and embedding apart)
and as many layers as are asked for, and compresses it in a child process with `--planes 2 --samples 4 --sequence-length 128`
and a text. The child may have no more private writable memory than the limit (RLIMIT_DATA: heap and anonymous mappings, used or
not; maps of the weight files, which the system can drop at any time, do not count). Printed are the seconds on the clock and of
processors, and the peak memory of each stage. With --ranges N the embedding and the head are given up after N of their 126 ranges
of rows, which all take the same time and memory, and the stages after them do not run. Figures are in docs/scale.md. Nothing is kept.
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
from contextlib import contextmanager
from pathlib import Path

WIDTH, INNER, HEADS, KEY_HEADS, VOCABULARY = 4096, 14336, 32, 8, 128256
WORDS = "the river follows a small stone that nobody keeps and every layer explains what it reads".split()


def write_model(folder: Path, layers: int, vocabulary: int) -> int:
    """Write the folder, one shard a layer, so that this process stays small; return the bytes of the weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    size = 0

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal size
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        size += sum(tensor.nbytes for tensor in tensors.values())

    one = torch.ones(WIDTH, dtype=torch.bfloat16)
    shard("embedding.safetensors", {"model.embed_tokens.weight": matrix(vocabulary, WIDTH), "model.norm.weight": one})
    shard("head.safetensors", {"lm_head.weight": matrix(vocabulary, WIDTH)})
    keys = WIDTH // HEADS * KEY_HEADS
    shapes = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (keys, WIDTH), "self_attn.v_proj": (keys, WIDTH),
              "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
              "mlp.down_proj": (WIDTH, INNER)}  # fmt: skip
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"{prefix}.{name}.weight": one.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        shard(f"layer-{layer:03d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    _write_tokenizer(folder)
    return size


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


def compress(folder: Path, limit_gb: float, ranges: int | None) -> None:
    """Compress in this process under the limit; print a line for each step."""
    from bstack.memory.process import peak_bytes
    from bstack.pipeline.entrance import compress as run
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
                f"peak {peak_bytes() / 2**20:6,.0f} MB", flush=True,
            )  # fmt: skip
            last, worked = now, processor
            if stage == "embeddings" and done == ranges:
                raise EnoughError

        yield step

    settings = Settings(calibration=str(folder / "text.txt"), planes=2, samples=4, sequence_length=128)
    try:
        report = run(folder / "model", folder / "out.bstk", settings=settings, progress=progress)
    except EnoughError:
        return
    print(f"whole file: {report.file_bytes / 2**20:,.0f} MB, {report.seconds:.0f} s")


class EnoughError(Exception):
    """Ends the run after as many ranges of rows as were asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--limit-gb", type=float, default=6.0, help="of private writable memory, GiB")
    parser.add_argument("--ranges", type=int, help="stop after this many ranges of rows of the embedding")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        compress(arguments.folder, arguments.limit_gb, arguments.ranges)
        return
    with tempfile.TemporaryDirectory(prefix="bstack-scale-", dir=arguments.folder) as name:
        folder = Path(name)
        size = write_model(folder / "model", arguments.layers, arguments.vocabulary)
        (folder / "text.txt").write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(2**14)))
        print(f"{arguments.layers} layers, {size / 2**30:.2f} GiB of bfloat16 weights; limit {arguments.limit_gb} GiB", flush=True)
        options = ["--limit-gb", str(arguments.limit_gb), "--folder", str(folder)]
        options += ["--ranges", str(arguments.ranges)] if arguments.ranges else []
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        command = [sys.executable, __file__, "--child", *options]
        sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
