"""A transformers model whose large weights stay packed, as blocks in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import bstk
from bstack.engine.container import build_model, plain_tensor
from bstack.engine.parts import check_depth, parts_of
from bstack.errors import holds_unknown, lacks
from bstack.models.skeleton import parameters_on_meta
from bstack.packed.backends import Backend
from bstack.packed.lock import PriorityLock
from bstack.packed.matrix import Table
from bstack.packed.weight import PackedWeight
from bstk.errors import DamagedError, error_prefix

__all__ = ["pack", "packed_model", "put"]

# A plain matrix of at least this many elements keeps its type; a smaller one is converted.
TABLE = 2**20


def packed_model(
    file: bstk.Reader, folder: Path, dtype: torch.dtype, backend: Backend, trusted: bool = False
) -> tuple[Any, dict[str, Any], PriorityLock]:
    """Build a model without blocks in memory; return it, its matrices by stack name, and their lock."""
    # Eager code uses one expert's weights at a time, which packed weights allow.
    model = build_model(file, folder, trusted, parameters_on_meta(), dtype=dtype, experts_implementation="eager")
    matrices, lock = pack(model, file, dtype, backend)
    model.to(backend.device)  # buffers; everything else is there
    return model.eval().requires_grad_(False), matrices, lock


def pack(model: Any, file: bstk.Reader, dtype: torch.dtype, backend: Backend) -> tuple[dict[str, Any], PriorityLock]:
    """Put a container's tensors into a model with parameters on the meta device, packed ones without blocks in memory.

    Returns the matrices by stack name, and their lock.
    """
    shown = file.source.name
    with error_prefix(shown):
        parameters = parts_of(file.chunks, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    for parts in parameters.values():
        check_depth(parts, shown)
    for chunk in file.chunks:
        if chunk.is_weight and not chunk.is_block:
            tensor = plain_tensor(file.read(chunk), chunk).to(backend.device)
            if tensor.is_floating_point() and tensor.dtype != dtype:
                is_table = tensor.dim() == 2 and tensor.numel() >= TABLE
                table = PackedWeight(Table(tensor), False, dtype, chunk.name, backend.device) if is_table else None
                tensor = tensor.to(dtype) if table is None else table
            put(model, chunk.name, tensor, shown)
    matrices: dict[str, Any] = {}
    lock = PriorityLock()
    for parameter, parts in parameters.items():
        made = []
        for _, blocks in parts:
            rows, columns = blocks[0].shape
            made.append(backend.matrix(rows, columns, [block.kind.code for block in blocks]))
        matrices.update({blocks[0].name: matrix for (_, blocks), matrix in zip(parts, made, strict=True)})
        whole = parts[0][0].index is None
        packed = backend.packed(made, lock) if whole else [backend.packed([matrix], lock) for matrix in made]
        transposed = parts[0][1][0].transposed
        put(model, parameter, PackedWeight(packed, transposed, dtype, parameter, backend.device), shown)
    _tie(model, shown)
    if next(model.parameters(), None) is None:  # transformers reads the type and the device from one
        model.register_parameter("bstack_type", nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))
    return matrices, lock


def _owner(model: nn.Module, name: str, shown: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
        getattr(owner, leaf)
    except AttributeError:
        raise holds_unknown(shown, name) from None
    return owner, leaf


def put(model: nn.Module, name: str, tensor: torch.Tensor, shown: str) -> None:
    """Set a parameter or buffer. A packed one is a plain attribute of its module, since it cannot be moved."""
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


def _is_tied(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing: packed weights are tied already."""


def _tie(model: Any, shown: str) -> None:
    """Tie parameters, once and for all; then none may be missing."""
    model.tie_weights = _is_tied  # transformers' own looks for parameters
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        target_owner, target_leaf = _owner(model, target, shown)
        source_owner, source_leaf = _owner(model, source, shown)
        value = getattr(source_owner, source_leaf)
        if getattr(target_owner, target_leaf).device.type == "meta":
            target_owner._parameters.pop(target_leaf, None)
            target_owner.__dict__[target_leaf] = value
    missing = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if missing:
        raise lacks(shown, missing)
