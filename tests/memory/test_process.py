"""What this process holds, asked of the system."""

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


def test_without_a_file_of_linux_the_peak_is_getrusage(tmp_path, monkeypatch):
    for file in (tmp_path / "none", tmp_path / "status"):
        (tmp_path / "status").write_text("Name:\tx\n")
        monkeypatch.setattr(process, "STATUS", file)
        assert peak_bytes() > 2**20
