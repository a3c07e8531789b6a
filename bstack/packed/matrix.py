"""Products with parameters that stay as they are stored: blocks, or tables of half precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch

from bstack.kernels.matrix import PLAIN, ROTATED, Matrix
from bstack.kernels.multiply import decode_rows, lookup, multiply_many, rotate
from bstack.packed.lock import PriorityLock

__all__ = ["Blocks", "Packed", "Parts", "Table", "check_index"]

# Up to this many tokens the packed kernels multiply; above, rows are decoded and the BLAS multiplies.
FEW = 8
# Weights that are decoded at a time: about what a second-level cache holds.
DECODED = 2**19


class Packed(Protocol):
    """A matrix W of m rows (outputs) and n columns (inputs), in any form."""

    rows: int
    columns: int

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T: (..., n) -> (..., m), in the type of x."""

    def lookup(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of W: integers (...) -> (..., n)."""

    def dense(self) -> torch.Tensor:
        """Return W, float32, shape (m, n)."""


class Parts(ABC):
    """A parameter made of stacks of blocks, whose number may change between any two calls, and during one."""

    def __init__(self, parts: Sequence[Any], lock: PriorityLock):
        self.parts = list(parts)
        self.starts = list(accumulate((part.rows for part in parts[:-1]), initial=0))
        self._bounds = torch.tensor(self.starts[1:], dtype=torch.int64)
        self.rows = sum(part.rows for part in parts)
        self.columns = parts[0].columns
        self.lock = lock

    device = torch.device("cpu")

    @abstractmethod
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T, as `Packed.multiply`."""

    @abstractmethod
    def rows_of(self, part: Any, index: torch.Tensor) -> torch.Tensor:
        """Return rows of one part, with the lock held: int64 (k,) -> float32 (k, n), on the device of the blocks."""

    def lookup(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        flat = index.reshape(-1)
        check_index(flat, self.rows)
        found = torch.empty(flat.numel(), self.columns, device=self.device)
        which = torch.bucketize(flat, self._bounds.to(flat.device), right=True)
        for number in set(which.tolist()):
            inside = (which == number).nonzero().squeeze(1)
            with self.lock.acquire():
                found[inside.to(self.device)] = self.rows_of(self.parts[number], flat[inside] - self.starts[number])
        return found.to(dtype).reshape(*index.shape, self.columns)

    def dense(self) -> torch.Tensor:
        with self.lock.acquire():
            return torch.cat([self.rows_of(part, torch.arange(part.rows)) for part in self.parts])


class Blocks(Parts):
    """Parts of `bstack.kernels.matrix.Matrix`, in the memory of the CPU."""

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.detach().reshape(-1, self.columns).to(torch.float32).contiguous()
        if flat.shape[0] <= FEW:
            with self.lock.acquire():
                outputs = multiply_many(self.parts, flat.numpy())
            y = torch.from_numpy(outputs[0] if len(outputs) == 1 else np.concatenate(outputs, 1))
        else:
            y = self._multiply_many_tokens(flat)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.rows)

    def _multiply_many_tokens(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(x.shape[0], self.rows)
        rotated = torch.from_numpy(rotate(x.numpy()))
        step = max(1, DECODED // self.columns)
        decoded = np.empty((min(step, self.rows), self.columns), np.float32)
        for part, offset in zip(self.parts, self.starts, strict=True):
            for start in range(0, part.rows, step):
                stop = min(start + step, part.rows)
                output = y[:, offset + start : offset + stop]
                written = 0
                for kinds, inputs in ((ROTATED, rotated), (PLAIN, x)):
                    with self.lock.acquire():
                        if not set(kinds) & set(part.kind[: part.count]):
                            continue
                        weights = decode_rows(part, kinds, start, stop, decoded[: stop - start])
                    output.addmm_(inputs, torch.from_numpy(weights).t(), beta=written)
                    written = 1
                if not written:
                    output.zero_()
        return y

    def rows_of(self, part: Matrix, index: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(lookup(part, index.numpy()))


def check_index(index: torch.Tensor, rows: int) -> None:
    """Raise IndexError for a missing row, as torch does."""
    if not index.numel():
        return
    first, last = torch.stack(torch.aminmax(index)).tolist()  # one wait for a device
    if first < 0 or last >= rows:
        raise IndexError(f"index out of range: {first} to {last}, in a table of {rows} rows")


class Table:
    """A matrix (m, n) that keeps another floating type than the model's and is converted some rows at a time."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.rows, self.columns = tensor.shape

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(*x.shape[:-1], self.rows)
        step = max(1, DECODED // self.columns)
        for start in range(0, self.rows, step):
            stop = start + step
            y[..., start:stop] = torch.nn.functional.linear(x, self.tensor[start:stop].to(x.dtype))
        return y

    def lookup(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.tensor[index].to(dtype)

    def dense(self) -> torch.Tensor:
        return self.tensor.float()
