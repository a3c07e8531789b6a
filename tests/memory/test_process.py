"""What this process holds, asked of the system, and read from files like the system's."""

import ctypes
import mmap
import sys

import pytest

from bstack.memory import process
from bstack.memory.process import peak_bytes, resident_bytes

SIZE = 64 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere freed pages may stay resident for a while")
def test_memory_that_is_touched_counts_and_memory_given_back_does_not():
    before, peak = resident_bytes(), peak_bytes()
    assert 2**20 < before <= peak + SIZE // 8
    with mmap.mmap(-1, SIZE) as area:
        for page in range(0, SIZE, mmap.PAGESIZE):
            area[page] = 1
        assert resident_bytes() - before == pytest.approx(SIZE, rel=0.1)
    assert abs(resident_bytes() - before) < SIZE // 8
    assert peak_bytes() >= before + SIZE * 0.9


@pytest.mark.parametrize("statm", ["", "12", "12 x 1 1 0 1 0", None])
def test_files_that_say_nothing_are_no_answer(tmp_path, statm):
    (tmp_path / "self").mkdir()
    if statm is not None:
        (tmp_path / "self/statm").write_text(statm)
        (tmp_path / "self/status").write_text("Name:\tx\nVmHWM:\n")
    if sys.platform.startswith("linux"):
        assert resident_bytes(tmp_path) is None
    assert peak_bytes(tmp_path) > 2**20  # from getrusage


def test_records_of_other_systems_have_their_sizes():
    assert ctypes.sizeof(process._TaskInfo) == 96  # PROC_PIDTASKINFO_SIZE
    assert ctypes.sizeof(process._Counters) == 8 + 8 * ctypes.sizeof(ctypes.c_size_t)
