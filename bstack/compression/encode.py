"""Encode matrices as packed blocks of a part, with the gain and the remaining error of each; in threads of this process.

`bstack.compression.cluster` does it on other machines, `bstack.compression.device` on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

import bstk
from bstack.codecs import Codec
from bstack.codecs.contract import Task
from bstack.kernels.native import processors
from bstack.workdir import Part

__all__ = ["Matrix", "Threads", "Workers", "add_dense", "encode", "encode_arrays"]

# A pending matrix holds several copies of its hessian, of 0.8 GB each at 14336 inputs, so wide ones are encoded one by one.
MAX_THREADS = 4
WIDE = 8192

_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}
_DTYPES |= {torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool"}


@dataclass(frozen=True)
class Matrix:
    """One matrix, and what the encoder needs to know of it; tensors are float32."""

    name: str  # of its stack
    weight: torch.Tensor  # (outputs, inputs)
    hessian: torch.Tensor  # H = X^T X, (inputs, inputs)
    tokens: int  # rows of X
    sensitivity: torch.Tensor  # E[g^2] of each output, (outputs,)
    transposed: bool = False  # the model keeps it as inputs x outputs
    # Encode all rows with equal weight, and use the sensitivity for the gains alone. For embeddings and heads, whose rows are
    # tokens: a few thousand tokens of calibration say little of the frequency of one.
    even: bool = False

    @property
    def task(self) -> Task:
        """Return the arguments of a codec."""
        importance = self.sensitivity.new_ones(self.weight.shape[0]) if self.even else self.sensitivity
        return self.weight.contiguous(), self.hessian, self.tokens, importance


class Pending(Protocol):
    """A matrix that is being encoded."""

    def result(self) -> Any:
        """Wait for the function, and return or raise what it does."""

    def cancel(self) -> Any:
        """Drop a matrix that is not needed any more."""


class Workers(Protocol):
    """Encode several matrices at a time, with the same result everywhere but on a GPU."""

    device: torch.device  # where they are when they are submitted; on the CPU as arrays of numpy, for any process

    def max_pending(self, inputs: int, /) -> int:
        """Return how many matrices may be pending at a time, one with so many inputs among them."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Pending:
        """Call a function of a module with these arguments, now or later."""


class Threads(ThreadPoolExecutor):
    """Threads of this process, one a processor and at most four: the search kernel releases Python's lock."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._count = min(processors(), MAX_THREADS)
        super().__init__(self._count)

    def __exit__(self, *_exception: object) -> None:
        self.shutdown(cancel_futures=True)

    def max_pending(self, inputs: int, /) -> int:
        """Return how many matrices may be pending at a time, one with so many inputs among them."""
        return 1 if inputs > WIDE else self._count


def encode(
    matrices: Iterable[Matrix], codec: Codec, part: Part, workers: Workers, progress: Callable[[], None] = lambda: None
) -> None:
    """Encode matrices, some at a time, and add their blocks to a part in order; the result is the same for all workers."""
    pending: deque[Pending] = deque()

    def finish_one() -> None:
        for payload, fields in pending.popleft().result():
            part.add(payload, **fields)
        progress()

    try:
        for matrix in matrices:
            # Each pending matrix holds its hessian, and a layer may have hundreds of experts.
            max_pending = workers.max_pending(matrix.weight.shape[1])
            while len(pending) >= max_pending:
                finish_one()
            tensors = {name: value for name, value in vars(matrix).items() if isinstance(value, torch.Tensor)}
            values = {name: value for name, value in vars(matrix).items() if name not in tensors}
            placed = {name: tensor.detach().to(workers.device).contiguous() for name, tensor in tensors.items()}
            on_cpu = workers.device.type == "cpu"
            arrays = {name: tensor.numpy() for name, tensor in placed.items()} if on_cpu else placed
            pending.append(workers.submit(encode_arrays, arrays, values, codec))
            if max_pending == 1:
                finish_one()
        while pending:
            finish_one()
    finally:
        for task in pending:
            task.cancel()


def encode_arrays(
    arrays: Mapping[str, np.ndarray | torch.Tensor], values: dict[str, Any], codec: Codec
) -> list[tuple[bytes, dict[str, Any]]]:
    """Encode a matrix, given as the attributes of a `Matrix`: all its blocks, each with the fields of its record.

    A block's gain is the predicted fall of the divergence, 1/2 sum_i E[g_i^2] (change of the squared error of
    output i per token), in nats per token; its error is tr(R H R^T) / tr(W H W^T) after it.
    """
    tensors: dict[str, Any] = {name: _aligned(array) for name, array in arrays.items()}
    matrix = Matrix(**tensors, **values)
    # The largest value of a hessian is on its diagonal.
    for what, numbers in (("inputs", matrix.hessian.diagonal()), ("gradients", matrix.sensitivity)):
        if bad := int((~numbers.isfinite()).sum()):
            raise bstk.BstkError(
                f"{matrix.name}: in calibration {bad} of its {len(numbers)} {what} become NaN or infinite, so "
                "that nothing says which of its weights matter.",
                hint="Give another calibration text, and check that the model works.",
            )
    with torch.no_grad():  # grad mode belongs to the thread
        task = matrix.task
        whole = 0.0
        chunks = []
        for level, block in enumerate(codec.encode(*task)):
            if level == 0:
                whole = float(block.errors_before.sum(dtype=torch.float64))
            gain = 0.5 * float(((block.errors_before - block.row_errors) * matrix.sensitivity).sum(dtype=torch.float64))
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
    return chunks


def _aligned(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Return the array as a tensor that is aligned as torch's own, because BLAS may add in another order otherwise.

    An array from another process has any alignment, and may be read-only.
    """
    if isinstance(array, torch.Tensor):
        return array
    if array.flags.writeable and array.ctypes.data % 64 == 0:
        return torch.from_numpy(array)
    tensor = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name))
    tensor.numpy()[...] = array
    return tensor


def add_dense(name: str, tensor: torch.Tensor, dtype: torch.dtype, part: Part) -> None:
    """Add a parameter or buffer unchanged, in the checkpoint's dtype."""
    kept = tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
    # Through bytes: numpy has no bfloat16. A scalar has no last axis to reinterpret, so it becomes a row of one.
    raw = kept.reshape(-1).view(torch.uint8).numpy().tobytes()
    part.add(raw, name=name, kind=bstk.TENSOR, shape=tuple(kept.shape), dtype=_DTYPES[kept.dtype])
