"""Weights of a model as numpy and the C kernels take them: stacks of blocks, or plain arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

import bstk
from bstack.engine.native.architecture import NotNativeError
from bstack.engine.parts import check_depth, parts_of
from bstack.kernels.matrix import Matrix
from bstack.kernels.multiply import lookup, multiply_decoded, multiply_dense, multiply_many, rotate
from bstack.packed.lock import PriorityLock
from bstk.errors import DamagedError, error_prefix

__all__ = ["Host", "Packed", "Plain", "Weight", "products", "read_weights"]

# Up to this many tokens the packed kernels multiply; above, rows are decoded and multiplied as floats.
FEW = 8
# Weights that are converted at a time: about what a second-level cache holds.
DECODED = 2**19
_TYPES = {"f32": "<f4", "f16": "<f2", "f64": "<f8", "bf16": "<u2"}


class Weight(Protocol):
    """A matrix W of m rows (outputs) and n columns (inputs), in any form."""

    rows: int
    columns: int

    def multiply(self, x: np.ndarray) -> np.ndarray:
        """Return x W^T: float32, (tokens, n) -> (tokens, m)."""

    def lookup(self, index: np.ndarray) -> np.ndarray:
        """Return rows of W: integers (k) -> float32 (k, n)."""


class Packed:
    """Stacks of blocks, one under the other, whose number of blocks may change between any two calls."""

    def __init__(self, parts: Sequence[Matrix], lock: PriorityLock):
        self.parts, self.lock = list(parts), lock
        self._bounds = np.array([*accumulate(part.rows for part in parts)])
        self.rows, self.columns = int(self._bounds[-1]), parts[0].columns

    def multiply(self, x: np.ndarray) -> np.ndarray:
        return products([self], x)[0]

    def lookup(self, index: np.ndarray) -> np.ndarray:
        which = np.searchsorted(self._bounds, index, side="right")
        found = np.empty((len(index), self.columns), np.float32)
        for number in set(which.tolist()):
            part = self.parts[number]
            inside = which == number
            with self.lock.acquire():
                found[inside] = lookup(part, index[inside] - (self._bounds[number] - part.rows))
        return found

    def multiply_many_tokens(self, x: np.ndarray, rotated: np.ndarray) -> np.ndarray:
        """Return x W^T, given rotate(x), too."""
        y = np.empty((len(x), self.rows), np.float32)
        for part, end in zip(self.parts, self._bounds, strict=True):
            with self.lock.acquire():
                multiply_decoded(part, x, rotated, y[:, end - part.rows : end])
        return y


class Plain:
    """An array as it is stored, converted to float32 some rows at a time."""

    def __init__(self, stored: np.ndarray):
        self._stored = stored
        self.rows, self.columns = stored.shape

    def multiply(self, x: np.ndarray) -> np.ndarray:
        step = max(1, DECODED // self.columns)
        return np.concatenate(
            [multiply_dense(floats(self._stored[start : start + step]), x) for start in range(0, self.rows, step)], 1
        )

    def lookup(self, index: np.ndarray) -> np.ndarray:
        return floats(self._stored[index])

    def dense(self) -> np.ndarray:
        """Return the whole matrix as float32."""
        return floats(self._stored)


def floats(stored: np.ndarray) -> np.ndarray:
    """Return an array as float32; one of uint16 holds bfloat16."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


class Host:
    """Makes weights in the memory of the CPU."""

    def matrix(self, rows: int, columns: int, kinds: Iterable[int]) -> Matrix:
        """Make a matrix without blocks, given the kinds of all that its stack has in the file."""
        return Matrix(rows, columns)

    def packed(self, parts: Sequence[Matrix], lock: PriorityLock) -> Weight:
        """Make a weight of some matrices, one under the other."""
        return Packed(parts, lock)

    def plain(self, stored: np.ndarray) -> Weight | np.ndarray:
        """Make a weight, or a vector of float32, of an array as it is stored; uint16 holds bfloat16."""
        return Plain(stored) if stored.ndim > 1 else floats(stored)


def products(weights: Sequence[Weight], x: np.ndarray) -> list[np.ndarray]:
    """Return x W^T of matrices that read the same x, which is prepared once.

    With at most 8 tokens, each token's result is the same bits whatever else is in the call, if all matrices are packed.
    """
    packed = [weight for weight in weights if isinstance(weight, Packed)]
    if len(packed) < len(weights):
        return [weight.multiply(x) if isinstance(weight, Plain) else products([weight], x)[0] for weight in weights]
    if len(x) > FEW:
        rotated = rotate(x)
        return [weight.multiply_many_tokens(x, rotated) for weight in packed]
    with packed[0].lock.acquire():
        outputs = iter(multiply_many([part for weight in packed for part in weight.parts], x))
    found = [[next(outputs) for _ in weight.parts] for weight in packed]
    return [parts[0] if len(parts) == 1 else np.concatenate(parts, 1) for parts in found]


def read_weights(
    file: bstk.Reader, shapes: Mapping[str, tuple[int, ...]], make: Any
) -> tuple[dict[str, Any], dict[str, Matrix], PriorityLock]:
    """Read a model without its blocks: parameters by name, the empty matrices of its stacks by name, and their lock.

    `shapes` are those of all parameters; a file with others raises NotNativeError or bstk.DamagedError. `make` makes the weights,
    as `Host` does. A parameter of three dimensions is a list of weights.
    """
    shown = file.source.name
    plain = {chunk.name: chunk for chunk in file.chunks if chunk.is_weight and not chunk.is_block}
    blocks = [chunk for chunk in file.chunks if chunk.is_block]
    _check_names({*plain, *(chunk.name.partition("[")[0] for chunk in blocks)}, set(shapes))
    if any(chunk.transposed for chunk in blocks):
        raise NotNativeError("it has transposed matrices")
    with error_prefix(shown):
        parameters = parts_of(blocks, shapes)
    found: dict[str, Any] = {}
    for name, chunk in plain.items():
        if tuple(chunk.shape) != shapes[name]:
            raise DamagedError(f"{shown}: {name} has the shape {chunk.shape}, but its model needs {shapes[name]}.")
        if chunk.dtype not in _TYPES:
            raise NotNativeError(f"{name} is of type {chunk.dtype}")
        stored = np.frombuffer(file.read(chunk), _TYPES[chunk.dtype]).reshape(chunk.shape)
        found[name] = [make.plain(matrix) for matrix in stored] if stored.ndim == 3 else make.plain(stored)
    matrices: dict[str, Matrix] = {}
    lock = PriorityLock()
    for name, parts in parameters.items():
        check_depth(parts, shown)
        made = [make.matrix(*stack[0].shape, [block.kind.code for block in stack]) for _, stack in parts]
        matrices.update({stack[0].name: matrix for (_, stack), matrix in zip(parts, made, strict=True)})
        whole = len(shapes[name]) < 3
        found[name] = make.packed(made, lock) if whole else [make.packed([matrix], lock) for matrix in made]
    return found, matrices, lock


def _check_names(present: set[str], expected: set[str]) -> None:
    for names, what in ((present - expected, "it does not know"), (expected - present, "the file lacks")):
        if names:
            raise NotNativeError(f"{what} {min(names)}")
