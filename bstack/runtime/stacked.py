"""A transformers model whose large weights stay packed, as blocks in memory."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bstk
from bstack.errors import UnsupportedModelError, reason
from bstack.kernels.matrix import BLOCKS, RANK, SPQR
from bstack.models.skeleton import parameters_on_meta
from bstack.models.slices import MatrixName
from bstack.runtime.container import generation_config, parse_name, part_of, plain_tensor, read_config
from bstack.runtime.gate import Gate
from bstack.runtime.packed import Table
from bstack.runtime.places import Place
from bstack.runtime.weight import PackedWeight
from bstk.errors import DamagedError

__all__ = ["stacked_model"]

# A plain matrix of so many elements is a table that was meant to stay in its type; a smaller one is converted.
TABLE = 2**20


def stacked_model(file: bstk.Reader, folder: Path, dtype: torch.dtype, place: Place) -> tuple[Any, dict[str, Any], Gate]:
    """A model without any block in memory yet, and what a `Residence` needs to bring them.

    Parameters
    ----------
    file : bstk.Reader
    folder : Path
        The model's files.
    dtype : torch.dtype
        Of activations and of small plain parameters.
    place : Place
        Where blocks live and products run.

    Returns
    -------
    model : transformers.PreTrainedModel
    matrices : dict
        Stack name -> its matrix, made by `place`.
    gate : Gate
        Of all of them.

    Raises
    ------
    bstack.errors.UnsupportedModelError, bstk.DamagedError
    """
    shown = file.source.name
    model = _empty_model(folder, dtype, shown)
    stacks: dict[str, list[bstk.Chunk]] = defaultdict(list)
    for chunk in file.chunks:
        if chunk.is_block:
            stacks[chunk.name].append(chunk)
        elif chunk.is_weight:
            _put(model, chunk.name, _plain(plain_tensor(file.read(chunk), chunk), dtype, place.device, chunk.name), shown)
    by_parameter: dict[str, list[tuple[MatrixName, bstk.Chunk]]] = defaultdict(list)
    for name, blocks in stacks.items():
        rank = max((block.rank for block in blocks if block.kind.code != SPQR), default=0)
        if len(blocks) > BLOCKS or rank > RANK:
            raise UnsupportedModelError(
                f"{shown}: {name} has {len(blocks)} blocks of rank up to {rank}; packed ones run up to {BLOCKS} blocks and "
                f"rank {RANK}. bstack.load(..., mode='dense') takes any."
            )
        matrix = parse_name(name)
        by_parameter[matrix.parameter].append((matrix, blocks[0]))
    matrices: dict[str, Any] = {}
    gate = Gate()
    for parameter, parts in by_parameter.items():
        _put(model, parameter, _packed_weight(model, parameter, parts, matrices, place, gate, dtype, shown), shown)
    _tie(model, shown)
    generation = generation_config(folder)
    if generation is not None:
        model.generation_config = generation
    model.to(place.device)  # buffers; everything else is there
    return model.eval().requires_grad_(False), matrices, gate


def _empty_model(folder: Path, dtype: torch.dtype, shown: str) -> Any:
    from transformers import AutoModelForCausalLM

    config = read_config(folder, shown)
    try:
        with parameters_on_meta():
            # Eager experts use one expert's weights at a time, which is what packed ones can offer.
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False, experts_implementation="eager"
            )
    except Exception as error:  # whatever a constructor does with sizes that make no sense
        raise UnsupportedModelError(
            f"{shown}: this transformers cannot build its model ({config.model_type}): {reason(error)}"
        ) from None


def _plain(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, name: str) -> torch.Tensor:
    tensor = tensor.to(device)
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    if tensor.dim() == 2 and tensor.numel() >= TABLE:
        return PackedWeight(Table(tensor), False, dtype, name, device)
    return tensor.to(dtype)


def _packed_weight(
    model: nn.Module, parameter: str, parts: list[tuple[MatrixName, bstk.Chunk]],
    matrices: dict[str, Any], place: Place, gate: Gate, dtype: torch.dtype, shown: str,
) -> PackedWeight:  # fmt: skip
    """The stand-in of one parameter; enters its matrices in `matrices`."""
    owner, leaf = _owner(model, parameter, shown)
    expected = getattr(owner, leaf)
    for matrix, block in parts:
        part_of(matrix, expected, block)
    if sum(block.shape[0] * block.shape[1] for _, block in parts) != expected.numel():
        raise DamagedError(f"{shown}: the stacks of {parameter} do not fill its {expected.numel()} weights.")
    parts = sorted(parts, key=lambda part: (part[0].index or 0, part[0].rows or (0, 0)))
    made = [place.matrix(*block.shape) for _, block in parts]
    matrices.update({block.name: matrix for (_, block), matrix in zip(parts, made, strict=True)})
    whole = parts[0][0].index is None
    packed = place.packed(made, gate) if whole else [place.packed([matrix], gate) for matrix in made]
    return PackedWeight(packed, parts[0][1].transposed, dtype, parameter, place.device)


def _owner(model: nn.Module, name: str, shown: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
        getattr(owner, leaf)
    except AttributeError:
        raise UnsupportedModelError(f"{shown} holds {name}, which this transformers' model does not have.") from None
    return owner, leaf


def _put(model: nn.Module, name: str, tensor: torch.Tensor, shown: str) -> None:
    """Set a parameter or buffer. A stand-in is a plain attribute of its module: it is no parameter that could be moved."""
    owner, leaf = _owner(model, name, shown)
    expected = getattr(owner, leaf)
    if tuple(expected.shape) != tuple(tensor.shape):
        raise DamagedError(
            f"{shown}: {name} is {' x '.join(map(str, tensor.shape))}, but its model needs "
            f"{' x '.join(map(str, expected.shape))}."
        )
    if isinstance(tensor, PackedWeight):
        owner._parameters.pop(leaf, None)
        owner.__dict__[leaf] = tensor
    elif leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _tie(model: Any, shown: str) -> None:
    """Give tied parameters what they are tied to; then none may be missing."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        target_owner, target_leaf = _owner(model, target, shown)
        source_owner, source_leaf = _owner(model, source, shown)
        value = getattr(source_owner, source_leaf)
        if getattr(target_owner, target_leaf).device.type == "meta":
            target_owner._parameters.pop(target_leaf, None)
            target_owner.__dict__[target_leaf] = value
    missing = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if missing:
        raise UnsupportedModelError(f"{shown} lacks {missing[0]} ({len(missing)} parameters), which its model needs.")
