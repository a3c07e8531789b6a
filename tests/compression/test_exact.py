"""An exact file gives back the original's files of weights byte for byte, and is cut as every other."""

import hashlib
import json
import re
from pathlib import Path

import in_process
import pytest
import safetensors.torch
import tiny_gguf
import tiny_models
import torch
from rewriting import rewritten
from transformers import AutoModelForCausalLM

import bstack
import bstk
from bstack.codecs import make_codec
from bstack.compression.exact import check_exact
from bstack.engine.exact import write_originals
from bstack.engine.export import export_safetensors
from bstack.errors import UnsupportedModelError
from bstack.models.open import open_checkpoint
from bstack.models.original import OriginalFile, StoredTensor, View
from bstack.models.skeleton import Skeleton
from bstack.settings import Settings
from bstk import metadata
from bstk.errors import DamagedError, UsageError

VECTORS = Path(__file__).parents[2] / "format" / "vectors"
SETTINGS = {"exact": True, "samples": 2, "sequence_length": 16, "tokenizer": False, "planes": 2}


def compress(model, out, **changes):
    return bstack.compress(model, out, settings=Settings(**{**SETTINGS, **changes}))


def digests(folder):
    files = sorted(path for path in folder.iterdir() if ".safetensors" in path.name)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def exported(file, folder, **options):
    with bstk.open(file, warn=False) as reader:
        return export_safetensors(reader, folder, **options)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder with a tied Llama in bfloat16, in several files, with values that are unusual; and its exact file."""
    folder = tmp_path_factory.mktemp("exact") / "model"
    tiny_models.save("llama-tied", folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    up = weights["model.layers.0.mlp.up_proj.weight"].view(torch.int16).view(-1)
    up[:6] = torch.tensor([-0x8000, 0, 1, -0x7FFF, 0x7F, 0x4700], dtype=torch.int16)  # -0, 0, subnormal numbers, 32768
    weights["model.layers.1.mlp.down_proj.weight"][3] = 0
    weights["model.layers.1.input_layernorm.weight"][0] = -0.0
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # stored twice
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-{1 + number % 3:05d}-of-00003.safetensors" for number, name in enumerate(names)}
    for shard in sorted(set(places.values())):
        part = {name: weights[name] for name in names if places[name] == shard}
        safetensors.torch.save_file(part, folder / shard, metadata={"format": "pt", "about": shard})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    compress(folder, folder.parent / "model.bstk")
    return folder


def test_the_files_of_weights_come_back(sharded, tmp_path):
    done = exported(sharded.parent / "model.bstk", tmp_path / "out")
    assert done.exact
    assert done.dtype == torch.bfloat16
    assert digests(tmp_path / "out") == digests(sharded)
    assert len(digests(sharded)) == 4
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", sharded)]
    assert configs[0].get("dtype") == configs[1].get("dtype"), "what the original says, whatever its weights are"
    with bstk.open(sharded.parent / "model.bstk") as file:
        assert file.restores
        assert not [chunk.name for chunk in file.chunks if chunk.name.startswith(".parts")], (
            "everything is in other chunks"
        )
        assert all(chunk.kind.restores for chunk in file.chunks[file.model.chunks :])


def test_a_loaded_model_has_the_original_weights(sharded):
    model, _ = bstack.load(sharded.parent / "model.bstk", dtype=torch.bfloat16)
    loaded = model.state_dict()
    stored = {}
    for path in sharded.glob("*.safetensors"):
        stored |= safetensors.torch.load_file(path)
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name].view(torch.int16), tensor.view(torch.int16)), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_another_type_and_a_budget_give_an_ordinary_export(sharded, tmp_path):
    file = sharded.parent / "model.bstk"
    assert not exported(file, tmp_path / "wide", dtype=torch.float32).exact
    wide = safetensors.torch.load_file(tmp_path / "wide" / "model.safetensors")
    for path in sharded.glob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(path).items():
            assert name == "lm_head.weight" or torch.equal(wide[name], tensor.float()), name
    with bstk.open(file) as reader:
        blocks = reader.model.budget
    done = exported(file, tmp_path / "cut", budget=blocks)
    assert (done.exact, done.dtype) == (False, torch.bfloat16)


def test_a_cut_drops_the_exact_chunks_first(sharded, tmp_path):
    file = sharded.parent / "model.bstk"
    with bstk.open(file) as reader:
        top = reader.length - reader.model.file_bytes
        assert top > 0
        assert reader.model.memory_bytes == reader.memory_bytes
        bstk.truncate(reader, tmp_path / "cut.bstk", budget=reader.model.file_bytes)
        bstk.truncate(reader, tmp_path / "some.bstk", budget=reader.length - 1)
    with bstk.open(tmp_path / "cut.bstk") as cut:
        assert not cut.restores
        assert not any(chunk.kind.restores for chunk in cut.chunks)
        assert cut.model.chunks == len(cut.chunks)
        cut.verify()
    assert not exported(tmp_path / "some.bstk", tmp_path / "some").exact
    bstk.grow(tmp_path / "cut.bstk", None, file, budget=2**40)
    assert (tmp_path / "cut.bstk").read_bytes() == file.read_bytes()


def test_packed_weights_leave_the_exact_chunks_out(sharded):
    file = sharded.parent / "model.bstk"
    model, _ = bstack.load(file, mode="packed")
    with bstk.open(file) as reader:
        assert bstack.resident(model).weight_bytes == reader.memory_bytes
        assert model.bstack_store.budget == reader.model.budget


def test_the_same_file_twice_and_after_an_interruption(sharded, tmp_path, monkeypatch):
    whole = (sharded.parent / "model.bstk").read_bytes()

    class Stopped(Exception):
        pass

    from bstack.compression import exact

    encode, calls = exact.exact.encode, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 12:
            raise Stopped
        return encode(*arguments)

    monkeypatch.setattr(exact.exact, "encode", stop)
    with pytest.raises(Stopped):
        compress(sharded, tmp_path / "again.bstk")
    assert (tmp_path / "again.bstk.work" / "exact-outside.json").exists()
    compress(sharded, tmp_path / "again.bstk")
    assert len(calls) < 30, "finished parts are not made again"
    assert (tmp_path / "again.bstk").read_bytes() == whole


def test_other_settings_keep_their_work(sharded, tmp_path):
    """A file without the exact top is the beginning of one with it, but for the header."""
    compress(sharded, tmp_path / "plain.bstk", exact=False)
    with bstk.open(tmp_path / "plain.bstk") as plain, bstk.open(sharded.parent / "model.bstk") as exact:
        assert [chunk.digest for chunk in plain.chunks] == [c.digest for c in exact.chunks[: exact.model.chunks]]
        assert not plain.restores


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_experts_and_transposed_matrices(kind, tmp_path):
    """Experts are a tensor each in the checkpoint, and GPT-2 keeps inputs x outputs; both without whole copies in the file."""
    tiny_models.save(kind, tmp_path / "model")
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    half = {name: t.half() if t.is_floating_point() else t for name, t in weights.items()}
    safetensors.torch.save_file(half, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    compress(tmp_path / "model", tmp_path / "model.bstk")
    assert exported(tmp_path / "model.bstk", tmp_path / "out").exact
    assert digests(tmp_path / "out") == digests(tmp_path / "model")
    with bstk.open(tmp_path / "model.bstk") as file:
        assert not [chunk.name for chunk in file.chunks if chunk.name.startswith(".parts")]


def test_what_the_model_does_not_use_comes_back_too(tmp_path):
    """A float64 tensor, a rotary table of an old checkpoint with a NaN, and a copy of a tied weight that differs in a sign of zero."""
    tiny_models.save("llama-tied", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.layers.0.mlp.gate_proj.weight"] = weights["model.layers.0.mlp.gate_proj.weight"].double() * (
        1 + 1e-12
    )
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.tensor([1.0, float("nan")])
    weights["model.embed_tokens.weight"][0, 0] = 0.0
    copy = weights["model.embed_tokens.weight"].clone()
    copy[0, 0] = -0.0
    weights["lm_head.weight"] = copy
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.warns(bstack.errors.ModelWarning, match="inv_freq"):
        compress(tmp_path / "model", tmp_path / "model.bstk")
    assert exported(tmp_path / "model.bstk", tmp_path / "out").exact
    assert digests(tmp_path / "out") == digests(tmp_path / "model")


def test_a_gguf_file_gives_its_values(tmp_path):
    pytest.importorskip("gguf")
    source = tiny_gguf.write(tmp_path / "tiny.gguf")
    compress(source, tmp_path / "model.bstk")
    done = exported(tmp_path / "model.bstk", tmp_path / "out")
    assert (done.exact, done.dtype) == (True, torch.float32)
    skeleton = Skeleton(open_checkpoint(str(source)))
    with skeleton.loaded(skeleton.model.state_dict()):
        expected = {name: tensor.numpy().tobytes() for name, tensor in skeleton.model.state_dict().items()}
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.numpy().tobytes() for name, tensor in weights.items()}.items() <= expected.items()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()} == expected


def test_depths_that_no_exact_chunk_takes_are_refused():
    with pytest.raises(UsageError, match="planes is 20; an exact file has at most 16"):
        check_exact(make_codec(Settings(codec="sign", planes=20)), [])
    with pytest.raises(UsageError, match="rank is 40"):
        check_exact(make_codec(Settings(codec="sign", rank=40)), [])


def test_files_that_no_chunk_describes_are_refused():
    def refused(message, *files):
        with pytest.raises(UnsupportedModelError, match=message):
            check_exact(make_codec(Settings()), files)

    for name in (".hidden/a.safetensors", "weights.bin", "a\\b.safetensors", "a:b.safetensors", "a\x07.safetensors"):
        refused("so no exact file holds it", OriginalFile(name, b""))
    many = [StoredTensor(f"expert.{i}", "f32", 8, "experts", View(2 * i, (2, 1), (1, 1))) for i in range(30_000)]
    refused("30000 tensors.*max_shard_size", OriginalFile("model.safetensors", b"", many))
    check_exact(make_codec(Settings()), [OriginalFile("model.safetensors", b"", many[:20_000])])
    refused("one of several files", OriginalFile("model.safetensors", b""), OriginalFile("more.safetensors", b""))


@pytest.mark.parametrize(
    ("index", "shards"),
    [
        ("other.safetensors.index.json", ["one.safetensors", "two.safetensors"]),
        ("model.safetensors.index.json", ["a/model.safetensors", "b/model.safetensors"]),
    ],
)
def test_shards_of_other_names_and_places_are_all_originals(index, shards, tmp_path):
    folder = tiny_models.save("llama", tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: shards[number % 2] for number, name in enumerate(sorted(weights))}
    for shard in shards:
        (folder / shard).parent.mkdir(exist_ok=True)
        safetensors.torch.save_file({n: w for n, w in weights.items() if places[n] == shard}, folder / shard)
    text = json.dumps({"weight_map": places})
    (folder / index).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": index}))
    checkpoint = open_checkpoint(str(folder))
    files = checkpoint.originals(Skeleton(checkpoint).model)
    assert [file.name for file in files] == [*shards, "model.safetensors.index.json"]
    assert files[-1].head == text.encode()
    assert sorted(tensor.name for file in files for tensor in file.tensors) == sorted(weights)


def test_what_is_stored_as_it_is_may_be_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("bstack.compression.exact.PIECE_BYTES", 100)
    tiny_models.save("llama", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"].double() + 1e-12
    safetensors.torch.save_file(weights, path)
    compress(tmp_path / "model", tmp_path / "model.bstk")
    with bstk.open(tmp_path / "model.bstk") as file:
        pieces = [chunk.raw_length for chunk in file.chunks if chunk.name.startswith(".parts/")]
    assert len(pieces) > 1 and max(pieces) == 100
    assert exported(tmp_path / "model.bstk", tmp_path / "out").dtype == torch.float32
    assert digests(tmp_path / "out") == digests(tmp_path / "model")


@pytest.mark.parametrize("most", [torch.float64, torch.bfloat16])
def test_the_type_of_most_weights_is_named(most, tmp_path):
    """Not that of the embedding, which comes first in a file, nor of those that exact chunks hold."""
    tiny_models.save("llama", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights |= {name: tensor.to(most) for name, tensor in weights.items() if ".layers." in name}
    safetensors.torch.save_file(weights, path)
    compress(tmp_path / "model", tmp_path / "model.bstk", planes=1)
    assert exported(tmp_path / "model.bstk", tmp_path / "out").dtype == most
    arguments = ("export", tmp_path / "model.bstk", "again", "--json", "-q")
    report = json.loads(in_process.bstack(*arguments, cwd=tmp_path).stdout)
    assert report["dtype"] == {torch.float64: "fp64", torch.bfloat16: "bf16"}[most]
    assert digests(tmp_path / "out") == digests(tmp_path / "model")


def test_conversions_that_cannot_be_followed_are_named(tmp_path, monkeypatch):
    tiny_models.save("mixtral", tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    skeleton = Skeleton(checkpoint)
    monkeypatch.setattr("bstack.models.original.MOST_ELEMENTS", 8)
    with pytest.warns(bstack.errors.ModelWarning, match="beside their blocks"):
        checkpoint.originals(skeleton.model)


def test_the_values_of_a_large_gguf_file_are_several_files(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from bstack.models import gguf

    monkeypatch.setattr(gguf, "_TENSORS_TOGETHER", 40)
    experts = {"num_experts": 24, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    source = tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.built("Qwen3MoeConfig", **experts, head_dim=16))
    skeleton = Skeleton(checkpoint := open_checkpoint(str(source)))
    reads = []
    value = gguf.GGUFCheckpoint._value
    monkeypatch.setattr(gguf.GGUFCheckpoint, "_value", lambda *a: reads.append(a[1]) or value(*a))
    files = checkpoint.originals(skeleton.model)
    for file in files:
        data = b"".join(file.read(number).tobytes() for number in range(len(file.tensors)))
        (tmp_path / file.name).write_bytes(file.head + data)
    assert len(files) > 2 and len(reads) <= len(set(reads)) + len(files), "no parameter is read for each of its experts"
    (tmp_path / "config.json").write_text(skeleton.model.config.to_json_string())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with skeleton.loaded(skeleton.model.state_dict()):
        for name, tensor in skeleton.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name


def test_the_commands_say_so(sharded, tmp_path):
    def run(*arguments):
        done = in_process.bstack(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = ("--samples", 2, "--sequence-length", 16, "--no-tokenizer", "--planes", 2)
    made = run("compress", sharded, "-o", "m.bstk", "--exact", *options, "-q")
    assert re.search(r"exact top +[\d,.]+ \w+ of it; the full file takes \d+\.\d% of the original", made)
    assert (tmp_path / "m.bstk").read_bytes() == (sharded.parent / "model.bstk").read_bytes()
    assert "bit for bit those of the original" in run("export", "m.bstk", "out", "-q")
    assert digests(tmp_path / "out") == digests(sharded)
    report = json.loads(run("export", "m.bstk", "again", "--json", "-q"))
    assert (report["exact"], report["dtype"]) == (True, "bf16")
    assert json.loads(run("export", "m.bstk", "half", "--dtype", "fp16", "--json", "-q"))["exact"] is False
    assert "gives back the original bit for bit" in run("inspect", "m.bstk")
    run("truncate", "m.bstk", "-o", "cut.bstk", "--mb", 0.1, "-q")
    assert "would give back the original, but is cut off" in run("inspect", "cut.bstk")
    assert not json.loads(run("inspect", "cut.bstk", "--json"))["restores_original"]


def changed(file, out, change, name="model-00001-of-00003.safetensors"):
    """Write a copy of an exact file in which `change` has altered what the original chunk of one file says."""

    def of_chunk(fields, raw):
        if fields["name"] != name:
            return raw
        text, _, rest = raw.partition(b"\0")
        described = json.loads(text)
        text = change(described)
        return (text if isinstance(text, bytes) else metadata.dump(described)) + b"\0" + rest

    rewritten(file, out, of_chunk)


def parameter(described):
    return next(piece for piece in described["pieces"] if piece[0] == "parameter")


HOSTILE = {
    "another length": (lambda d: d.update(length=d["length"] + 1), "not the original"),
    "another digest": (lambda d: d.update(sha256="0" * 64), "not the original"),
    "a huge length": (lambda d: d.update(length=2**60), "so small a file"),
    "no pieces": (lambda d: d.pop("pieces"), "does not say how"),
    "no JSON": (lambda d: b"[]", "the top level is an object"),
    "a piece of another kind": (lambda d: d["pieces"].append(["file", "/etc/passwd"]), "is no piece of a file"),
    "bytes that are not there": (lambda d: d["pieces"].append(["bytes", 2**40]), "is no piece of a file"),
    "bytes backwards": (lambda d: d["pieces"].append(["bytes", -1]), "is no piece of a file"),
    "a chunk that is not there": (lambda d: d["pieces"].append(["chunk", "config.json"]), "is no piece of a file"),
    "a parameter that is not there": (lambda d: d["pieces"].append(["parameter", "nothing"]), "gives nothing"),
    "a view past the end": (lambda d: parameter(d).extend([1, [10**9], [1]]), "it reaches element"),
    "a view before the start": (lambda d: parameter(d).extend([-1, [1], [1]]), "offsets of 0 and more"),
    "a view that is none": (lambda d: parameter(d).extend([0, [2, 2], [1]]), "offsets of 0 and more"),
    "a view that repeats": (
        lambda d: parameter(d).extend([0, [10**9, 10**9], [0, 0]]),
        "elements, but the parameter has",
    ),
    "a stride past 64 bits": (lambda d: parameter(d).extend([0, [1], [2**70]]), "numbers that no array needs"),
    "a dimension past 64 bits": (lambda d: parameter(d).extend([0, [0, 2**70], [1, 1]]), "numbers that no array"),
    "a view of many dimensions": (lambda d: parameter(d).extend([0, [1] * 70, [1] * 70]), "more than 8 dimensions"),
    "true for a number": (lambda d: parameter(d).extend([0, [True], [1]]), "is no piece of a file"),
    "a shape of many dimensions": (
        lambda d: d["shapes"].update({name: [*shape, *[1] * 70] for name, shape in d["shapes"].items()}),
        "do not make up a parameter",
    ),
    "another shape": (
        lambda d: d["shapes"].update({name: [7, 7] for name in d["shapes"]}),
        "do not make up a parameter|no exact chunk",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_files_that_say_other_things_are_refused(what, sharded, tmp_path):
    change, message = HOSTILE[what]
    changed(sharded.parent / "model.bstk", tmp_path / "bad.bstk", change)
    with pytest.raises(DamagedError, match=message):
        exported(tmp_path / "bad.bstk", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def other_names(old, new):
    def change(fields, raw):
        fields["name"] = fields["name"].replace(old, new)
        return raw

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields, raw: None if fields["kind"] is bstk.ORIGINAL else raw, "no chunk says how"),
        (other_names("model.safetensors", ".model.safetensors"), "is no file of weights in safetensors"),
        (other_names("model.safetensors", "model.py"), "is no file of weights in safetensors"),
        (other_names("even", "even[00]"), "is not the name of a matrix"),
        (other_names("even", "even[\u0663]"), "is not the name of a matrix"),
        (other_names("even", "even[7]"), "what it should fill"),
    ],
)
def test_names_of_hostile_chunks(change, message, tmp_path):
    rewritten(VECTORS / "exact.bstk", tmp_path / "bad.bstk", change)
    with bstk.open(tmp_path / "bad.bstk") as file, pytest.raises(DamagedError, match=message):
        write_originals(file, tmp_path / "out", lambda done: None)


def test_all_files_together_are_bounded(tmp_path, monkeypatch):
    """Many files of the same parameters would fill a disk."""
    monkeypatch.setattr("bstack.engine.exact.EXPANSION", 1)
    with bstk.open(VECTORS / "exact.bstk") as file:
        text = next(file.read(chunk) for chunk in file.chunks if chunk.name == "model.safetensors")
    more = [({"name": f"{number}.safetensors", "kind": bstk.ORIGINAL}, text) for number in range(100)]
    rewritten(VECTORS / "exact.bstk", tmp_path / "bad.bstk", lambda fields, raw: raw, more)
    with bstk.open(tmp_path / "bad.bstk") as file, pytest.raises(DamagedError, match="so small a file"):
        write_originals(file, tmp_path / "out", lambda done: None)


def test_the_golden_file_is_put_together(tmp_path):
    vectors = VECTORS
    expected = json.loads((vectors / "expected-exact.json").read_text())["model.safetensors"]
    with bstk.open(vectors / "exact.bstk") as file:
        write_originals(file, tmp_path, lambda done: None)
    assert (tmp_path / "model.safetensors").read_bytes().hex() == expected
