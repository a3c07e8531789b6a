"""Rebuild a transformers model with dense weights from some of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import bstk
from bstack.codecs import codec_of_kind
from bstack.engine.container import build_model, part_of, parts_of, plain_tensor, understood
from bstack.errors import UnsupportedModelError
from bstack.models.skeleton import quiet_transformers
from bstk.errors import error_prefix

__all__ = ["dense_model", "dense_weights"]


def dense_model(
    file: bstk.Reader, chunks: tuple[bstk.Chunk, ...], folder: Path, dtype: torch.dtype, trusted: bool = False
) -> Any:
    """Build the model of the given chunks, a prefix of the file's."""
    shown = file.source.name
    model = build_model(file, folder, trusted, torch.device("meta"))
    return _fill(model, dict(dense_weights(file, chunks, model, dtype)), dtype, shown)


def dense_weights(
    file: bstk.Reader, chunks: tuple[bstk.Chunk, ...], model: torch.nn.Module, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and tensor of each parameter, rebuilt from the given chunks; `model` gives the full shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Before memory is allocated: the shapes come from a configuration.
    with error_prefix(file.source.name):
        parts = parts_of(chunks, shapes)
    for chunk in chunks:
        if chunk.is_weight and not chunk.is_block:
            tensor = plain_tensor(file.read(chunk), chunk)
            yield chunk.name, tensor.to(dtype) if tensor.is_floating_point() else tensor
    for parameter, matrices in parts.items():
        tensor = torch.empty(shapes[parameter], dtype=dtype)
        for matrix, blocks in matrices:
            view = part_of(matrix, tensor, blocks[0])
            codec = codec_of_kind(blocks[0].kind)
            payloads = [file.read(block) for block in blocks]
            view.copy_(codec.rebuild(payloads, [b.kind for b in blocks], [b.rank for b in blocks], blocks[0].shape))
        yield parameter, tensor


def _fill(model: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype, shown: str) -> Any:
    # from_pretrained also computes buffers that no checkpoint holds, and ties parameters.
    cls, config, generation = type(model), model.config, model.generation_config
    with quiet_transformers(), understood(shown, "its weights do not fit the model of its configuration"):
        filled, info = cls.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UnsupportedModelError(f"{shown} lacks {missing[0]} ({len(missing)} parameters), which its model needs.")
    filled.generation_config = generation
    return filled.eval()
