"""The memory and the kernels of packed weights: of the CPU, or of a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

import bstk
from bstack.errors import DeviceError, device_failed, device_full, one_line
from bstack.folders import cache_folder
from bstack.kernels.matrix import PLAIN, ROTATED, Matrix
from bstack.kernels.table import DeviceMatrix, MatrixTable, Stacked
from bstack.memory.free import Memory, free_memory
from bstack.numerics.rotation import rotate, unrotate
from bstack.packed.arena import Arena
from bstack.packed.autosize import default_margin
from bstack.packed.lock import RECORDING, PriorityLock
from bstack.packed.matrix import DECODED, FEW, Blocks, Packed, Parts, check_index
from bstk.errors import BstkError, ResourceError, UsageError

__all__ = [
    "LESS",
    "Backend",
    "CpuBackend",
    "CudaBackend",
    "activation_type",
    "backend_of",
    "check_room",
    "device_kernels",
    "device_memory",
    "device_of",
]
__all__ += ["on_device"]


class CpuBackend:
    """Makes matrices, parameters and memory on the CPU."""

    device = torch.device("cpu")

    def matrix(self, rows: int, columns: int, kinds: Iterable[int] = ()) -> Matrix:
        """Make a matrix without blocks, given the kinds of all that its stack has in the file."""
        return Matrix(rows, columns)

    def packed(self, parts: Sequence[Matrix], lock: PriorityLock) -> Packed:
        """Make a parameter of some matrices, one under the other."""
        return Blocks(parts, lock)

    def arena(self) -> Arena:
        return Arena()

    def free_memory(self) -> Memory | None:
        """Return what memory there is for blocks."""
        return free_memory()


class CudaBackend:
    """Makes them on a GPU, or on any device of torch where its kernels run on the CPU.

    `kernels` are those of the device: `bstack.kernels.cuda.Kernels`, or the module `bstack.kernels.device`.
    """

    def __init__(self, device: torch.device, matrices: int, kernels: Any):
        self.device, self.kernels = device, kernels
        self._table = MatrixTable(matrices, device)
        self._made = 0

    def matrix(self, rows: int, columns: int, kinds: Iterable[int] = ()) -> Any:
        self._made += 1
        return DeviceMatrix(rows, columns, self._table, self._made - 1, kinds)

    def packed(self, parts: Sequence[Any], lock: PriorityLock) -> Packed:
        return DeviceBlocks(parts, lock, self.kernels)

    def arena(self) -> Arena:
        return Arena(DEVICE_SLAB, lambda size: DeviceMemory(size, self.device))

    def free_memory(self) -> Memory | None:
        return device_memory(self.device)


Backend = CpuBackend | CudaBackend
# What to do where a packed model does not fit a device.
LESS = "Give the weights less."
# The end of a slab that the next block does not fit is taken all the same, unlike on the CPU: of blocks of 4 to 15 MB some 2 %.
DEVICE_SLAB = 256 * 2**20


def device_of(device: str | torch.device, packed: bool) -> torch.device:
    """Return the device of a name, if weights can be put on it."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"the device is {device!r}; allowed are cpu, cuda and cuda:N.", option="device") from None
    if packed and found.type not in ("cpu", "cuda"):
        raise UsageError(
            f"packed weights run on cpu and cuda, not on {found.type}. bstack.load(..., mode='dense') runs there."
        )
    if found.type == "cuda":
        _check_gpus(found)
    try:
        torch.empty(0, device=found)
    except Exception as error:  # of many classes, for a device that this torch was not built for
        raise UsageError(f"torch cannot use {found} here: {one_line(error)}", option="device") from None
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    if packed and found.type == "cuda":
        with on_device(found, "model", LESS):
            device_kernels(found.index)
    return found


def _check_gpus(device: torch.device) -> None:
    """Raise UsageError where there is no such GPU, with the reason that torch gives."""
    if torch.version.cuda is None and torch.version.hip is None:
        raise UsageError(
            f"torch finds no {device} here: torch {torch.__version__} is built for the CPU alone.",
            hint="Install a build of torch for CUDA.",
            option="device",
        )
    try:
        torch.cuda.init()  # names an old driver, where counting finds none
    except Exception as error:
        raise UsageError(f"torch finds no {device} here: {one_line(error)}", option="device") from None
    if (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UsageError(f"torch finds no {device} here; it finds {count} CUDA devices.", option="device")


def backend_of(device: torch.device, matrices: int) -> Backend:
    """Return the backend for that many packed matrices on a device from `device_of`."""
    return CpuBackend() if device.type == "cpu" else CudaBackend(device, matrices, device_kernels(device.index))


@cache
def device_kernels(index: int) -> Any:
    """Return the kernels of a GPU: in CUDA where NVIDIA's packages are installed, otherwise in Triton."""
    if torch.version.hip is None and importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.core"):
        try:
            driver = importlib.import_module("bstack.kernels.cuda.driver")
        except ImportError as error:
            raise BstkError(
                f"the package cuda-core cannot be imported: {one_line(error)}", hint="Run pip install 'bstack[cuda]'"
            ) from None
        return driver.load(index, cache_folder("cuda"))
    try:
        return importlib.import_module("bstack.kernels.device")
    except ImportError:
        raise BstkError(
            "packed weights on a GPU need kernels in CUDA or in Triton, and the packages of neither are installed.",
            hint="Install those for NVIDIA's GPUs: pip install 'bstack[cuda]'",
        ) from None


@contextmanager
def on_device(
    device: torch.device, what: str = "text", advice: str = "Give the weights less, or write a shorter text."
) -> Iterator[None]:
    """Raise ResourceError where a device is full, and DeviceError where it fails, for what torch and the launcher raise.

    `what` has no memory left then, and `advice` says what to do.
    """
    try:
        yield
    except Exception as error:  # of several classes, some of them private
        if device_full(error):
            raise ResourceError(
                f"{device} has no memory left for this {what}: {one_line(error)}", hint=advice, option="mb"
            ) from None
        if device_failed(error):
            raise DeviceError(
                f"{device} failed: {one_line(error)}.", hint="Start again; nvidia-smi shows whether it is there."
            ) from error
        raise


def activation_type(device: torch.device) -> torch.dtype:
    """Return the type of the activations of prompts: bfloat16, or float32 on a GPU without it and on the CPU."""
    # Activations of many models pass 65504, the most that half precision holds.
    there = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return torch.bfloat16 if there else torch.float32


def is_recording(device: torch.device) -> bool:
    """Return whether launches go into a CUDA graph, so that nothing may wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def device_memory(device: torch.device) -> Memory | None:
    """Return what is free of a GPU's memory; None for another device."""
    if device.type != "cuda":
        return free_memory()
    free, total = torch.cuda.mem_get_info(device)
    return Memory(free, total, f"the memory of {device}")


def check_room(device: torch.device, file: bstk.Reader, budget: int | None) -> None:
    """Raise ResourceError, before weights are read, if those of a budget do not fit what is free of a GPU's memory."""
    memory = device_memory(device)
    if device.type == "cpu" or memory is None:
        return
    cut = min(file.fit(budget=budget), file.model)
    fits = memory.free - (margin := default_margin(memory))
    if cut.memory_bytes <= fits:
        return
    said = (
        f"{cut.memory_bytes / bstk.MB:,.2f} MB of weights are too much for {device}: {memory.free / bstk.MB:,.0f} MB of "
        f"{memory.total / bstk.MB:,.0f} MB are free, of which {margin / bstk.MB:,.0f} MB are for what runs"
    )
    if fits < file.base.memory_bytes:
        raise ResourceError(
            f"{said}, and not even the smallest size fits.",
            hint="End what else uses the GPU (nvidia-smi shows it), or run on the CPU.",
        )
    raise ResourceError(f"{said}: at most {fits * 100 // bstk.MB / 100:,.2f} MB of weights fit.", option="mb")


class DeviceMemory:
    """A slab in a device's memory. Raise ResourceError if the device is full."""

    def __init__(self, size: int, device: torch.device):
        self.size = size
        with on_device(device, f"slab of {size} bytes of blocks", LESS):
            self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.address = self._bytes.data_ptr()

    def write(self, start: int, block: bytes) -> None:
        with on_device(self._bytes.device):
            self._bytes[start : start + len(block)].copy_(torch.frombuffer(bytearray(block), dtype=torch.uint8))

    def give_back(self, start: int, stop: int) -> None:
        """Do nothing: part of a slab cannot be returned; the slab is, with its last block."""

    def close(self) -> None:
        del self._bytes
        if torch.cuda.is_available():
            with RECORDING:
                torch.cuda.empty_cache()  # waits for kernels that read it, then returns it to the driver


class DeviceBlocks(Parts):
    """Parts in a device's memory, and the device's kernels."""

    def __init__(self, parts: Sequence[DeviceMatrix], lock: PriorityLock, kernels: Any):
        super().__init__(parts, lock)
        self.device = parts[0].entry.device
        self._kernels = kernels
        self.stacked = Stacked(parts) if hasattr(kernels, "launch") else None
        self._rotate = getattr(kernels, "rotate", None) or _rotate_by_products

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.detach().reshape(-1, self.columns)
        if flat.shape[0] <= FEW:
            y = torch.empty(flat.shape[0], self.rows, device=x.device)
            plain = flat.float().contiguous()
            rotated = self._rotate(plain, torch.float32)
            with self.lock.acquire():
                self.multiply_into(plain, rotated, y)
        else:
            y = x.new_empty(flat.shape[0], self.rows)
            rotated = self._rotate(flat, x.dtype)
            for part, start in zip(self.parts, self.starts, strict=True):
                with self.lock.acquire():
                    self._decode_and_multiply(part, flat, rotated, y[:, start : start + part.rows])
        return y.to(x.dtype).reshape(*x.shape[:-1], self.rows)

    def _decode_and_multiply(self, part: Any, x: torch.Tensor, rotated: torch.Tensor, y: torch.Tensor) -> None:
        step = max(1, 16 * DECODED // self.columns)
        for start in range(0, part.rows, step):
            index = torch.arange(start, min(start + step, part.rows), device=x.device)
            out, written = y[:, start : start + step], 0
            for kinds, inputs in ((ROTATED, rotated), (PLAIN, x)):
                if not part.kinds.isdisjoint(kinds):
                    out.addmm_(inputs, self._kernels.decode(part, kinds, index, x.dtype).t(), beta=written)
                    written = 1
            if not written:
                out.zero_()

    def multiply_into(self, plain: torch.Tensor, rotated: torch.Tensor, out: torch.Tensor) -> None:
        """Write x W^T for a few tokens, float32, given x and rotate(x); the caller holds the lock."""
        if self.stacked is not None:
            self._kernels.multiply(self.stacked, plain, rotated, out)
            return
        for part, start in zip(self.parts, self.starts, strict=True):
            self._kernels.multiply(part, plain, rotated, out[:, start : start + part.rows])

    def rows_at(self, index: torch.Tensor) -> torch.Tensor:
        """Return rows of W, int64 (k,) of the device -> float32 (k, n), without a wait; the caller holds the lock."""
        assert self.stacked is not None
        found = torch.zeros(len(index), self.columns, device=index.device)
        if not self.stacked.kinds.isdisjoint(ROTATED):
            found = self._rotate(
                self._kernels.decode(self.stacked, ROTATED, index, torch.float32), torch.float32, undo=True
            )
        for part, start in zip(self.parts, self.starts, strict=True):
            if not part.kinds.isdisjoint(PLAIN):
                own = index - start
                inside = (own >= 0) & (own < part.rows)
                plain = self._kernels.decode(part, PLAIN, own.clamp(0, part.rows - 1), torch.float32)
                found += torch.where(inside[:, None], plain, 0)
        return found

    def lookup(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.stacked is None:
            return super().lookup(index, dtype)
        flat = index.reshape(-1)
        if is_recording(self.device):
            flat = flat.clamp(0, self.rows - 1)  # who replays the graph checks them
        else:
            check_index(flat, self.rows)  # where they lie, which may be the CPU
        with self.lock.acquire():
            found = self.rows_at(flat.to(self.device))
        return found.to(dtype).reshape(*index.shape, self.columns)

    def rows_of(self, part: Any, index: torch.Tensor) -> torch.Tensor:
        index, found = index.to(part.entry.device), None
        if not part.kinds.isdisjoint(ROTATED):
            found = self._rotate(self._kernels.decode(part, ROTATED, index, torch.float32), torch.float32, undo=True)
        if found is None or not part.kinds.isdisjoint(PLAIN):
            plain = self._kernels.decode(part, PLAIN, index, torch.float32)
            found = plain if found is None else found + plain
        return found


def _rotate_by_products(x: torch.Tensor, dtype: torch.dtype, *, undo: bool = False) -> torch.Tensor:
    """Rotate rows with torch, or undo it: the kernels in Triton cannot."""
    return (unrotate if undo else rotate)(x.float()).to(dtype).contiguous()
