"""The search of the encoder, by the device of its tensors: the C kernels or the reference, or the kernels of a GPU."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import torch

from bstack.kernels import reference
from bstack.kernels.cuda import MARGIN, SEGMENT, Kernels
from bstack.kernels.matrix import pointer
from bstack.kernels.native import library

__all__ = ["encode_columns", "encode_segments", "use_card"]

_cards: dict[torch.device, Kernels] = {}


def use_card(device: torch.device, kernels: Kernels) -> None:
    """Encode what lies on a device with its kernels from now on."""
    _cards[device] = kernels


def encode_columns(
    target: torch.Tensor,
    original: torch.Tensor,
    feedback: torch.Tensor,
    table: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the codes of some columns, each of which makes up for part of the errors of those before it.

    On a GPU columns are cut into segments of rows, as `encode_segments` describes; results differ from the CPU's for more
    than `SEGMENT` rows, and have its bits for fewer.

    Parameters
    ----------
    target, original : torch.Tensor
        What the columns should become, and what errors are measured against; float32, shape (columns, rows), contiguous. On the
        CPU `target` is overwritten.
    feedback : torch.Tensor
        Entry [j, t] is the part of column j's error that is added to the target of column t > j; float32, (columns, columns).
    table : torch.Tensor
        TABLE5, float32.
    scale, weight : torch.Tensor
        Of each row: its scale, positive, and the weight of the squared error in units of the scale; float32, shape (rows,).

    Returns
    -------
    codes : torch.Tensor
        uint8, shape (columns, 4 + rows).
    errors : torch.Tensor
        Float32, shape (columns, rows).
    """
    if target.device.type != "cpu":
        return _cards[target.device].encode_columns(target, original, feedback, table, scale, weight)
    arrays = [array.contiguous().numpy() for array in (original, feedback, table, scale, weight)]
    native = library()
    if native is None:
        _warn_once()
        found = reference.encode_columns(target.numpy(), *arrays)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])
    columns, rows = target.shape
    codes, errors = np.empty((columns, reference.EARLIER5 + rows), np.uint8), np.empty((columns, rows), np.float32)
    original_, *rest = map(pointer, [*arrays, codes, errors])
    if native.bstack_trellis_encode(pointer(target.numpy()), original_, columns, rows, *rest):
        raise MemoryError
    return torch.from_numpy(codes), torch.from_numpy(errors)


def encode_segments(
    target: torch.Tensor,
    original: torch.Tensor,
    feedback: torch.Tensor,
    table: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute on the CPU what `encode_columns` does on a GPU, with the same bits: the oracle of its tests.

    Each `SEGMENT` rows of a column are searched by themselves, with `MARGIN` rows before and behind them, whose codes are dropped.
    The first values of a segment depend on the last codes of the segment above.
    """
    columns, rows = target.shape
    codes = torch.empty(columns, reference.EARLIER5 + rows, dtype=torch.uint8)
    errors = torch.empty(columns, rows)
    inverse, ones = 1 / scale, torch.ones(rows)
    for j in range(columns):
        x = target[j] * inverse
        for start in range(0, rows, SEGMENT):
            stop = min(start + SEGMENT, rows)
            part = slice(max(start - MARGIN, 0), min(stop + MARGIN, rows))
            wanted = x[None, part].contiguous()
            found, _ = encode_columns(wanted.clone(), wanted, torch.zeros(1, 1), table, ones[part], weight[part])
            first = start + reference.EARLIER5 if start else 0
            codes[j, first : stop + reference.EARLIER5] = found[0, first - part.start : stop + reference.EARLIER5 - part.start]
        values = table[torch.from_numpy(reference.places(codes[j].numpy())).long()]
        errors[j] = original[j] - scale * values
        for t in range(j + 1, columns):
            target[t] += feedback[j, t] * errors[j]
    return codes, errors


@cache
def _warn_once() -> None:
    what = "The C kernels are not in use, so the trellis codec encodes some hundred times slower."
    warnings.warn(what, RuntimeWarning, stacklevel=3)
