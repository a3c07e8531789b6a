"""Compressing on a GPU, on a pretended GPU: nothing crosses to the CPU unasked, and what is missing is said in words."""

import architectures
import cuda_on_cpu
import pretend_device
import pytest
import tiny_models
import torch
from pretend_device import device_there

import bstack
import bstk
from bstack.cli import main
from bstack.codecs.trellis import TrellisCodec
from bstack.compression import device, stages
from bstack.compression.plan import plan
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton
from bstk.errors import Interrupted, ResourceError, UsageError


def further(name):
    return pytest.param(name, marks=pytest.mark.gpu)


QUICK = {"planes": 1, "samples": 2, "sequence_length": 16}
ON_DEVICE = bstack.Settings(**QUICK, device="cuda")
TINY = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 67}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save("llama", tmp_path_factory.mktemp("device") / "model", **TINY)


def quality(path):
    with bstk.open(path) as file:
        return [point["kld"] for point in file.metadata["quality"]]


@pytest.mark.gpu
def test_the_file_is_the_same_each_time_and_as_good_as_the_cpus(model, tmp_path, monkeypatch):
    bstack.compress(model, tmp_path / "cpu.bstk", settings=bstack.Settings(**QUICK))
    plans = []
    with device_there(monkeypatch, cuda_on_cpu.launcher().kernels):
        for name in ("one.bstk", "two.bstk"):
            bstack.compress(model, tmp_path / name, settings=ON_DEVICE, on_plan=plans.append)
    assert (tmp_path / "one.bstk").read_bytes() == (tmp_path / "two.bstk").read_bytes()
    assert quality(tmp_path / "one.bstk") == pytest.approx(quality(tmp_path / "cpu.bstk"), rel=0.2)
    assert 0 < plans[0].device_bytes <= plans[0].device_free_bytes == 24 * 2**30
    with bstk.open(tmp_path / "one.bstk") as file:
        assert file.metadata["settings"]["device"] == "cuda (Pretended)"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(model, tmp_path):
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    bstack.compress(model, tmp_path / "cpu.bstk", settings=bstack.Settings(**QUICK))
    for name in ("one.bstk", "two.bstk"):
        bstack.compress(model, tmp_path / name, settings=ON_DEVICE)
    assert (tmp_path / "one.bstk").read_bytes() == (tmp_path / "two.bstk").read_bytes()
    assert quality(tmp_path / "one.bstk") == pytest.approx(quality(tmp_path / "cpu.bstk"), rel=0.2)


def test_matrices_of_one_segment_have_the_blocks_of_the_cpu(monkeypatch):
    """Byte for byte, since the pretended GPU adds as the CPU: groups of columns, feedback, refits, errors."""
    generator = torch.Generator().manual_seed(0)
    for m, n in ((33, 70), (7, 5)):
        x = torch.randn(300, n, generator=generator) * torch.rand(n, generator=generator)
        task = torch.randn(m, n, generator=generator), x.t() @ x, 300, torch.rand(m, generator=generator)
        expected = list(TrellisCodec(3).encode(*task))
        with device_there(monkeypatch, cuda_on_cpu.launcher().kernels):
            workers = device.Device("cuda")
            on_device = [one.to(workers.device) if isinstance(one, torch.Tensor) else one for one in task]
            found = list(TrellisCodec(3).encode(*on_device))
        assert [block.payload for block in found] == [block.payload for block in expected]
        for one, two in zip(found, expected, strict=True):
            assert torch.equal(one.row_errors.cpu(), two.row_errors)


@pytest.mark.parametrize("changes", [{"order": "paper", "embeddings": "dense"}, {"exact": True}], ids=str)
def test_every_way_to_the_end(model, tmp_path, monkeypatch, changes):
    with device_there(monkeypatch):
        bstack.compress(model, tmp_path / "out.bstk", settings=ON_DEVICE.with_changes(**changes))
    with bstk.open(tmp_path / "out.bstk", strict=True) as file:
        assert file.metadata["quality"]


@pytest.mark.parametrize("name", [*map(further, ["llama-tied", "opt-projected", "gemma3", "mixtral"]), "gpt2"])
def test_architectures(name, tmp_path, monkeypatch):
    model = tiny_models.save(name, tmp_path / "model", **{"gpt2": {"n_layer": 1, "n_embd": 28}}.get(name, {}))
    with device_there(monkeypatch):
        bstack.compress(model, tmp_path / "out.bstk", settings=ON_DEVICE)
    bstack.compress(model, tmp_path / "cpu.bstk", settings=bstack.Settings(**QUICK))
    with bstk.open(tmp_path / "out.bstk") as one, bstk.open(tmp_path / "cpu.bstk") as two:
        shapes = [sorted((chunk.name, chunk.raw_length) for chunk in file.chunks) for file in (one, two)]
    assert shapes[0] == shapes[1]


def test_operations_on_both_places_are_refused():
    """The pretended GPU itself."""
    here, there = torch.ones(2), pretend_device.place(torch.ones(2))
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there.add_(here)):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError):
        there.numpy()
    assert (there + 1).device.type == "cuda" and (there + here.to(there)).cpu().tolist() == [2, 2]


def test_unfinished_work_of_the_cpu_is_not_mixed_in(model, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "compress_outside", stop)
        bstack.compress(model, tmp_path / "out.bstk", settings=bstack.Settings(**QUICK))
    with device_there(monkeypatch), pytest.raises(UsageError, match=r'device was "cpu", now "cuda \(Pretended\)"'):
        bstack.compress(model, tmp_path / "out.bstk", settings=ON_DEVICE)


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            ResourceError,
            r"cuda:0 is full: CUDA out of",
        ),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered\nmore"),
            Interrupted,
            r"lost: CUDA error: an",
        ),
    ],
)
def test_a_device_that_fails_midway(model, tmp_path, monkeypatch, error, kind, words):
    """The same command goes on afterwards."""
    output, search = tmp_path / "out.bstk", pretend_device.CpuSearch()
    calls = []

    def fail(*given, turn):
        calls.append(1)
        if len(calls) == 9:  # in the embeddings
            raise error
        return pretend_device.CpuSearch.encode_columns(search, *given, turn=turn)

    search.encode_columns = fail
    with device_there(monkeypatch, search):
        with pytest.raises(kind, match=words):
            bstack.compress(model, output, settings=ON_DEVICE)
        assert not output.exists() and (tmp_path / "out.bstk.work" / "layer-00000.json").exists()
        bstack.compress(model, output, settings=ON_DEVICE)
    assert len(calls) < 18 and output.exists()


def test_errors_of_other_kinds_stay_as_they_are(monkeypatch):
    with device_there(monkeypatch):
        for error in (RuntimeError("of another kind"), MemoryError(), bstk.UsageError("x"), KeyboardInterrupt()):
            with pytest.raises(type(error)) as caught, device.Device("cuda"):
                raise error
            assert caught.value is error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cuda": None}, "is built for the CPU alone"),
        ({"device_count": 0, "init": "The NVIDIA driver is too old"}, "no cuda:3 here: The NVIDIA driver is too old"),
        ({"device_count": 1}, "torch finds no cuda:3 here; it finds 1"),
        ({"device_count": 4}, "torch cannot use cuda:3 here: .*CUDA"),
    ],
)
def test_no_gpu(model, tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(torch.version, "cuda", changes.get("cuda", "13.0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: changes.get("device_count"))

    def init():
        if "init" in changes:
            raise RuntimeError(changes["init"])

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(bstk.BstkError, match=words):
        bstack.compress(model, tmp_path / "out.bstk", settings=ON_DEVICE.with_changes(device="cuda:3"))
    assert not list(tmp_path.iterdir())


def test_the_command(model, tmp_path, monkeypatch, capsys):
    def run(*options):
        with pytest.raises(SystemExit) as caught:
            main.main(["compress", str(model), "-o", str(tmp_path / "out.bstk"), *options])
        return caught.value.code, capsys.readouterr().err

    code, said = run("--device", "gpu")
    assert code == 2 and "device is 'gpu'; allowed are cpu, cuda and cuda:N" in said
    monkeypatch.setattr(torch.version, "cuda", None)
    code, said = run("--device", "cuda")
    assert code == 2 and "Use --device cpu" in said
    with device_there(monkeypatch):
        options = ("--planes", "1", "--samples", "2", "--sequence-length", "16", "--device", "cuda")
        code, said = run(*options)
    assert code == 0 and "Of the GPU's memory: about" in said


def test_a_device_that_fails_at_the_start(monkeypatch):
    def fail(index):
        raise RuntimeError("CUDA error: out of memory")

    with device_there(monkeypatch):
        monkeypatch.setattr(device, "_kernels", fail)
        with pytest.raises(ResourceError, match="cuda:0 is full"):
            device.Device("cuda")


def test_no_compiler(model, tmp_path, monkeypatch):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bstk.BstkError, match=r"pip install 'bstack\[compress,cuda\]'"):
        device._kernels(0)


def test_what_does_not_go_together(model, tmp_path, monkeypatch):
    with device_there(monkeypatch):
        for codec in ("sign", "spqr"):
            with pytest.raises(UsageError, match=f"the codec {codec}; the trellis codec alone"):
                bstack.compress(model, tmp_path / "out.bstk", settings=bstack.Settings(codec=codec, device="cuda"))
        with pytest.raises(UsageError, match="dask"):
            bstack.compress(model, tmp_path / "out.bstk", settings=ON_DEVICE, dask="tcp://127.0.0.1:1")


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Llama 3.1 8B, of which nothing is loaded."""
    folder = tmp_path_factory.mktemp("large") / "model"
    checkpoint = open_checkpoint(tiny_models.save("llama", folder, **TINY))
    for name, value in LLAMA_8B.items():
        setattr(checkpoint.config, name, value)
    checkpoint.config.head_dim = 128
    checkpoint.bind = lambda model: None
    return Skeleton(checkpoint)


def test_a_model_whose_layers_have_settings_of_their_own(tmp_path, monkeypatch):
    architectures.make(architectures.tiny_config("gemma4_text")).save_pretrained(tmp_path)
    with device_there(monkeypatch):
        found = plan(Skeleton(open_checkpoint(tmp_path)), ON_DEVICE, device.Device("cuda"))
    assert 0 < found.device_bytes <= found.device_free_bytes


@pytest.mark.parametrize(
    ("free", "changes", "words"),
    [
        (23.5, {}, None),
        (14, {"calibration": "text.txt"}, None),
        (
            14,
            {},
            r"has 14.0 GiB of free memory; compressing model takes about \d\d.\d GiB .* With a calibration text it takes",
        ),
        (14, {"samples": 2048, "calibration": "text.txt"}, r"With samples of (256|512) it takes about 1\d.\d GiB"),
        (14, {"samples": 2048}, r"With a calibration text and samples of"),
        (3, {}, "Compress on the CPU"),
    ],
)
def test_an_8b_model_fits_24_gb_and_what_fits_less_is_said(large, monkeypatch, free, changes, words):
    with device_there(monkeypatch, free=int(free * 2**30)):
        workers = device.Device("cuda")
        settings = bstack.Settings(device="cuda", **changes)
        if words is None:
            assert plan(large, settings, workers).device_bytes <= free * 2**30
        else:
            with pytest.raises(ResourceError, match=words):
                plan(large, settings, workers)
