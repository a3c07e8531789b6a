"""The native engine for a GPU: in torch on the CPU, and with the kernels in CUDA run on the CPU."""

import warnings

import cuda_on_cpu
import numpy as np
import pretend_graph
import pytest
import tiny_models
import torch
from native_models import IDS, MODELS, close, expected

import bstack
import bstk
from bstack.engine import load as engine_load
from bstack.engine.native import device as native_device
from bstack.engine.native import load
from bstack.packed import backends
from bstack.packed.backends import CpuBackend, CudaBackend

CPU = torch.device("cpu")


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


FAST = {"llama", "mixtral", "gemma2", "phi3"}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.gpu) for n in MODELS])
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
# projections and a partial rotation, one with biases everywhere, one with experts and a packed router.
STEPS = ["qwen2", "olmo2", "gemma2", "phi3", "llama-tied", "qwen3-moe"]


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.gpu) for n in STEPS])
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


def test_texts_share_pages_and_go_back(on, native_file):
    path = native_file("gemma3")
    model = on(path, "cpu")
    first, second = model.sequence(), model.sequence()
    model.read(first, IDS[:70])
    second.adopt(IDS[:64], first.share(0, 64))
    assert close(model.read(second, IDS[64:80])[None], expected(path, IDS[:80])[79:], 2e-2)
    assert first.keep([*IDS[:30], 7, 8]) == 30
    assert close(model.read(first, IDS[30:40])[None], expected(path, IDS[:40])[39:], 2e-2)
    with pytest.raises(ValueError, match="at most 128"):
        model.read(first, IDS)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 1}, {"tie_word_embeddings": True}])
def test_matrices_that_stay_plain(changes, on, tmp_path):
    source = tiny_models.save("llama", tmp_path / "model", dtype=torch.bfloat16, **changes)
    kept = {"embeddings": "dense"} if "tie_word_embeddings" in changes else {}
    settings = bstack.Settings(codec="trellis", planes=2, samples=2, sequence_length=16, **kept)
    bstack.compress(source, tmp_path / "m.bstk", settings=settings)
    wanted = expected(tmp_path / "m.bstk", IDS[:21])
    for kernels in ("cpu", *(["cuda"] if cuda_on_cpu.COMPILER else [])):
        model = on(tmp_path / "m.bstk", kernels)
        text = model.sequence()
        model.read(text, IDS[:20])
        assert close(model.step([text], IDS[20:21]), wanted[20:], 2e-2)


@pytest.mark.skipif(not cuda_on_cpu.COMPILER, reason="there is no compiler")
def test_a_mixture_of_experts_without_any(on, tmp_path):
    source = tiny_models.save("qwen3-moe", tmp_path / "model", mlp_only_layers=[0], num_hidden_layers=1)
    settings = bstack.Settings(codec="trellis", planes=1, samples=2, sequence_length=16)
    bstack.compress(source, tmp_path / "m.bstk", settings=settings)
    model = on(tmp_path / "m.bstk", "cuda")
    assert model.architecture.experts is not None
    text = model.sequence()
    model.read(text, IDS[:9])
    assert close(model.step([text], IDS[9:10]), expected(tmp_path / "m.bstk", IDS[:10])[9:], 2e-2)


@pytest.fixture
def graphs(monkeypatch):
    """Let steps be recorded on the CPU, and note the recordings."""
    made, first = [], native_device._Inputs.__init__

    def as_on_a_gpu(self, *arguments):
        first(self, *arguments)
        self._recorded = False

    monkeypatch.setattr(native_device._Inputs, "__init__", as_on_a_gpu)
    monkeypatch.setattr(native_device, "record", pretend_graph.recorder(made, cuda_on_cpu.launcher()))
    return made


@pytest.mark.parametrize("name", ["mixtral", pytest.param("phi3", marks=pytest.mark.gpu)])
def test_a_recorded_step_is_right_for_other_texts_and_other_sizes(name, on, native_file, graphs):
    """Recorded once for each number of texts; whatever else a step did would be missing."""
    path = native_file(name)
    model = on(path, "cuda")
    with bstk.open(path) as file:
        small = (file.base.budget + 1) / bstk.MB
    texts = [model.sequence() for _ in range(2)]
    for text in texts:
        model.read(text, IDS[:62])
    model.step(texts, IDS[62:63] * 2)
    found = model.step(texts, IDS[63:64] * 2)
    assert close(found, expected(path, IDS[:64])[[63, 63]], 2e-2)
    bstack.resize(model, small)
    fresh = [model.sequence() for _ in range(2)]
    model.read(fresh[0], IDS[:30])
    model.read(fresh[1], IDS[:3])
    found = model.step(fresh, [IDS[30], IDS[3]])
    assert close(found, expected(path, IDS[:31], mb=small)[[30, 3]], 2e-2)
    assert len(graphs) == 1 and graphs[0].replays == 3


def test_a_step_is_recorded_for_kinds_of_blocks_that_come_later(on, tmp_path, graphs):
    path = tmp_path / "m.bstk"
    settings = bstack.Settings(codec="spqr", outliers=0.05, planes=1, samples=2, sequence_length=16)
    bstack.compress(tiny_models.save("qwen3", tmp_path / "model"), path, settings=settings)
    with bstk.open(path) as file:
        small = (file.base.budget + 1) / bstk.MB
    model = on(path, "cuda", mb=small)
    for mb in (small, None):
        bstack.resize(model, mb)
        matrices = model.bstack_store._matrices.values()
        lacking = any(matrix.kinds.difference(matrix.kind[: matrix.count]) for matrix in matrices)
        assert lacking == (mb is not None)
        text = model.sequence()
        model.read(text, IDS[:12])
        assert close(model.step([text], IDS[12:13]), expected(path, IDS[:13], **({"mb": mb} if mb else {}))[12:], 2e-2)
    assert [graph.replays for graph in graphs] == [2]


def test_a_step_that_cannot_be_recorded_runs_launch_by_launch(monkeypatch):
    rows = [np.zeros((1, 1, 4), np.float32)] * 2
    inputs = native_device._Inputs(rows, CPU)
    inputs._recorded = False
    monkeypatch.setattr(native_device, "record", lambda *_: raise_(RuntimeError("operation not permitted")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.warns(bstack.errors.SlowerWarning, match="cannot be recorded .operation not permitted"):
        assert inputs.run(lambda: torch.ones(1)) == 1
    assert inputs.run(lambda: torch.ones(1) * 2) == 2


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
            bstk.ResourceError,
            "no memory left",
        ),
        (RuntimeError("CUDA error: out of memory\nmore"), bstk.ResourceError, "no memory left"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), bstk.ResourceError, "no memory left"),
        (
            RuntimeError("CUDA error: unspecified launch failure\nmore"),
            bstack.errors.DeviceError,
            "cpu failed: CUDA error",
        ),
        (type("CUDAError", (Exception,), {"__module__": "cuda.core"})("ILLEGAL"), bstack.errors.DeviceError, "ILLEGAL"),
        (RuntimeError("something else"), RuntimeError, "something else"),
    ],
)
def test_a_device_that_fails_midway(error, kind, words, on, native_file, monkeypatch):
    model = on(native_file("llama"), "cpu")
    text = model.sequence()
    model.read(text, IDS[:4])
    monkeypatch.setattr(model, "_attend", lambda *_: raise_(error))
    for call in (lambda: model.step([text], [5]), lambda: model.read(text, [5, 6])):
        with pytest.raises(kind, match=words) as found:
            call()
        assert type(found.value) is kind and getattr(found.value, "exit_code", 7) == 7


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            bstk.ResourceError,
            "no memory left for this model: .*weights less.$",
        ),
        (
            RuntimeError("CUDA error: device lost"),
            bstack.errors.DeviceError,
            "failed: CUDA error: device lost.*nvidia-smi",
        ),
    ],
)
def test_a_device_that_fails_while_a_model_is_loaded(error, kind, words, on, native_file, monkeypatch):
    path = native_file("llama")
    monkeypatch.setattr(native_device.DeviceModel, "sequence", lambda self: raise_(error))
    with pytest.raises(kind, match=words):
        on(path, "cpu")
    monkeypatch.setattr(engine_load, "attach", lambda *_, **__: raise_(error))
    with pytest.raises(kind, match=words):
        bstack.load(path, mode="packed")


def test_too_little_memory_says_what_fits(on, native_file, monkeypatch):
    """Before anything is read; the margin stays free."""
    path = native_file("llama")
    with bstk.open(path) as file:
        least = file.base.memory_bytes
    free = 64 * bstk.MB + least
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
    for module in (native_device, engine_load):
        monkeypatch.setattr(module, "device_of", lambda *_, **__: torch.device("cuda", 0))
        monkeypatch.setattr(module, "backend_of", lambda *_: raise_(AssertionError))
    assert backends.device_memory(torch.device("cuda", 0)).free == free
    fits = f"too much for cuda:0: 64 MB of 1,024 MB are free, of which 64 MB are for what runs: at most {least * 100 // bstk.MB / 100:.2f} MB"
    with pytest.raises(bstk.ResourceError, match=fits):
        load.load(path, device="cuda")
    with pytest.raises(bstk.ResourceError, match=fits):
        bstack.load(path, mode="packed", device="cuda")
    free -= 1
    with pytest.raises(bstk.ResourceError, match="not even the smallest size fits"):
        load.load(path, device="cuda")
    monkeypatch.setattr(backends.torch, "empty", lambda *_, **__: raise_(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(bstk.ResourceError, match="cuda:0 has no memory left for this slab of 100 bytes of blocks"):
        backends.DeviceMemory(100, torch.device("cuda", 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "mixtral"])
def test_on_a_gpu(name, native_file):
    """Prompts in bfloat16 move logits by some hundredths; steps are recorded, and right after a change of the size."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    path = native_file(name)
    with bstk.open(path) as file:
        small = (file.base.budget + 1) / bstk.MB
    with warnings.catch_warnings(action="error", category=bstack.errors.SlowerWarning):
        model, _ = load.load(path, device="cuda")
        for mb in (None, small, None):
            bstack.resize(model, mb)
            texts = [model.sequence() for _ in range(3)]
            for text, length in zip(texts, (1, 63, 20), strict=True):
                model.read(text, IDS[:length])
            found = [model.step(texts, [IDS[1 + turn], IDS[63 + turn], IDS[20 + turn]]) for turn in range(3)]
            wanted = expected(path, IDS[:66], **({"mb": mb} if mb else {}))
            for turn, logits in enumerate(found):
                assert close(logits, wanted[[1 + turn, 63 + turn, 20 + turn]], 0.2)
    graphs = [inputs._graph for inputs in model._inputs.values()]
    assert graphs and None not in graphs
