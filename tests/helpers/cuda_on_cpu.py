"""Builds the CUDA kernels for the CPU with cuda_on_cpu.h, and launches them there."""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from bstack.kernels.cuda import KERNELS, Kernels, block_threads, source

FOLDER = Path(__file__).parent
# Elsewhere linkers do not name the ends of a section, which holds shared memory.
COMPILER = shutil.which("g++") if sys.platform == "linux" else None


def build(source):
    """Compile a program of kernels to a library, and load it; the test is skipped where there is no compiler."""
    if COMPILER is None:
        pytest.skip("there is no g++")
    names = " ".join(f"K({name})" for name in KERNELS)
    program = f'#include "{FOLDER / "cuda_on_cpu.h"}"\n{source}\n#define LIST(K) {names}\nEXPORT_KERNELS(LIST)\n'
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    with tempfile.TemporaryDirectory() as folder:
        file, library = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        file.write_text(program)
        done = subprocess.run([*command, file, "-o", library], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        loaded = ctypes.CDLL(str(library))
    loaded.last_fault.restype = ctypes.c_char_p
    return loaded


@cache
def launcher():
    """Return a launcher of the kernels as they are."""
    return Launcher(build(source()))


class Launcher:
    """Launches kernels of a library on the CPU."""

    device = torch.device("cpu")

    def __init__(self, library):
        self.library, self.backwards, self.launched = library, False, set()
        self.kernels = Kernels(self, multiprocessors=1)
        self._memory = []

    def __call__(self, name, grid, *arguments):
        values = [ctypes.c_longlong(value) if isinstance(value, int) else value for value in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = (ctypes.c_size_t * len(values))(*map(ctypes.sizeof, values))
        self.launched.add(name)
        given = addresses, sizes, ctypes.c_size_t(len(values))
        assert self.library.launch(name.encode(), *grid, block_threads(name), *given, int(self.backwards)) == 0, name
        if fault := self.library.last_fault().decode():
            raise AssertionError(f"{name}: {fault}")

    def fenced(self, array, offset=0):
        """Copy an array to a tensor between two fences, `offset` bytes behind a multiple of 64, kept until `remove_fences`."""
        memory = np.empty(array.nbytes + 192, np.uint8)
        self._memory.append(memory)
        start = -memory.ctypes.data % 64 + 64 + offset
        stop = start + array.nbytes
        memory[start:stop] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        for first, last in ((0, start), (stop, len(memory))):
            self.library.fence(ctypes.c_void_p(memory.ctypes.data + first), ctypes.c_size_t(last - first))
        return torch.from_numpy(memory[start:stop].view(array.dtype).reshape(array.shape))

    def remove_fences(self):
        self.library.remove_fences()
        self._memory.clear()
