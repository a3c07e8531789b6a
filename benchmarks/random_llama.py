"""Folders of random Llama models with a small tokenizer, for the benchmarks that compress one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "river",
    "follows",
    "a",
    "small",
    "stone",
    "that",
    "nobody",
    "keeps",
    "and",
    "every",
    "layer",
    "explains",
    "what",
    "it",
    "reads",
]


def write_model(folder: Path, **shape: Any) -> int:
    """Write a model of random bfloat16 weights, one shard a layer, so that this process stays small.

    Parameters
    ----------
    folder : Path
        Made by this function.
    **shape
        Of `transformers.LlamaConfig`: widths, heads, number of layers, whether the embeddings are tied.

    Returns
    -------
    int
        Bytes of the weights.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(bos_token_id=1, eos_token_id=2, **shape)
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

    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    keys = width // config.num_attention_heads * config.num_key_value_heads
    one = torch.ones(width, dtype=torch.bfloat16)
    shard("embedding.safetensors", {"model.embed_tokens.weight": matrix(vocabulary, width), "model.norm.weight": one})
    if not config.tie_word_embeddings:
        shard("head.safetensors", {"lm_head.weight": matrix(vocabulary, width)})
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"{prefix}.{name}.weight": one.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        shard(f"layer-{layer:03d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    _write_tokenizer(folder)
    return size


def write_text(path: Path, words: int) -> None:
    """Write a text of words that the tokenizer knows, the same every time."""
    path.write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(words)))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
