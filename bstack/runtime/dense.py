"""A transformers model with dense weights, rebuilt from the blocks that a budget admits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import bstk
from bstack.codecs import codec_of_kind
from bstack.errors import UnsupportedModelError, reason
from bstack.models.skeleton import quiet_transformers
from bstack.models.slices import MatrixName
from bstack.runtime.container import generation_config, parse_name, part_of, plain_tensor, read_config
from bstk.errors import DamagedError

__all__ = ["dense_model", "dense_weights", "empty_model"]


def dense_model(
    file: bstk.Reader, chunks: tuple[bstk.Chunk, ...], folder: Path, dtype: torch.dtype
) -> Any:
    """The model of some of a file's chunks.

    Parameters
    ----------
    file : bstk.Reader
    chunks : tuple of bstk.Chunk
        A prefix of the file's chunks.
    folder : Path
        The model's files.
    dtype : torch.dtype
        Of what is floating.

    Raises
    ------
    bstack.errors.UnsupportedModelError, bstk.DamagedError
    """
    shown = file.source.name
    model = empty_model(folder, shown)
    return _fill(model, dict(dense_weights(file, chunks, model, dtype)), dtype, shown)


def dense_weights(
    file: bstk.Reader, chunks: tuple[bstk.Chunk, ...], model: torch.nn.Module, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Rebuild the parameters of a model from some of a file's chunks.

    Parameters
    ----------
    file : bstk.Reader
    chunks : tuple of bstk.Chunk
        A prefix of the file's chunks.
    model : torch.nn.Module
        Gives the full shapes; may be on the meta device.
    dtype : torch.dtype
        Of what was floating.

    Yields
    ------
    name : str
        State-dict name.
    tensor : torch.Tensor
    """
    stacks: dict[str, list[bstk.Chunk]] = {}
    for chunk in chunks:
        if chunk.is_block:
            stacks.setdefault(chunk.name, []).append(chunk)
        elif chunk.is_weight:
            tensor = plain_tensor(file.read(chunk), chunk)
            yield chunk.name, tensor.to(dtype) if tensor.is_floating_point() else tensor
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    parts: dict[str, list[tuple[MatrixName, list[bstk.Chunk]]]] = {}
    for name, blocks in stacks.items():
        matrix = parse_name(name)
        parts.setdefault(matrix.parameter, []).append((matrix, blocks))
    for parameter, matrices in parts.items():
        if parameter not in shapes:
            raise UnsupportedModelError(f"The file holds {parameter}, which this transformers' model does not have.")
        tensor = torch.empty(shapes[parameter], dtype=dtype)
        filled = 0
        for matrix, blocks in matrices:
            view = part_of(matrix, tensor, blocks[0])
            codec = codec_of_kind(blocks[0].kind)
            payloads = [file.read(block) for block in blocks]
            view.copy_(codec.rebuild(payloads, [b.kind for b in blocks], [b.rank for b in blocks], blocks[0].shape))
            filled += view.numel()
        if filled != tensor.numel():
            raise DamagedError(f"The stacks of {parameter} have {filled} weights, but it needs {tensor.numel()}.")
        yield parameter, tensor


def empty_model(folder: Path, shown: str) -> Any:
    """The model of a folder's configuration, on the meta device.

    Parameters
    ----------
    folder : Path
        With the model's files.
    shown : str
        What messages call the container.

    Raises
    ------
    bstack.errors.UnsupportedModelError
    """
    from transformers import AutoModelForCausalLM

    config = read_config(folder, shown)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(
            f"{shown}: this transformers cannot build its model ({config.model_type}): "
            f"{reason(error)}"
        ) from None
    generation = generation_config(folder)
    if generation is not None:
        model.generation_config = generation
    return model


def _fill(model: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype, shown: str) -> Any:
    # from_pretrained also computes the buffers that no checkpoint holds and ties what is tied.
    cls, config, generation = type(model), model.config, model.generation_config
    with quiet_transformers():
        filled, info = cls.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UnsupportedModelError(f"{shown} lacks {missing[0]} ({len(missing)} parameters), which its model needs.")
    filled.generation_config = generation
    return filled.eval()
