"""Launches the CUDA kernels on a GPU, as cuda_on_cpu.py does on the CPU, so that the same tests run in both places."""

from functools import cache

import numpy as np
import pytest
import torch

from bstack.folders import cache_folder
from bstack.kernels.cuda import Kernels

FENCE, ROOM = 0xFF, 64  # bytes of a fence, which make NaN; how many stand in front of an array


@cache
def launcher():
    """Return a launcher for the first GPU."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed (pip install 'bstack[cuda]')")
    from bstack.kernels.cuda import driver

    device = torch.device("cuda", 0)
    return Launcher(device, driver.load(0, cache_folder("cuda")).launch)


class Launcher:
    """Launches kernels on a device; what they write to a fence is found by `remove_fences`."""

    def __init__(self, device, launch):
        self.device, self.backwards, self.launched = device, False, set()

        def noted(name, grid, *arguments):
            self.launched.add(name)
            launch(name, grid, *arguments)

        self.kernels = Kernels(noted, multiprocessors=1)
        self._memory = []

    def fenced(self, array, offset=0):
        """Copy an array to a tensor of the device between two fences, kept until `remove_fences`."""
        given = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy())
        memory = torch.full((len(given) + 192,), FENCE, dtype=torch.uint8, device=self.device)
        start, stop = ROOM + offset, ROOM + offset + len(given)
        memory[start:stop] = given.to(self.device)
        self._memory.append((memory, start, stop))
        kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
        return memory[start:stop].view(kind).view(array.shape)

    def remove_fences(self):
        fences, self._memory = [piece for m, start, stop in self._memory for piece in (m[:start], m[stop:])], []
        assert all(bool((piece == FENCE).all()) for piece in fences), "a kernel wrote outside of an array"
