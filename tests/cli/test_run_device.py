"""bstack run, chat and serve with --device: on the CPU with what a GPU would run, and where there is no GPU."""

import functools
import io
import json
import sys
from dataclasses import replace

import cuda_on_cpu
import in_process
import pytest
import tiny_models
import torch

import bstack as library
import bstk
from bstack.bench import speed
from bstack.bench.child import Cut, Measure
from bstack.engine.native import device
from bstack.kernels.native import instructions
from bstack.packed import backends
from bstack.packed.backends import CpuBackend, CudaBackend

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files of an architecture that the native engine knows, and of one that it does not."""
    folder = tmp_path_factory.mktemp("device")
    settings = library.Settings(codec="trellis", planes=2, samples=2, sequence_length=16)
    for name in ("llama", "gpt2"):
        source = tiny_models.add_tokenizer(tiny_models.save(name, folder / name))
        (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
        library.compress(source, folder / f"{name}.bstk", settings=settings)
    return folder


@pytest.fixture
def bstack(models):
    return functools.partial(in_process.bstack, cwd=models)


@pytest.fixture
def gpu(monkeypatch):
    """A device that computes on the CPU and has 65 MB free."""
    monkeypatch.setattr(backends, "device_of", lambda *_, **__: CPU)
    monkeypatch.setattr(device, "device_of", lambda *_, **__: CPU)
    made = cuda_on_cpu.launcher().kernels if cuda_on_cpu.COMPILER else None
    backend = (lambda _, count: CudaBackend(CPU, count, made)) if made else (lambda *_: CpuBackend())
    monkeypatch.setattr(device, "backend_of", backend)


RUN = ("run", "llama.bstk", "-p", "the river", "--max-new-tokens", 3)


def test_it_writes_the_text_of_the_cpu(bstack, gpu):
    on_gpu, on_cpu = bstack(*RUN, "--device", "cuda", "--mb", 100), bstack(*RUN, "--mb", 100)
    assert on_gpu.returncode == 0, on_gpu.stderr
    assert on_gpu.stdout == on_cpu.stdout and "The native engine runs it on cpu." in on_gpu.stderr


def test_the_default_is_what_the_gpu_has_free(bstack, gpu, models, monkeypatch):
    with bstk.open(models / "llama.bstk") as file:
        free = file.base.budget + 1000
    memory = backends.Memory(80 * bstk.MB + free, 2**30, "the memory of cuda:0")
    monkeypatch.setattr(backends, "device_memory", lambda *_: memory)
    done = bstack(*RUN, "--device", "cuda", "--json")
    assert done.returncode == 0 and "80 MB are free (the memory of cuda:0), 64 MB of them stay so" in done.stderr
    assert json.loads(done.stdout)["weight_bytes"] <= 2 * free  # 16 MB more are the step that stays free


def test_a_family_that_the_native_engine_does_not_know(bstack, monkeypatch):
    asked = []

    def refuse(file, *, device, **options):
        asked.append((device, options["mode"]))
        raise bstk.BstkError("far enough")

    monkeypatch.setattr(backends, "device_of", lambda *_, **__: CPU)
    monkeypatch.setattr(device, "device_of", lambda *_, **__: CPU)
    monkeypatch.setattr(device, "backend_of", lambda *_: CpuBackend())
    monkeypatch.setattr("bstack.engine.load.load", refuse)
    done = bstack("run", "gpt2.bstk", "-p", "the river", "--mb", 100, "--device", "cuda")
    assert "The transformers engine runs it on cpu: its architecture is 'gpt2'." in done.stderr
    assert done.returncode == 1 and asked == [("cuda", "packed")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command", [RUN, ("chat", "llama.bstk"), ("serve", "llama.bstk", "--port", 0), ("bench", "llama.bstk")]
)
def test_where_there_is_no_gpu(bstack, command):
    if command[0] == "serve":
        pytest.importorskip("uvicorn")
    done = bstack(*command, "--device", "cuda")
    assert done.returncode == 2 and "torch finds no cuda here" in done.stderr
    assert done.stderr.endswith("Use --device cpu, or leave it out.\n") and not done.stdout


def test_a_gpu_that_is_lost_ends_a_conversation(bstack, gpu, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(device.DeviceModel, "_attend", fail)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the river\nthe river\n"))
    done = bstack("chat", "llama.bstk", "--mb", 100, "--device", "cuda")
    assert done.returncode == 7 and done.stderr.count("cpu failed: CUDA error: unspecified launch failure.") == 1


def test_speed_is_measured_on_the_device(models, gpu, monkeypatch):
    """By the process of bench that measures a size."""
    monkeypatch.setattr(speed, "REPETITIONS", 2)
    monkeypatch.setattr(speed, "_lengths", lambda context: (20, 3))
    loaded = []
    monkeypatch.setattr(
        device.DeviceModel, "sequence", lambda self, own=device.DeviceModel.sequence: loaded.append(1) or own(self)
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000 if loaded else 300)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1500)
    request = Measure(Cut(str(models / "llama.bstk"), 2**20, None, False), run="packed", speed=True, device="cuda")
    on_cpu = in_process.measure(replace(request, device="cpu")).running
    assert on_cpu.speed.kernels == instructions() and not loaded
    running = in_process.measure(request).running
    assert running.speed.engine == "native" and running.speed.decode.value > 0
    assert (running.held_memory_bytes, running.peak_memory_bytes) == (700, 1200) and loaded
