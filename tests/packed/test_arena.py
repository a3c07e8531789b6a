"""Blocks in mapped memory: what is pushed is there, and what is popped is the system's again."""

import ctypes
import mmap
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bstack.memory.process import resident_bytes
from bstack.packed.arena import ALIGNMENT, Arena
from bstack.packed.backends import DEVICE_SLAB

STATUS = Path("/proc/self/status")


def at(address, length):
    return ctypes.string_at(address, length)


def push(arena, block):
    allocation = arena.reserve(len(block))
    allocation.write(block)
    return allocation.address


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=9000), st.integers(1, 8)), max_size=40))
def test_a_stack_of_blocks(steps):
    """Bytes are pushed, a number of blocks is popped; what remains is untouched. Slabs of 4 kB, so that many are met."""
    arena, kept = Arena(4096), []
    for step in steps:
        if isinstance(step, int):
            step = min(step, len(kept))
            arena.pop(step)
            del kept[len(kept) - step :]
        else:
            kept.append((push(arena, step), step))
        assert len(arena) == len(kept)
        assert all(at(address, len(block)) == block and address % ALIGNMENT == 0 for address, block in kept)
    arena.pop(len(kept))
    assert not arena._slabs


def test_an_allocation_takes_its_own_block_only():
    arena = Arena(4096)
    allocation = arena.reserve(10)
    for length in (0, 9, 11):
        with pytest.raises(ValueError, match="allocation of 10 bytes"):
            allocation.write(bytes(length))


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system takes back whole slabs only")
def test_dropped_blocks_leave_the_process():
    arena = Arena()
    block = bytes(range(256)) * 4096 * 3  # 3 MB
    for _ in range(40):
        push(arena, block)
    full = resident_bytes()
    arena.pop(13)  # in the middle of a slab
    freed = full - resident_bytes()
    assert 0.95 * 13 * len(block) <= freed
    if STATUS.exists():  # pages of a shared mapping would leave the process, but stay in memory
        shared = next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("RssShmem"))
        assert shared < 1024
    arena.pop(27)
    assert 0.95 * 40 * len(block) <= full - resident_bytes()
    assert not arena._slabs


@pytest.mark.parametrize("length", [4_206_592, 14_698_000])
def test_a_devices_slabs_are_full(length):
    """Blocks of matrices of 4096 x 4096 and 14336 x 4096."""
    sizes = []
    arena = Arena(DEVICE_SLAB, lambda size: sizes.append(size) or SimpleNamespace(size=size, address=0))
    while len(sizes) < 9:
        arena.reserve(length)
    assert sum(sizes[:-1]) < 1.03 * (len(arena) - 1) * length
