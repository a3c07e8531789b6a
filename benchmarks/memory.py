"""Peak memory of `bstack compress` for a model of N layers and for one of 2 N: it must not grow with the layers.

    python benchmarks/memory.py --layers 8

Two Llama-shaped folders of random bfloat16 weights with a small tokenizer are written to a temporary folder and
compressed with a text, by the command, in a process of its own each. Printed are the peaks as the system counted them
(ru_maxrss of the child), the peak of a process that only imports what compressing imports, and the ratio. The goal is
a ratio below 1.10. Figures are in docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

GOAL = 1.10
WORDS = "the river follows a small stone that nobody keeps and every layer explains what it reads".split()
IMPORTS = "import bstack.pipeline.run, transformers.models.llama.modeling_llama"


def write_model(folder: Path, layers: int, width: int, vocabulary: int) -> int:
    """Write a model shard by shard, so that this process stays small; return the bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    heads, inner = width // 64, width * 8 // 3 // 64 * 64
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    index: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    one = torch.ones(width, dtype=torch.bfloat16)
    size = shard("outer.safetensors", {"model.embed_tokens.weight": matrix(vocabulary, width), "model.norm.weight": one})
    shapes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width // 4, width),
              "self_attn.v_proj": (width // 4, width), "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width),
              "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}  # fmt: skip
    for layer in range(layers):
        tensors = {f"model.layers.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"model.layers.{layer}.{name}.weight": one.clone() for name in norms}
        size += shard(f"layer-{layer:03d}.safetensors", tensors)
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
            size = write_model(folder / "model", layers, arguments.width, arguments.vocabulary)
            (folder / "text.txt").write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(2**16)))
            command = [
                sys.executable, "-m", "bstack", "compress", str(folder / "model"), "-o", str(folder / "out.bstk"), "-q",
                "--calibration", str(folder / "text.txt"), "--samples", str(arguments.samples),
                "--sequence-length", str(arguments.sequence_length), *arguments.options,
            ]  # fmt: skip
            peaks.append(peak_of(command))
        print(f"{layers:4d} layers, {size / 2**20:6.0f} MB of bfloat16 weights: peak {peaks[-1] / 2**20:.0f} MB")
    ratio = peaks[1] / peaks[0]
    print(f"ratio {ratio:.3f}; without the imports {(peaks[1] - constant) / (peaks[0] - constant):.3f}; goal < {GOAL}")
    sys.exit(ratio >= GOAL)


if __name__ == "__main__":
    main()
