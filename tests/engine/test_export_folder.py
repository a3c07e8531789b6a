"""``bstack export``: what transformers loads from the folder is what `bstack.load` gives, for every architecture and codec."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import in_process
import pytest
import tiny_models
import torch
import transformers

import bstack
import bstk
from bstack.engine.export import export_safetensors
from bstack.folders import check_free, new_folder
from bstack.settings import Settings

pytestmark = pytest.mark.slow

QUICK = {"samples": 2, "sequence_length": 16}
CODECS = {
    "spqr": Settings(codec="spqr", planes=1, **QUICK),
    "spqr, no outliers": Settings(codec="spqr", planes=1, outliers=0, **QUICK),
    "trellis": Settings(codec="trellis", planes=2, **QUICK),
    "sign": Settings(codec="sign", planes=2, rank=2, **QUICK),
}
# A plain one, tied weights, transposed ones, fused experts, stacked experts, a projection outside the layers.
CASES = [
    ("llama", "spqr"),
    ("llama-tied", "trellis"),
    ("gpt2", "spqr"),
    ("gpt2", "sign"),
    ("mixtral", "spqr"),
    ("gpt-oss", "trellis"),
    ("opt-projected", "spqr"),
    ("llama", "spqr, no outliers"),
]
IDS = torch.randint(3, tiny_models.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


def command(*arguments, cwd="."):
    return in_process.bstack(*arguments, cwd=cwd)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model = tiny_models.add_tokenizer(tiny_models.save("llama-tied", folder / "model"))
    bstack.compress(model, folder / "out.bstk", settings=CODECS["spqr"])
    return folder / "out.bstk"


def load_plainly(folder, dtype=None):
    """As somebody who has transformers alone; every parameter must be there and none too many."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()


@pytest.mark.parametrize(("name", "codec"), CASES)
def test_round_trip(name, codec, tmp_path):
    tiny_models.save(name, tmp_path / "model")
    bstack.compress(tmp_path / "model", tmp_path / "out.bstk", settings=CODECS[codec])
    with bstk.open(tmp_path / "out.bstk") as file:
        middle = (file.base.budget + file.complete.budget) // 2
        for budget in (None, middle):
            target = tmp_path / f"exported {budget}"
            # Small shards, so that layers are split over several files.
            done = export_safetensors(file, target, budget=budget, dtype=torch.float32, shard_bytes=30_000)
            assert "model.safetensors.index.json" in done.files and len(done.files) > 4
            exported, loaded = load_plainly(target), bstack.load(tmp_path / "out.bstk", budget=budget)[0]
            ours, theirs = loaded.state_dict(), exported.state_dict()
            assert ours.keys() == theirs.keys()
            for key in ours:
                assert torch.equal(ours[key], theirs[key]), key
            with torch.no_grad():
                assert torch.equal(exported(IDS).logits, loaded(IDS).logits)


def test_names_on_disk_are_those_of_the_checkpoints_that_others_know(tmp_path):
    tiny_models.save("mixtral", tmp_path / "model")
    bstack.compress(tmp_path / "model", tmp_path / "out.bstk", settings=CODECS["sign"])
    with bstk.open(tmp_path / "out.bstk") as file:
        export_safetensors(file, tmp_path / "exported")

    def shapes(folder):
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118

    assert shapes(tmp_path / "exported") == shapes(tmp_path / "model")


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_command(tiny, tmp_path, dtype, torch_dtype):
    done = command("export", tiny, "--to", "safetensors", "here", "--dtype", dtype, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "bstack.export/1" and report["output"] == "here" and report["dtype"] == dtype
    files = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert (
        files == report["files"]
        and "model.safetensors" in files
        and "config.json" in files
        and "tokenizer.json" in files
    )
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    model = load_plainly(tmp_path / "here")
    assert model.dtype == torch_dtype and model.config.dtype == torch_dtype
    assert (
        report["parameters"] == model.num_parameters()
        and report["weight_bytes"] == report["parameters"] * torch_dtype.itemsize
    )
    expected = bstack.load(tiny, dtype=torch_dtype)[0]
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "here")
    assert tokenizer("the river").input_ids == bstack.load(tiny)[1]("the river").input_ids


def test_without_bstack_installed(tiny, tmp_path):
    assert command("export", tiny, "--to", "safetensors", tmp_path / "out", "-q").returncode == 0
    script = """
import sys
sys.modules["bstack"] = sys.modules["bstk"] = None
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model(torch.arange(3, 9)[None]).logits.shape)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True)
    assert f"torch.Size([1, 6, {tiny_models.VOCABULARY}])" in done.stdout, done.stderr


def test_a_budget_and_one_that_is_too_small(tiny, tmp_path):
    with bstk.open(tiny) as file:
        smallest = file.base
    done = command(
        "export", tiny, "--to", "safetensors", tmp_path / "out", "--mb", smallest.budget / bstk.MB + 1e-6, "--json"
    )
    assert json.loads(done.stdout)["cut"]["chunks"] == smallest.chunks
    done = command("export", tiny, "--to", "safetensors", tmp_path / "no", "--mb", 0.001)
    assert done.returncode == 6 and not (tmp_path / "no").exists()


def test_where_something_is_already(tiny, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    # 2 where something is there, 1 where nothing can be made.
    for name, code, words in (
        ("full", 2, "is not empty: it holds mine.txt"),
        ("link", 2, "is not empty: it holds mine.txt"),
        ("file", 2, "is a file"),
        ("nowhere", 2, "is a broken link"),
        ("no/such", 1, "is not a folder"),
        ("file/under", 1, "is not a folder"),
        ("a" * 300, 1, "cannot write: "),
    ):
        kind = bstk.UsageError if code == 2 else bstk.OutputError
        with pytest.raises(kind) as refused:
            check_free(tmp_path / name)
        assert words in str(refused.value) and refused.value.exit_code == code
    for name, code in (("full", 2), ("no/such", 1)):
        done = command("export", tiny, "--to", "safetensors", tmp_path / name)
        assert done.returncode == code and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "link", "mine.txt", "nowhere"]
    (tmp_path / "empty").mkdir()
    assert command("export", tiny, "--to", "safetensors", tmp_path / "empty", "-q").returncode == 0
    assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_mode_that_umask_gives(tiny, tmp_path, mask):
    before = os.umask(mask)
    try:
        with bstk.open(tiny) as file:
            export_safetensors(file, tmp_path / "out", shard_bytes=30_000)
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(found) > 4 and set(found.values()) == {0o666 & ~mask}, found
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_it_appears_whole_or_not_at_all(tiny, tmp_path):
    class Stop(Exception):
        pass

    seen = []

    def progress(_done):
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(seen) == 3:
            raise Stop

    with bstk.open(tiny) as file, pytest.raises(Stop):
        export_safetensors(file, tmp_path / "out", progress=progress)
    assert all(len(names) == 1 and names[0].startswith(".out.") and names[0].endswith(".part") for names in seen)
    assert not list(tmp_path.iterdir())


def test_damage_leaves_nothing(tiny, tmp_path):
    data = bytearray(tiny.read_bytes())
    data[-5] ^= 1
    (tmp_path / "bad.bstk").write_bytes(data)
    done = command("export", tmp_path / "bad.bstk", "--to", "safetensors", tmp_path / "out")
    assert done.returncode == 5 and "SHA-256" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.bstk"]


def entry(name, kind, raw, **fields):
    frame = bstk.pack(raw)
    return bstk.Entry(
        name=name,
        kind=kind,
        raw_length=len(raw),
        stored_length=frame.stored_length,
        digest=frame.digest,
        stored=frame.stored,
        **fields,
    )


def rewritten(tiny, path, change):
    """The file with other chunks; `change` takes and returns a list of entries."""
    with bstk.open(tiny) as file:
        entries = [
            bstk.Entry(
                name=c.name,
                kind=c.kind,
                level=c.level,
                shape=c.shape,
                dtype=c.dtype,
                rank=c.rank,
                transposed=c.transposed,
                importance=c.importance,
                error=c.error,
                raw_length=c.raw_length,
                stored_length=c.stored_length,
                digest=c.digest,
                stored=file.source.read(c.offset, c.stored_length),
            )
            for c in file.chunks[: file.base_count]
        ]
    entries = change(entries)
    bstk.write(path, {}, entries, len(entries))
    return path


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "extra/more.safetensors", "0.part"]
)
def test_an_embedded_file_cannot_take_the_place_of_weights(tiny, tmp_path, name):
    bad = rewritten(tiny, tmp_path / "bad.bstk", lambda entries: [entry(name, bstk.FILE, b"{}"), *entries])
    with bstk.open(bad) as file, pytest.raises(bstk.DamagedError, match="beside its weights"):
        export_safetensors(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.bstk"]


def test_a_parameter_too_few_and_one_too_many(tiny, tmp_path):
    few = rewritten(tiny, tmp_path / "few.bstk", lambda entries: [e for e in entries if e.name != "model.norm.weight"])
    extra = entry("model.more.weight", bstk.TENSOR, bytes(8), shape=(2,), dtype="f32")
    many = rewritten(tiny, tmp_path / "many.bstk", lambda entries: [extra, *entries])
    for path, words in ((few, "lacks model.norm.weight"), (many, "holds model.more.weight")):
        with bstk.open(path) as file, pytest.raises(bstk.BstkError, match=words):
            export_safetensors(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_half_precision_cannot_hold(tiny, tmp_path):
    huge = entry("model.norm.weight", bstk.TENSOR, torch.full((48,), 1e6).numpy().tobytes(), shape=(48,), dtype="f32")
    path = rewritten(
        tiny, tmp_path / "huge.bstk", lambda entries: [huge if e.name == "model.norm.weight" else e for e in entries]
    )
    done = command("export", path, "--to", "safetensors", tmp_path / "out", "--dtype", "fp16")
    assert done.returncode == 2 and "Export as bf16 or fp32" in done.stderr and not (tmp_path / "out").exists()
    assert command("export", path, "--to", "safetensors", tmp_path / "out").returncode == 0


@pytest.mark.parametrize("name", ["é" * 121, "a" * 255, "日" * 85], ids=["two", "one", "three"])
def test_new_folder_with_a_long_name(tmp_path, name):
    with new_folder(tmp_path / name) as folder:
        (folder / "x").write_text("x")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name / "x").read_text() == "x"


def test_new_folder_behind_a_link_and_beside_a_rival(tmp_path):
    (tmp_path / "real").mkdir()
    if hasattr(os, "symlink"):
        os.symlink(tmp_path / "real", tmp_path / "link", target_is_directory=True)
        with new_folder(tmp_path / "link") as folder:
            (folder / "a").write_text("a")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "a"
    with pytest.raises(bstk.UsageError, match="is not empty"), new_folder(tmp_path / "rival") as folder:
        (tmp_path / "rival").mkdir()
        (tmp_path / "rival" / "theirs").write_text("b")
    assert (tmp_path / "rival" / "theirs").read_text() == "b" and not list(tmp_path.glob(".*"))
