"""Compiles the CUDA kernels for a GPU, keeps them, and launches them. Import it only where cuda-core is installed.

NVIDIA's cuda-core finds the driver and NVRTC, checks every call and packs arguments. With cuda-bindings alone, which it stands
on, all of that would be written here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TextIO

import torch
from cuda.bindings import nvrtc
from cuda.core import Device, LaunchConfig, ObjectCode, Program, ProgramOptions, launch, system

from bstack.errors import one_line
from bstack.kernels.cuda import KERNELS, Kernels, block_threads, selftest, source
from bstk.atomic import replacing
from bstk.errors import BstkError, OutputError, ResourceError

__all__ = ["compile_kernels", "load"]

OPTIONS = {"std": "c++17"}


def compile_kernels(arch: str, log: TextIO | None = None) -> bytes:
    """Compile all kernels for an architecture, such as ``sm_90``; neither a GPU nor a driver is needed.

    Parameters
    ----------
    arch : str
    log : text stream, optional
        Where the compiler writes the registers and the shared memory of each kernel.

    Returns
    -------
    bytes
        A cubin: machine code, which drivers of the same CUDA version or a newer one load, whatever their minor version.

    Raises
    ------
    BstkError
        NVRTC is missing, does not know the architecture, or refuses the sources.
    """
    options = ProgramOptions(arch=arch, ptxas_options="-v" if log else None, **OPTIONS)
    try:
        program = Program(source(), "c++", options)
        return bytes(program.compile("cubin", logs=log).code)
    except Exception as error:  # of several classes, some of them private
        raise BstkError(
            f"the GPU kernels cannot be compiled for {arch}: {one_line(error)}",
            hint="The package nvidia-cuda-nvrtc must be as new as the GPU: pip install --upgrade 'bstack[cuda]'. That of CUDA 13 "
            "knows no GPU before compute capability 7.5; for these there is pip install 'cuda-core[cu12]'.",
        ) from None


def load(index: int, cache: Path) -> Kernels:
    """Return the kernels of a GPU, compiled now or found in a folder, after a test of each kind of block.

    Parameters
    ----------
    index : int
        Of the device, as torch counts.
    cache : Path
        A folder for compiled kernels, which may be missing.

    Raises
    ------
    BstkError
        There is no such GPU, its driver is too old for NVRTC, or the kernels cannot be compiled or are wrong on it.
    """
    try:
        runs = system.get_user_mode_driver_version()
        device = Device(index)
        device.set_current()
    except Exception as error:  # of several classes, some of them private
        raise BstkError(
            f"the driver of NVIDIA's GPUs finds no device {index}: {one_line(error)}",
            hint="nvidia-smi shows what it finds.",
        ) from None
    version = _compiler()
    if runs[0] < version[0]:
        raise BstkError(
            f"the GPU's driver runs CUDA {runs[0]}, but the kernels are compiled by NVRTC for CUDA {version[0]}.",
            hint=f"Update the driver, or install the packages of its version: pip install 'cuda-core[cu{runs[0]}]'",
        )
    try:
        module = ObjectCode.from_cubin(_compiled(f"sm_{device.arch}", version, cache))
        functions = {name: module.get_kernel(name) for name in KERNELS}
    except BstkError:
        raise
    except Exception as error:
        raise BstkError(
            f"the driver of {device.name} does not load the GPU kernels: {one_line(error)}",
            hint=f"Update it, or delete {cache} to compile them anew.",
        ) from None

    def run(name: str, grid: tuple[int, int], *arguments: Any) -> None:
        with torch.cuda.device(index):
            Device(index).set_current()  # a thread that torch has not used yet has no context
            launch(_Stream(index), LaunchConfig(grid=grid, block=block_threads(name)), functions[name], *arguments)

    kernels = Kernels(run, device.properties.multiprocessor_count)
    if failed := selftest.failure(kernels, torch.device("cuda", index)):
        raise BstkError(
            f"the GPU kernels failed their self-test on {device.name}: {failed} differs from the reference.",
            hint="Please report it with the driver's version. Without the package cuda-core the kernels in Triton run.",
        )
    return kernels


def _compiler() -> tuple[int, int]:
    """Return the version of NVRTC."""
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:
        raise BstkError(
            f"NVRTC, which compiles the GPU kernels, cannot be loaded: {one_line(error)}",
            hint="Install it: pip install 'bstack[cuda]'",
        ) from None
    return major, minor


def _compiled(arch: str, version: tuple[int, int], cache: Path) -> bytes:
    """Return the kernels from the cache folder, or compile them and put them there."""
    digest = hashlib.sha256(repr((source(), arch, version, OPTIONS)).encode()).hexdigest()
    file = cache / f"{digest[:32]}.{arch}.cubin"
    try:
        return file.read_bytes()
    except OSError:
        cubin = compile_kernels(arch)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(file) as (sink, _):
            sink.write(cubin)
    except (OSError, OutputError, ResourceError):
        pass  # the next process compiles again
    return cubin


class _Stream:
    """Torch's current stream on a device, as cuda-core takes it."""

    def __init__(self, index: int):
        self._handle = torch.cuda.current_stream(index).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle
