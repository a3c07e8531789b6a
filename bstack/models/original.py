"""The original's files of weights as bytes: where each tensor is in them, and of which parameter it is a part."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

import bstk
from bstack.models.weight_files import INDEX
from bstk.index import check_name

__all__ = [
    "PARTS",
    "OriginalFile",
    "StoredTensor",
    "View",
    "all_of",
    "check_original_name",
    "elements",
    "file_head",
    "views",
]

# Folder of the names of original chunks that are bytes of a file.
PARTS = ".parts/"

# Of a parameter whose elements are numbered, in int32.
MOST_ELEMENTS = 2**31 - 1
# Dimensions of a tensor in a file of weights.
_MAX_NDIM = 8
DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}  # of safetensors -> of the container


class View(NamedTuple):
    """Elements of an array: those at offset + the sum of index * stride."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class StoredTensor(NamedTuple):
    """A tensor in a file of weights.

    `dtype` is the container's name of its type, empty for types that hold no exact chunk. `view` says which elements of
    `parameter` it holds, all of them if it is None; a tensor that belongs to no parameter in this way has neither.
    """

    name: str
    dtype: str
    length: int  # bytes
    parameter: str | None = None
    view: View | None = None


@dataclass(frozen=True)
class OriginalFile:
    """A file of weights: the bytes before its tensors, and these in their order, without holes.

    `read` returns the bytes of a tensor by its number, uint8; it is not called for others than those in `tensors`.
    """

    name: str
    head: bytes
    tensors: list[StoredTensor] = field(default_factory=list)
    read: Callable[[int], np.ndarray] = field(default=lambda number: np.empty(0, np.uint8), repr=False)


def check_original_name(name: str) -> None:
    """Raise ValueError unless an original of that name is a file of weights or its index, and can be written into a folder."""
    check_name(name, file=True)
    if (not name.endswith(".safetensors") and name != INDEX) or any(part.startswith(".") for part in name.split("/")):
        raise ValueError(f"{name!r} is no file of weights in safetensors")


def file_head(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Return the head of a safetensors file of tensors: name, type of safetensors, shape and bytes of each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, length in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + length]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def elements(array: np.ndarray, view: View | None) -> np.ndarray:
    """Return a view's elements of a C-contiguous array, as a view of numpy; ValueError if it leaves the array or repeats it."""
    if view is None:
        return array
    offset, shape, strides = view
    if len(shape) != len(strides) or min((offset, *shape, *strides), default=0) < 0:
        raise ValueError("it is not one of elements at offsets of 0 and more")
    if len(shape) > _MAX_NDIM or max((offset, *shape, *strides)) >= bstk.limits.MAX_FILE_LENGTH:
        raise ValueError(f"it has more than {_MAX_NDIM} dimensions, or numbers that no array needs")
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if (count := math.prod(shape)) and last >= array.size:
        raise ValueError(f"it reaches element {last} of {array.size}")
    if count > array.size:
        raise ValueError(f"it has {count} elements, but the parameter has {array.size}")
    flat = array.reshape(-1)[offset:]
    return np.lib.stride_tricks.as_strided(flat, shape, [array.itemsize * stride for stride in strides])


def all_of(shape: Sequence[int]) -> View:
    """Return the view of all elements of an array of that shape."""
    return View(0, tuple(shape), tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))


def views(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str, View]]:
    """Yield the tensors in which checkpoints of a model keep some parameters: name, parameter, view.

    transformers' own conversion to them is run on the numbers of the elements. A parameter that it computes in another way than by
    choosing elements is left out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    for parameter, shape in shapes.items():
        if (count := math.prod(shape)) > MOST_ELEMENTS:
            continue
        numbers = torch.arange(count, dtype=torch.int32).reshape(shape)
        try:
            found = revert_weight_conversion(model, {parameter: numbers})
        except MemoryError:
            raise
        except Exception:  # operations raise anything where they need another parameter, or floats
            continue
        parts = [(name, all_of(shape) if tensor is numbers else _view_of(tensor)) for name, tensor in found.items()]
        if all(view is not None for _, view in parts):
            yield from ((name, parameter, view) for name, view in parts if view is not None)


def _view_of(tensor: torch.Tensor) -> View | None:
    """Return the view that chose these elements; None if there is none."""
    numbers = tensor.numpy()
    if not numbers.size or numbers.dtype != np.int32:
        return None
    flat = [numbers.item(0)] * numbers.ndim
    for axis in range(numbers.ndim):
        place = [0] * numbers.ndim
        place[axis] = min(1, numbers.shape[axis] - 1)
        flat[axis] = int(numbers[tuple(place)]) - flat[axis]
    view = View(numbers.item(0), numbers.shape, tuple(flat))
    expected = np.full((1,) * numbers.ndim, view.offset, np.int32)
    for axis, stride in enumerate(view.strides):
        along = stride * np.arange(numbers.shape[axis], dtype=np.int32)
        expected = expected + along.reshape([-1 if i == axis else 1 for i in range(numbers.ndim)])
    return view if min(view.strides, default=0) >= 0 and np.array_equal(expected, numbers) else None
