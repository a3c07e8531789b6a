"""One matrix -> packed blocks in a part, with the gain and the remaining error of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import bstk
from bstack.codecs import Codec
from bstack.codecs.contract import Task
from bstack.compression.workers import Pending, Workers
from bstack.errors import CalibrationError
from bstack.numerics.hessian import output_errors
from bstack.workdir import Part

__all__ = ["Matrix", "add_dense", "encode", "encode_arrays"]

ALIGNMENT = 64

_DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


@dataclass(frozen=True)
class Matrix:
    """What the encoder needs to know of one matrix.

    Attributes
    ----------
    name : str
        The stack's name.
    weight : torch.Tensor
        Float32, shape (outputs, inputs).
    hessian : torch.Tensor
        H = X^T X, float32, shape (inputs, inputs).
    tokens : int
        Rows of X.
    sensitivity : torch.Tensor
        E[g^2] per output, float32, shape (outputs,).
    transposed : bool
        Whether the model keeps the matrix as inputs x outputs.
    even : bool
        Encode all rows alike, and use the sensitivity for the gains alone. For embeddings and heads: a row is a token,
        and what a few thousand tokens say of the frequency of each of them is good for sums, not for choices.
    """

    name: str
    weight: torch.Tensor
    hessian: torch.Tensor
    tokens: int
    sensitivity: torch.Tensor
    transposed: bool = False
    even: bool = False

    @property
    def task(self) -> Task:
        """What a codec takes."""
        importance = torch.ones(self.weight.shape[0]) if self.even else self.sensitivity
        return self.weight.contiguous(), self.hessian, self.tokens, importance


def encode(
    matrices: Iterable[Matrix], codec: Codec, part: Part, workers: Workers, progress: Callable[[], None] = lambda: None
) -> None:
    """Encode matrices, some at a time, and add their blocks to a part in order.

    What comes out does not depend on how many `workers` there are, nor where. `progress` is called after each matrix.
    """
    pending: deque[Pending] = deque()

    def finish_one() -> None:
        for payload, fields in pending.popleft().result():
            part.add(payload, **fields)
        progress()

    try:
        for matrix in matrices:
            # Only so many at a time: each holds its hessian, and a layer may have hundreds of experts.
            beside = workers.beside(matrix.weight.shape[1])
            while len(pending) > beside:
                finish_one()
            pending.append(workers.submit(encode_arrays, *_arrays(matrix), codec))
            if not beside:
                finish_one()
        while pending:
            finish_one()
    finally:
        for task in pending:
            task.cancel()


def _arrays(matrix: Matrix) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A matrix as plain arrays and values, which can go to another process; without a copy where there is one already."""
    arrays = {"weight": matrix.weight, "hessian": matrix.hessian, "sensitivity": matrix.sensitivity}
    values = {"name": matrix.name, "tokens": matrix.tokens, "transposed": matrix.transposed, "even": matrix.even}
    return {name: tensor.detach().contiguous().numpy() for name, tensor in arrays.items()}, values


def encode_arrays(
    arrays: dict[str, np.ndarray], values: dict[str, Any], codec: Codec
) -> list[tuple[bytes, dict[str, Any]]]:
    """All blocks of a matrix, each with the fields of its record.

    A block's gain is the predicted fall of the divergence, 1/2 sum_i E[g_i^2] (change of the squared error of
    output i per token), in nats per token; its error is tr(R H R^T) / tr(W H W^T) after it.

    Parameters
    ----------
    arrays, values : dict
        The attributes of a `Matrix`.
    codec : Codec

    Returns
    -------
    list of (bytes, dict)

    Raises
    ------
    bstack.errors.CalibrationError
        Calibration made NaN or infinite values.
    """
    matrix = Matrix(**{name: _aligned(array) for name, array in arrays.items()}, **values)
    _check_finite(matrix)
    with torch.no_grad():  # grad mode belongs to the thread
        task = matrix.task
        weight = task[0]
        before = output_errors(weight, matrix.hessian)
        whole = float(before.sum(dtype=torch.float64))
        chunks = []
        for level, block in enumerate(codec.encode(*task)):
            gain = 0.5 * float(((before - block.row_errors) * matrix.sensitivity).sum(dtype=torch.float64))
            left = float(block.row_errors.sum(dtype=torch.float64))
            fields = {
                "name": matrix.name,
                "kind": block.kind,
                "level": level,
                "shape": tuple(matrix.weight.shape),
                "dtype": "f16",
                "rank": block.rank,
                "transposed": matrix.transposed,
                "gain": gain / matrix.tokens,
                "error": left / whole if whole > 0 else 0.0,
            }
            chunks.append((block.payload, fields))
            before = block.row_errors
    return chunks


def _check_finite(matrix: Matrix) -> None:
    # A sum of squares stands on the hessian's diagonal, and nothing beside it is larger.
    for what, numbers in (("inputs", matrix.hessian.diagonal()), ("gradients", matrix.sensitivity)):
        if bad := int((~numbers.isfinite()).sum()):
            raise CalibrationError(
                f"{matrix.name}: in calibration {bad} of its {len(numbers)} {what} become NaN or infinite, so that nothing says which of "
                "its weights matter. Give another text (--calibration), and check that the model works before it is compressed."
            )


def _aligned(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor that begins where torch's own do: BLAS may add in another order elsewhere.

    One that has come from another process lies anywhere, and may not be written to.
    """
    if array.flags.writeable and array.ctypes.data % ALIGNMENT == 0:
        return torch.from_numpy(array)
    tensor = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name))
    tensor.numpy()[...] = array
    return tensor


def add_dense(name: str, tensor: torch.Tensor, dtype: torch.dtype, part: Part) -> None:
    """Add a parameter or buffer as it is, in the checkpoint's dtype."""
    kept = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
    # Through bytes: numpy has no bfloat16. A scalar has no last axis to reinterpret, so it becomes a row of one.
    raw = kept.reshape(-1).view(torch.uint8).numpy().tobytes()
    part.add(raw, name=name, kind=bstk.TENSOR, shape=tuple(kept.shape), dtype=_DTYPES[kept.dtype])
