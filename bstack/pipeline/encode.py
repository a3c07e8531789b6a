"""One matrix -> packed blocks in a part, with the gain and the remaining error of each."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

import bstk
from bstack.codecs import Codec
from bstack.codecs.contract import Task
from bstack.numerics.errors import output_errors
from bstack.workdir import Part

__all__ = ["Matrix", "add_dense", "encode"]

_DTYPES = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}


# Each matrix in work holds several copies of its second moment; those of a wide one (0.8 GB each at 14336) leave no room for
# another matrix.
MOST_AT_ONCE = 4
WIDE = 8192


@dataclass(frozen=True)
class Matrix:
    """What the encoder needs to know of one matrix.

    Attributes
    ----------
    name : str
        The stack's name.
    weight : torch.Tensor
        Float32, shape (outputs, inputs).
    moment : torch.Tensor
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
    moment: torch.Tensor
    tokens: int
    sensitivity: torch.Tensor
    transposed: bool = False
    even: bool = False

    @property
    def task(self) -> Task:
        """What a codec takes."""
        importance = torch.ones(self.weight.shape[0]) if self.even else self.sensitivity
        return self.weight.contiguous(), self.moment, self.tokens, importance


def _processors() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def encode(
    matrices: Iterable[Matrix], codec: Codec, part: Part, progress: Callable[[], None] = lambda: None
) -> None:
    """Encode matrices, some at a time, and add their blocks to a part in order.

    The search kernel is single-threaded and lets go of Python's lock, so matrices side by side keep processors busy;
    what comes out does not depend on how many there are. `progress` is called after each.
    """
    workers = min(_processors(), MOST_AT_ONCE)
    pending: deque[Future[list[tuple[bytes, dict[str, Any]]]]] = deque()

    def finish_one() -> None:
        for payload, fields in pending.popleft().result():
            part.add(payload, **fields)
        progress()

    with ThreadPoolExecutor(workers) as pool:
        try:
            for matrix in matrices:
                alone = matrix.weight.shape[1] > WIDE
                while pending and alone:
                    finish_one()
                pending.append(pool.submit(_encode_one, matrix, codec))
                # Only so many at a time: each holds its moment, and a layer may have hundreds of experts.
                if alone or len(pending) > workers:
                    finish_one()
            while pending:
                finish_one()
        finally:
            for future in pending:
                future.cancel()


def _encode_one(matrix: Matrix, codec: Codec) -> list[tuple[bytes, dict[str, Any]]]:
    """All blocks of a matrix, each with the fields of its record.

    A block's gain is the predicted fall of the divergence, 1/2 sum_i E[g_i^2] (change of the squared error of
    output i per token), in nats per token; its error is tr(R H R^T) / tr(W H W^T) after it.
    """
    with torch.no_grad():  # grad mode belongs to the thread
        task = matrix.task
        weight = task[0]
        before = output_errors(weight, matrix.moment)
        whole = float(before.sum(dtype=torch.float64))
        chunks = []
        for level, block in enumerate(codec.encode(*task)):
            gain = 0.5 * float(((before - block.row_errors) * matrix.sensitivity).sum(dtype=torch.float64))
            left = float(block.row_errors.sum(dtype=torch.float64))
            fields = {
                "name": matrix.name, "kind": block.kind, "level": level, "shape": tuple(weight.shape), "dtype": "f16",
                "rank": block.rank, "transposed": matrix.transposed, "gain": gain / matrix.tokens,
                "error": left / whole if whole > 0 else 0.0,
            }
            chunks.append((block.payload, fields))
            before = block.row_errors
    return chunks


def add_dense(name: str, tensor: torch.Tensor, dtype: torch.dtype, part: Part) -> None:
    """Add a parameter or buffer as it is, in the checkpoint's dtype."""
    kept = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
    # Through bytes: numpy has no bfloat16. A scalar has no last axis to reinterpret, so it becomes a row of one.
    raw = kept.reshape(-1).view(torch.uint8).numpy().tobytes()
    part.add(raw, name=name, kind=bstk.TENSOR, shape=tuple(kept.shape), dtype=_DTYPES[kept.dtype])
