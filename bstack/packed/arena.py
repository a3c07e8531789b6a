"""Memory for blocks that goes back to the system when they are dropped.

What malloc frees stays with the process for the most part. So blocks lie in arena that are mapped for them alone, stacked in
the order of the file: dropping from the top unmaps whole arena, and gives back the pages at the end of the last one.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["HostMemory", "Memory", "Allocation", "Arena"]

SLAB = 16 * 2**20
# Of a block: a cache line, which suits vector loads.
ALIGNMENT = 64

# Python maps shared memory if nothing is said, of which nothing goes back before the whole mapping does.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Memory(Protocol):
    """One slab."""

    size: int
    address: int

    def write(self, start: int, block: bytes) -> None:
        """Copy a block to `start`. Several threads may write at a time, each to a place of its own."""

    def give_back(self, start: int, stop: int) -> None:
        """Return what can be returned of a range that is not used any more."""

    def close(self) -> None:
        """Return all of it."""


class HostMemory:
    """A mapping of private memory.

    Raises
    ------
    MemoryError
        The system has none left.
    """

    def __init__(self, size: int):
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._map = mmap.mmap(-1, self.size, **_PRIVATE)
        except OSError as error:
            raise MemoryError(f"no memory for {size} bytes of blocks: {error.strerror}") from None
        self._first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._first)

    def write(self, start: int, block: bytes) -> None:
        ctypes.memmove(self.address + start, block, len(block))  # lets other threads of Python run meanwhile

    def give_back(self, start: int, stop: int) -> None:
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED") and first < stop:
            last = min(-(-stop // mmap.PAGESIZE) * mmap.PAGESIZE, self.size)
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        del self._first  # a mapping that something points into cannot be closed
        self._map.close()


@dataclass
class _Slab:
    memory: Memory
    used: int = 0
    blocks: int = 0


@dataclass(frozen=True)
class Allocation:
    """Where a block of a stack lies, or will.

    Attributes
    ----------
    address : int
        A multiple of 64.
    """

    address: int
    _memory: Memory
    _start: int
    _length: int

    def write(self, block: bytes) -> None:
        """Put the block there; from any thread, while nobody drops it.

        Raises
        ------
        ValueError
            The block has another length than the room was made for.
        """
        if len(block) != self._length:
            raise ValueError(f"a block of {len(block)} bytes in a room of {self._length}.")
        self._memory.write(self._start, block)


class Arena:
    """A stack of blocks in memory of its own. Not thread-safe: the owner takes turns.

    Parameters
    ----------
    slab : int
        Bytes of a slab; a block that is larger gets one of its size.
    memory : callable
        Makes a slab of at least so many bytes.
    """

    def __init__(self, slab: int = SLAB, memory: Callable[[int], Memory] = HostMemory):
        self._size, self._memory = slab, memory
        self._slabs: list[_Slab] = []
        self._starts: list[int] = []  # of each block in its slab

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def mapped_bytes(self) -> int:
        """Address space taken; pages that no block has touched are not in memory."""
        return sum(slab.memory.size for slab in self._slabs)

    def reserve(self, length: int) -> Allocation:
        """Make room for a block of so many bytes on top of the stack; it counts as a block from now on.

        Raises
        ------
        MemoryError
            There is none left.
        """
        top = self._slabs[-1] if self._slabs else None
        if top is None or top.used + length > top.memory.size:
            top = _Slab(self._memory(max(length, self._size)))
            self._slabs.append(top)
        start = top.used
        top.used = -(-(start + length) // ALIGNMENT) * ALIGNMENT
        top.blocks += 1
        self._starts.append(start)
        return Allocation(top.memory.address + start, top.memory, start, length)

    def pop(self, count: int) -> None:
        """Drop the uppermost blocks and give their memory back. Their addresses must not be used any more."""
        while count > 0:
            top = self._slabs[-1]
            gone = min(count, top.blocks)
            count -= gone
            top.blocks -= gone
            start = self._starts[-gone]
            del self._starts[-gone:]
            if top.blocks == 0:
                self._slabs.pop().memory.close()
            else:
                top.memory.give_back(start, top.used)
                top.used = start
