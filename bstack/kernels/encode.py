"""The search of the encoder, by the device of its tensors: the C kernels or the reference, or the kernels of a GPU."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import torch

from bstack.kernels import reference
from bstack.kernels.cuda import Kernels
from bstack.kernels.matrix import pointer
from bstack.kernels.native import library

__all__ = ["encode_columns", "use_device"]

_devices: dict[torch.device, Kernels] = {}


def use_device(device: torch.device, kernels: Kernels) -> None:
    """Encode what lies on a device with its kernels from now on."""
    _devices[device] = kernels


def encode_columns(
    target: torch.Tensor,
    original: torch.Tensor,
    feedback: torch.Tensor,
    table: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    turn: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the codes of some columns, each of which makes up for part of the errors of those before it.

    On a GPU columns are searched in segments of rows (csrc/encode.c, bstack/kernels/cuda/encode.cu): up to one segment the results
    are those of the CPU, bit for bit; of more rows they cost a little more.

    Parameters
    ----------
    target, original : torch.Tensor
        What the columns should become, and what errors are measured against; float32, shape (columns, rows), contiguous.
        `target` gets the feedback of the columns before each.
    feedback : torch.Tensor
        Entry [j, t] is the part of column j's error that is added to the target of column t > j; float32, (columns, columns).
    table : torch.Tensor
        TABLE5, float32.
    scale, weight : torch.Tensor
        Of each row: its scale, positive, and the weight of the squared error in units of the scale; float32, shape (rows,).
    turn : int
        The number of the block: on a GPU segments meet elsewhere in each, since what a meeting costs would add up in its rows.

    Returns
    -------
    codes : torch.Tensor
        uint8, shape (columns, 4 + rows).
    errors : torch.Tensor
        Float32, shape (columns, rows).
    """
    if target.device.type != "cpu":
        return _devices[target.device].encode_columns(target, original, feedback, table, scale, weight, turn=turn)
    arrays = [array.contiguous().numpy() for array in (target, original, feedback, table, scale, weight)]
    native = library()
    if native is None:
        _warn_once()
        codes, errors = reference.encode_columns(*arrays)
        return torch.from_numpy(codes), torch.from_numpy(errors)
    columns, rows = target.shape
    codes, errors = np.empty((columns, reference.EARLIER5 + rows), np.uint8), np.empty((columns, rows), np.float32)
    target_, original_, *rest = map(pointer, [*arrays, codes, errors])
    if native.bstack_trellis_encode(target_, original_, columns, rows, *rest):
        raise MemoryError
    return torch.from_numpy(codes), torch.from_numpy(errors)


@cache
def _warn_once() -> None:
    what = "The C kernels are not in use, so the trellis codec encodes some hundred times slower."
    warnings.warn(what, RuntimeWarning, stacklevel=3)
