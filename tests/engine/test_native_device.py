"""The native engine for a GPU: in torch on the CPU, and with the kernels in CUDA run on the CPU."""

import cuda_on_cpu
import numpy as np
import pytest
import tiny_models
import torch
from native_models import IDS, MODELS, close, expected

import bstack
import bstk
from bstack.engine.native import device as native_device
from bstack.engine.native import load
from bstack.packed import backends
from bstack.packed.backends import CpuBackend, CudaBackend

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="there is no g++")


@pytest.fixture
def on(monkeypatch):
    """Load a model as if for a GPU: with products of the CPU, or with the kernels of the GPU run on it."""
    monkeypatch.setattr(native_device, "device_of", lambda *_, **__: CPU)

    def get(path, kernels, **options):
        if kernels == "cuda":
            made = cuda_on_cpu.launcher().kernels
            monkeypatch.setattr(native_device, "backend_of", lambda device, count: CudaBackend(CPU, count, made))
        else:
            monkeypatch.setattr(native_device, "backend_of", lambda *_: CpuBackend())
        return load.load(path, device="cuda", **options)[0]

    return get


FAST = {"llama", "qwen3", "mixtral", "qwen3-moe", "smollm3", "olmo2", "gemma2", "gemma3", "phi3"}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_logits_are_those_of_transformers(name, on, native_file):
    """Prompts in pieces, and token by token."""
    path = native_file(name)
    model = on(path, "cpu")
    assert model._step_kernels is None
    model.piece = 40
    text = model.sequence()
    found = [model.read(text, IDS[:70], every=True), *(model.step([text], [token]) for token in IDS[70:])]
    assert text.length == 90 and close(np.concatenate(found), expected(path, IDS), 2e-2)


# One with windows, one of norms over all heads and after the layers, one that caps and has other activations, one of fused
# projections and a partial rotation, one with biases everywhere.
STEPS = ["qwen2", "olmo2", "gemma2", "phi3", "llama-tied"]


@needs_compiler
@pytest.mark.parametrize("name", STEPS)
def test_steps_with_the_kernels_of_a_gpu(name, on, native_file):
    """Three texts in a step of four, of several pages, beside one that is read meanwhile."""
    path = native_file(name)
    model = on(path, "cuda")
    assert model._step_kernels is not None
    texts = [model.sequence() for _ in range(3)]
    prompts = [IDS[:1], IDS[:63], IDS[:20]]
    for text, prompt in zip(texts, prompts, strict=True):
        model.read(text, prompt)
    found = []
    for turn in range(2):
        tokens = [IDS[len(prompt) + turn] for prompt in prompts]
        found.append(model.step(texts, tokens))
        if not turn:
            model.read(model.sequence(), IDS[:9])
    found.append(model.step(texts[1:2], IDS[65:66]))
    wanted = expected(path, IDS[:66])
    places = [[1, 63, 20], [2, 64, 21], [65]]
    assert all(close(ours, wanted[place], 2e-2) for ours, place in zip(found, places, strict=True))
    assert model.step(texts[:1], [5]).shape == (1, 211) and [text.length for text in texts] == [4, 66, 22]
