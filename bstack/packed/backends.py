"""The memory and the kernels of packed weights: of the CPU, or of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bstack.errors import one_line
from bstack.kernels.matrix import PLAIN, ROTATED, Matrix
from bstack.numerics.rotation import rotate, unrotate
from bstack.packed.arena import Arena
from bstack.packed.lock import PriorityLock
from bstack.packed.matrix import DECODED, FEW, Blocks, Packed, Parts
from bstk.errors import BstkError, ResourceError, UsageError

__all__ = ["Backend", "CpuBackend", "CudaBackend", "backend_of", "device_of"]


class CpuBackend:
    """Makes matrices, parameters and memory on the CPU."""

    device = torch.device("cpu")

    def matrix(self, rows: int, columns: int) -> Matrix:
        """Make a matrix without blocks."""
        return Matrix(rows, columns)

    def packed(self, parts: Sequence[Matrix], lock: PriorityLock) -> Packed:
        """Make a parameter of some matrices, one under the other."""
        return Blocks(parts, lock)

    def arena(self) -> Arena:
        return Arena()


class CudaBackend:
    """Makes them on a GPU, or under triton's interpreter on any device of torch."""

    def __init__(self, device: torch.device, matrices: int):
        self.device = device
        self._kernels = _device_kernels()
        self._table = self._kernels.MatrixTable(matrices, device)
        self._made = 0

    def matrix(self, rows: int, columns: int) -> Any:
        self._made += 1
        return self._kernels.DeviceMatrix(rows, columns, self._table, self._made - 1)

    def packed(self, parts: Sequence[Any], lock: PriorityLock) -> Packed:
        return DeviceBlocks(parts, lock, self._kernels)

    def arena(self) -> Arena:
        return Arena(memory=lambda size: DeviceMemory(size, self.device))


Backend = CpuBackend | CudaBackend


def device_of(device: str | torch.device, packed: bool) -> torch.device:
    """Return the device of a name, if weights can be put on it."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"the device is {device!r}; allowed are cpu, cuda and cuda:N.") from None
    if packed and found.type not in ("cpu", "cuda"):
        raise UsageError(
            f"packed weights run on cpu and cuda, not on {found.type}. bstack.load(..., mode='dense') runs there."
        )
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"torch finds no {found} here; it finds {torch.cuda.device_count()} CUDA devices.")
    try:
        torch.empty(0, device=found)
    except Exception as error:  # of many classes, for a device that this torch was not built for
        raise UsageError(f"torch cannot use {found} here: {one_line(error)}") from None
    if packed and found.type == "cuda":
        _device_kernels()
    return found


def backend_of(device: torch.device, matrices: int) -> Backend:
    """Return the backend for that many packed matrices on a device from `device_of`."""
    return CpuBackend() if device.type == "cpu" else CudaBackend(device, matrices)


def _device_kernels() -> Any:
    try:
        from bstack.kernels import device
    except ImportError:
        raise BstkError(
            "packed weights on a GPU need the package triton.", hint="Install it: pip install 'bstack[gpu]'"
        ) from None
    return device


class DeviceMemory:
    """A slab in a device's memory. Raise ResourceError if the device is full."""

    def __init__(self, size: int, device: torch.device):
        self.size = size
        try:
            self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"{device} has no memory for {size} bytes of blocks: {error}".splitlines()[0]) from None
        self.address = self._bytes.data_ptr()

    def write(self, start: int, block: bytes) -> None:
        self._bytes[start : start + len(block)].copy_(torch.frombuffer(bytearray(block), dtype=torch.uint8))

    def give_back(self, start: int, stop: int) -> None:
        """Do nothing: part of a slab cannot be returned; the slab is, with its last block."""

    def close(self) -> None:
        del self._bytes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # waits for kernels that read it, then returns it to the driver


class DeviceBlocks(Parts):
    """Parts of `bstack.kernels.device.DeviceMatrix`; `kernels` is that module."""

    def __init__(self, parts: Sequence[Any], lock: PriorityLock, kernels: Any):
        super().__init__(parts, lock)
        self._kernels = kernels

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.detach().reshape(-1, self.columns)
        if flat.shape[0] <= FEW:
            y = torch.empty(flat.shape[0], self.rows, device=x.device)
            plain = flat.float().contiguous()
            rotated = rotate(plain).contiguous()
            for part, start in zip(self.parts, self.starts, strict=True):
                with self.lock.acquire():
                    self._kernels.multiply(part, plain, rotated, y[:, start : start + part.rows])
        else:
            y = x.new_empty(flat.shape[0], self.rows)
            rotated = rotate(flat.float()).to(x.dtype)
            for part, start in zip(self.parts, self.starts, strict=True):
                with self.lock.acquire():
                    self._decode_and_multiply(part, flat, rotated, y[:, start : start + part.rows])
        return y.to(x.dtype).reshape(*x.shape[:-1], self.rows)

    def _decode_and_multiply(self, part: Any, x: torch.Tensor, rotated: torch.Tensor, y: torch.Tensor) -> None:
        y.zero_()
        step = max(1, 16 * DECODED // self.columns)
        for start in range(0, part.rows, step):
            index = torch.arange(start, min(start + step, part.rows), device=x.device)
            for kinds, inputs in ((ROTATED, rotated), (PLAIN, x)):
                if set(kinds) & set(part.kind[: part.count]):
                    y[:, start : start + step] += inputs @ self._kernels.decode(part, kinds, index, x.dtype).t()

    def rows_of(self, part: Any, index: torch.Tensor) -> torch.Tensor:
        index = index.to(part.entry.device)
        rotated, plain = (self._kernels.decode(part, kinds, index, torch.float32) for kinds in (ROTATED, PLAIN))
        return unrotate(rotated) + plain
