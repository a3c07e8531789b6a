"""Where packed weights live and what multiplies them: the processor's memory and kernels, or a GPU's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from bstack.errors import MissingPackageError, one_line
from bstack.kernels.matrix import PLAIN, TRELLIS, Matrix
from bstack.numerics.rotation import rotate, unrotate
from bstack.packed.arena import Arena
from bstack.packed.lock import Gate
from bstack.packed.matrix import DECODED, FEW, Blocks, Packed, Parts
from bstk.errors import ResourceError, UsageError

__all__ = ["CpuBackend", "CudaBackend", "Place", "device_of", "place_of"]


class Place(Protocol):
    """What `stacked_model` needs to know of it."""

    device: torch.device

    def matrix(self, rows: int, columns: int) -> Any:
        """A matrix without blocks, with `put` and `count`."""

    def packed(self, parts: Sequence[Any], gate: Gate) -> Packed:
        """A parameter of some matrices, one under the other."""

    def arena(self) -> Arena:
        """Memory for blocks."""


class CpuBackend:
    """The processor."""

    device = torch.device("cpu")

    def matrix(self, rows: int, columns: int) -> Matrix:
        return Matrix(rows, columns)

    def packed(self, parts: Sequence[Matrix], gate: Gate) -> Packed:
        return Blocks(parts, gate)

    def arena(self) -> Arena:
        return Arena()


class CudaBackend:
    """A GPU, or under triton's interpreter any device of torch.

    Parameters
    ----------
    device : torch.device
    matrices : int
        How many there will be.

    Raises
    ------
    bstack.errors.MissingPackageError
        triton is not installed.
    """

    def __init__(self, device: torch.device, matrices: int):
        self.device = device
        self._kernels = _device_kernels()
        self._table = self._kernels.MatrixTable(matrices, device)
        self._made = 0

    def matrix(self, rows: int, columns: int) -> Any:
        self._made += 1
        return self._kernels.DeviceMatrix(rows, columns, self._table, self._made - 1)

    def packed(self, parts: Sequence[Any], gate: Gate) -> Packed:
        return DeviceBlocks(parts, gate, self._kernels)

    def arena(self) -> Arena:
        return Arena(memory=lambda size: DeviceMemory(size, self.device))


def device_of(device: str | torch.device, packed: bool) -> torch.device:
    """The device of a name, if weights can be put on it.

    Parameters
    ----------
    device : str or torch.device
    packed : bool
        Whether the weights are packed, which run on fewer devices.

    Raises
    ------
    bstk.UsageError
        There is no such device here, or packed weights do not run on it.
    bstack.errors.MissingPackageError
        Packed weights need triton there, and it is not installed.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"{device!r} is no device; allowed are cpu, cuda and cuda:N.") from None
    if packed and found.type not in ("cpu", "cuda"):
        raise UsageError(
            f"packed weights run on cpu and cuda, not on {found.type}. bstack.load(..., mode='dense') runs there."
        )
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"torch finds no {found} here; it finds {torch.cuda.device_count()} CUDA devices.")
    try:
        torch.empty(0, device=found)
    except Exception as error:  # of many kinds, for a device that this torch was not built for
        raise UsageError(f"torch cannot use {found} here: {one_line(error)}") from None
    if packed and found.type == "cuda":
        _device_kernels()
    return found


def place_of(device: torch.device, matrices: int) -> Place:
    """Where so many packed matrices live on a device that `device_of` has given."""
    return CpuBackend() if device.type == "cpu" else CudaBackend(device, matrices)


def _device_kernels() -> Any:
    try:
        from bstack.kernels import device
    except ImportError:
        raise MissingPackageError(
            "Packed weights on a GPU need the package triton: pip install 'bstack[gpu]'"
        ) from None
    return device


class DeviceMemory:
    """A slab in a device's memory.

    Raises
    ------
    bstk.ResourceError
        The device has none left.
    """

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
        """A part of an allocation cannot be returned; the slab follows when its last block is dropped."""

    def close(self) -> None:
        del self._bytes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # waits for the kernels that still read it, and gives it to other programs


class DeviceBlocks(Parts):
    """Of `bstack.kernels.device.DeviceMatrix`; `kernels` is that module."""

    def __init__(self, parts: Sequence[Any], gate: Gate, kernels: Any):
        super().__init__(parts, gate)
        self._kernels = kernels

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.detach().reshape(-1, self.columns)
        if flat.shape[0] <= FEW:
            y = torch.empty(flat.shape[0], self.rows, device=x.device)
            given = flat.float().contiguous()
            turned = rotate(given).contiguous()
            for part, start in zip(self.parts, self.starts, strict=True):
                with self.gate.step_back():
                    self._kernels.multiply(part, given, turned, y[:, start : start + part.rows])
        else:
            y = x.new_empty(flat.shape[0], self.rows)
            turned = rotate(flat.float()).to(x.dtype)
            for part, start in zip(self.parts, self.starts, strict=True):
                with self.gate.step_back():
                    self._decode_and_multiply(part, flat, turned, y[:, start : start + part.rows])
        return y.to(x.dtype).reshape(*x.shape[:-1], self.rows)

    def _decode_and_multiply(self, part: Any, x: torch.Tensor, turned: torch.Tensor, y: torch.Tensor) -> None:
        y.zero_()
        step = max(1, 16 * DECODED // self.columns)
        for start in range(0, part.rows, step):
            index = torch.arange(start, min(start + step, part.rows), device=x.device)
            for kinds, inputs in (((TRELLIS,), turned), (PLAIN, x)):
                if set(kinds) & set(part.kind[: part.count]):
                    y[:, start : start + step] += inputs @ self._kernels.decode(part, kinds, index, x.dtype).t()

    def rows_of(self, part: Any, index: torch.Tensor) -> torch.Tensor:
        index = index.to(part.entry.device)
        turned, plain = (self._kernels.decode(part, kinds, index, torch.float32) for kinds in ((TRELLIS,), PLAIN))
        return unrotate(turned) + plain
