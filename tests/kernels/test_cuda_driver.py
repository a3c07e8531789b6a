"""The CUDA kernels compiled by NVRTC, which needs no GPU, and what calls NVIDIA's packages."""
# ruff: noqa: E402 - the packages may be missing

import inspect
import io
import re

import pytest

pytest.importorskip("cuda.core", reason="cuda-core is not installed (pip install 'bstack[cuda]')")
nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
try:
    nvrtc.nvrtcVersion()
except Exception as error:
    pytest.skip(f"there is no NVRTC (nvidia-cuda-nvrtc): {error}", allow_module_level=True)

import numpy as np
import torch
from cuda.core import Device, LaunchConfig, ObjectCode, launch, system
from cuda.core._kernel_arg_handler import ParamHolder

import bstk
from bstack.folders import cache_folder
from bstack.kernels import cuda
from bstack.kernels.cuda import driver, selftest, step
from bstack.kernels.matrix import Matrix
from bstack.kernels.selftest import BLOCKS, random_payload

# The bounds of `__launch_bounds__`: registers that leave room for so many threads.
MOST = 65536 // cuda.THREADS


FULL = "sm_80"
OTHERS = ("sm_86", "sm_89", "sm_90", "sm_100")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [FULL, *(pytest.param(name, marks=pytest.mark.gpu) for name in OTHERS)])
def test_every_kernel_compiles(arch):
    log = io.StringIO()
    cubin = driver.compile_kernels(arch, log)
    text = log.getvalue()
    print(text)
    assert cubin[:4] == b"\x7fELF" and "warning" not in text
    found = re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers(.*?)\n", text, re.S)
    assert {name for name, *_ in found} == set(cuda.KERNELS)
    for name, spilled, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        # More than 48 KB must be asked for at the launch. A few bytes of a loop's bounds may be spilled.
        assert int(spilled) <= 64 and int(registers) <= 168 and (not shared or int(shared[1]) <= 48 * 1024), name


@pytest.mark.slow
@pytest.mark.parametrize("arch", OTHERS)
def test_every_kernel_compiles_to_machine_code(arch, monkeypatch):
    """With little optimisation, which takes a seventh of the time."""
    monkeypatch.setattr(driver, "OPTIONS", {**driver.OPTIONS, "ofast_compile": "max"})
    cubin = driver.compile_kernels(arch)
    assert cubin[:4] == b"\x7fELF" and all(f".text.{name}\0".encode() in cubin for name in cuda.KERNELS)


def test_an_architecture_that_is_not():
    with pytest.raises(bstk.BstkError, match=r"cannot be compiled for sm_10: .*'bstack\[cuda\]'"):
        driver.compile_kernels("sm_10")


def test_compiled_kernels_are_kept(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(driver, "compile_kernels", lambda arch: calls.append(arch) or b"cubin of " + arch.encode())
    folder = tmp_path / "cache"
    for arch, version in (("sm_80", (13, 0)), ("sm_90", (13, 0)), ("sm_90", (13, 1)), ("sm_80", (13, 0))):
        assert driver._compiled(arch, version, folder) == b"cubin of " + arch.encode()
    assert calls == ["sm_80", "sm_90", "sm_90"]
    assert len(list(folder.iterdir())) == 3
    (tmp_path / "file").write_text("")
    assert driver._compiled("sm_80", (13, 0), tmp_path / "file" / "cache") == b"cubin of sm_80"  # cannot be kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    with pytest.raises(bstk.BstkError, match="the driver of NVIDIA's GPUs finds no device 0"):
        driver.load(0, tmp_path)


def test_an_old_driver(tmp_path, monkeypatch):
    class Gpu:
        def __init__(self, index):
            pass

        def set_current(self):
            pass

    monkeypatch.setattr(driver, "Device", Gpu)
    monkeypatch.setattr(driver.system, "get_user_mode_driver_version", lambda: (12, 4))
    with pytest.raises(bstk.BstkError, match=r"runs CUDA 12, .* for CUDA 1\d.*cuda-core\[cu12\]"):
        driver.load(0, tmp_path)


def test_what_is_called_is_there(monkeypatch):
    """What a machine without a GPU can tell about the calls that need one."""
    assert [*inspect.signature(launch).parameters][:3] == ["stream", "config", "kernel"]
    assert callable(system.get_user_mode_driver_version)
    for of, names in (
        (Device, ("set_current", "arch", "name", "properties")),
        (ObjectCode, ("from_cubin", "get_kernel")),
    ):
        assert all(hasattr(of, name) for name in names)
    config = LaunchConfig(grid=(3, 2), block=cuda.THREADS)
    assert config.grid[:2] == (3, 2) and config.block[0] == cuda.THREADS
    packed = []

    def pack(name, grid, *arguments):
        packed.append(name)
        ParamHolder(arguments)  # raises TypeError for types that it does not know

    kernels = cuda.Kernels(pack, 1)
    kernels.rotate(torch.zeros(1, 2**14))
    assert packed == ["rotate", "butterfly"]
    between = step.Step(kernels, step.Heads(2, 1, 8, 8, 1, 1e-6, 1.0))
    rows = torch.zeros(1, 1, 8)
    texts = step.Texts(torch.zeros(1, 2, dtype=torch.int64), rows, rows)
    between.prepare(torch.zeros(1, 8))
    between.attend(torch.zeros(1, 32), texts, 0)
    between.activated(torch.zeros(1, 16), "silu")
    assert packed[2:] == ["prepare", "heads", "attend_4", "attended", "activated"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu():
    kernels = driver.load(0, cache_folder("cuda"))
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows, columns, tokens = (int(n) for n in rng.integers(1, (300, 3000, 12)))
        columns = columns if seed % 2 else -(-columns // 16) * 16
        forms = [form for name in rng.choice([*BLOCKS], 2) for form in BLOCKS[name]]
        blocks = [(kind, rank, random_payload(rng, rows, columns, kind, rank, rows)) for kind, rank in forms]
        x = rng.standard_normal((tokens, columns)).astype(np.float32)
        assert not selftest.difference(
            kernels, Matrix.of(rows, columns, blocks), x, lambda array: torch.from_numpy(array.copy()).cuda()
        ), (seed, rows, columns, forms)
        assert selftest.rotations_agree(kernels, x, lambda array: torch.from_numpy(array.copy()).cuda())
