"""Packed weights on a GPU, or with its kernels run on the CPU, which is too slow for a whole model."""

import importlib.util
import sys
from types import SimpleNamespace

import cuda_on_cpu
import pytest
import torch
from torch.nn import functional

import bstack
import bstk
from bstack.codecs.spqr import SpqrCodec
from bstack.codecs.trellis import TrellisCodec
from bstack.folders import cache_folder
from bstack.packed import backends
from bstack.packed.backends import CudaBackend, device_of
from bstack.packed.lock import PriorityLock
from bstack.packed.weight import PackedWeight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    """Those in CUDA on a GPU, or compiled for the CPU; those in Triton on a GPU, or interpreted."""
    if request.param == "triton":
        pytest.importorskip("triton", "3.6")
        return importlib.import_module("bstack.kernels.device")
    if DEVICE.type == "cuda":
        pytest.importorskip("cuda.core", reason="cuda-core is not installed")
        return importlib.import_module("bstack.kernels.cuda.driver").load(0, cache_folder("cuda"))
    return cuda_on_cpu.launcher().kernels


@pytest.mark.parametrize(
    "codec",
    [TrellisCodec(2), SpqrCodec(3, outliers=0.05, planes=1), SpqrCodec(3, outliers=0, planes=1)],
    ids=["trellis", "spqr", "spqr, no outliers"],
)
def test_a_parameter(codec, kernels):
    """Blocks in the device's arena, products of few and many tokens, an embedding, a shallower stack."""
    weight = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    blocks = list(codec.encode(weight, torch.eye(32) * 100, 100, torch.ones(20)))
    backend = CudaBackend(DEVICE, 1, kernels)
    matrix, arena = backend.matrix(20, 32), backend.arena()
    for level, block in enumerate(blocks):
        allocation = arena.reserve(len(block.payload))
        allocation.write(block.payload)
        matrix.put(level, block.kind.code, block.rank, allocation.address, checked=True)
    packed = PackedWeight(backend.packed([matrix], PriorityLock()), False, torch.float32, "w", DEVICE)
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for count in range(1, len(blocks) + 1):
        matrix.count = count
        payloads = [b.payload for b in blocks[:count]]
        dense = codec.rebuild(
            payloads, [b.kind for b in blocks[:count]], [b.rank for b in blocks[:count]], (20, 32)
        ).to(DEVICE)
        for tokens in (2, 10):
            assert torch.allclose(functional.linear(x[:tokens], packed), x[:tokens] @ dense.t(), atol=1e-4)
        ids = torch.tensor([[3, 19, 3]], device=DEVICE)
        assert torch.allclose(functional.embedding(ids, packed), dense[ids], atol=1e-5)
    arena.pop(len(blocks))
    assert not arena._slabs


def test_a_parameter_in_parts(kernels):
    """As an embedding or a head: products and rows of both parts, and the dense weights."""
    codec, backend = TrellisCodec(1), CudaBackend(DEVICE, 2, kernels)
    arena, matrices, dense = backend.arena(), [], []
    for rows in (12, 7):
        weight = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows))
        block = next(codec.encode(weight, torch.eye(32) * 100, 100, torch.ones(rows)))
        allocation = arena.reserve(len(block.payload))
        allocation.write(block.payload)
        matrices.append(backend.matrix(rows, 32))
        matrices[-1].put(0, block.kind.code, block.rank, allocation.address)
        matrices[-1].count = 1
        dense.append(codec.rebuild([block.payload], [block.kind], [block.rank], (rows, 32)))
    dense = torch.cat(dense).to(DEVICE)
    packed = backend.packed(matrices, PriorityLock())
    for tokens in (1, 10):
        x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        assert torch.allclose(packed.multiply(x), x @ dense.t(), atol=1e-4)
    for ids in ([[3, 18, 12, 11, 3]], [[14]], [[]]):
        ids = torch.tensor(ids, dtype=torch.int64, device=DEVICE)
        assert torch.allclose(packed.lookup(ids, torch.float32), dense[ids], atol=1e-5)
    assert torch.allclose(packed.dense(), dense, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "words"),
    [("quantum", "allowed are cpu"), ("mps", "cpu and cuda, not on mps"), ("cuda:99", "torch finds no cuda:99")],
)
def test_devices_that_are_not(device, words):
    with pytest.raises(bstk.UsageError, match=words):
        device_of(device, packed=True)


@pytest.mark.parametrize("mode", ["dense", "packed"])
@pytest.mark.parametrize(
    ("device", "words"),
    [("quantum", "allowed are cpu"), (3.5, "allowed are cpu"), ("cuda:99", "torch finds no cuda:99"), ("xla", "xla")],
)
def test_a_device_is_looked_at_before_the_file_is(device, words, mode, tmp_path):
    with pytest.raises(bstk.UsageError, match=words):
        bstack.load(tmp_path / "none.bstk", device=device, mode=mode)


@pytest.mark.parametrize(
    ("packages", "words"),
    [([], "the packages of neither are installed"), (["cuda", "cuda.core"], "cuda-core cannot be imported")],
)
def test_packages_that_are_not(packages, words, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
    for module in ("bstack.kernels.device", "bstack.kernels.cuda.driver"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(bstk.BstkError, match=rf"{words}.* 'bstack\[cuda\]'"):
        backends.device_kernels.__wrapped__(0)


def test_prompts_are_computed_in_bfloat16_where_a_device_has_it(monkeypatch):
    assert backends.activation_type(torch.device("cpu")) == torch.float32
    for there, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, there=there: there)
        assert backends.activation_type(torch.device("cuda", 0)) == dtype


def test_cuda_is_taken_before_triton(monkeypatch):
    loaded = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    fake = SimpleNamespace(load=lambda index, cache: loaded.append((index, cache.name)) or "kernels")
    monkeypatch.setitem(sys.modules, "bstack.kernels.cuda.driver", fake)
    assert backends.device_kernels.__wrapped__(1) == "kernels"
    assert loaded == [(1, "cuda")]


@pytest.mark.parametrize(
    ("cuda", "init", "count", "words"),
    [
        (None, None, 0, "no cuda:1 here: torch .* is built for the CPU alone. Install a build"),
        ("13.0", RuntimeError("Found no NVIDIA driver on your system."), 0, "no cuda:1 here: Found no NVIDIA driver"),
        ("13.0", RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."), 0, "too old"),
        ("13.0", None, 1, "no cuda:1 here; it finds 1 CUDA"),
    ],
)
def test_why_there_is_no_gpu(cuda, init, count, words, monkeypatch):
    def begin():
        if init:
            raise init

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", begin)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(bstk.UsageError, match=words) as found:
        device_of("cuda:1", packed=True)
    assert found.value.option == "device"
