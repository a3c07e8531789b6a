"""``bstack compress``: what it refuses, in which words and with which exit code; what it prints; where models come from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import bstk
import click
import pytest
import safetensors.torch
import tiny_models
import torch
from bstack.cli import main
from bstack.cli.compress import command
from bstack.memory.free import Memory

QUICK = ["--codec", "sign", "--planes", "2", "--rank", "2", "--samples", "2", "--sequence-length", "16"]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run ``bstack compress ARGUMENTS`` in this process, which has torch already, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            main.main(["compress", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and "unexpected" not in err and "bug in bstack" not in err, err
        return caught.value.code, out, err

    return call


@pytest.fixture
def model(tiny_llama, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def refused(run, tmp_path):
    """A failure: its words on stderr, nothing on stdout, and nothing left that was not there before."""

    def call(code, words, *arguments):
        before = everything(tmp_path)
        found, out, err = run("-o", "out.bstk", *QUICK, *arguments)
        assert (found, out) == (code, ""), err
        for word in [words] if isinstance(words, str) else words:
            assert word in err
        assert everything(tmp_path) == before

    return call


# The model.


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "nobody/nothing@main"])
def test_no_such_model(refused, name):
    refused(2, [f"No model '{name}'", "no such folder or file", "cannot be reached", "hub id"], name)


@pytest.mark.parametrize("name", ["./nothing/of/this/kind", "/nothing", "no spaces allowed"])
def test_no_such_model_and_no_hub_id_either(refused, name):
    refused(2, [f"No model '{name}'", "not the form of a hub id"], name)


def test_a_file_that_is_no_checkpoint(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refused(1, ["notes.txt is not a GGUF file", "config.json and the safetensors"], "notes.txt")
    (tmp_path / "empty").touch()
    refused(1, "empty is not a GGUF file", "empty")


def test_a_single_safetensors_file_is_no_folder(refused, model):
    refused(1, "the folder that holds", model / "model.safetensors")


@pytest.mark.parametrize("keep", [8, 100, 3000])
def test_truncated_gguf(refused, tmp_path, keep):
    (tmp_path / "x.gguf").write_bytes((b"GGUF" + bytes([3, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 9]) + b"\1" * 4000)[:keep])
    refused(5, ["x.gguf is not a whole GGUF file", "Fetch it again"], "x.gguf")


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(2, "holds no config.json", "empty")


def test_no_weights(refused, model):
    (model / "model.safetensors").unlink()
    refused(2, "holds no model.safetensors", "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(refused, model, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")
    refused(1, [name, "never unpickles", "save_pretrained"], "model")


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_safetensors(refused, model, keep):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(5, ["model.safetensors is not a whole safetensors file", "fetch it again"], "model")


def test_safetensors_that_are_something_else(refused, model):
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 20)
    refused(5, "is not a whole safetensors file", "model")


def test_missing_shard(refused, tmp_path):
    tiny_models.save("llama", tmp_path / "model", shard="50KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    shards[1].unlink()
    refused(5, [f"lacks 1 of {len(shards)} shards", shards[1].name], "model")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index_of_shards(refused, tmp_path, text):
    tiny_models.save("llama", tmp_path / "model", shard="50KB")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(text)
    refused(5, ["model.safetensors.index.json", "weight_map"], "model")


def rewrite(model, change):
    """Change a checkpoint's tensors in place."""
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def reconfigure(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def test_missing_tensors(refused, model):
    rewrite(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(1, ["lacks model.layers.1.mlp.up_proj.weight", "LlamaForCausalLM", "config.json"], "model")


def test_more_layers_than_weights(refused, model):
    reconfigure(model, num_hidden_layers=3, layer_types=None)
    refused(1, ["lacks model.layers.2.", "more"], "model")


def test_shapes_that_contradict_the_configuration(refused, model):
    reconfigure(model, intermediate_size=101)
    refused(5, ["(48, 100)", "(48, 101)", "config.json"], "model")


@pytest.mark.parametrize("text", ["", "{", '"llama"', "[1]", "{}", '{"model_type": "nosuchthing"}', '{"model_type": 7}', "\xff"])
def test_damaged_configuration(refused, model, text):
    (model / "config.json").write_text(text, encoding="latin-1")
    refused(1, "config.json", "model")


def test_configuration_with_impossible_sizes(refused, model):
    reconfigure(model, num_attention_heads=0)
    refused(1, "config.json cannot be used", "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers(refused, model, name, value):
    def change(tensors):
        tensors[name].view(-1)[[3, 7]] = value

    rewrite(model, change)
    refused(1, [f"{name} holds 2 values that are NaN or infinite"], "model")


def test_infinities_that_cancel(refused, model):
    def change(tensors):
        tensors["model.norm.weight"][0], tensors["model.norm.weight"][1] = float("inf"), float("-inf")

    rewrite(model, change)
    refused(1, "model.norm.weight holds 2 values", "model")


def test_quantised_checkpoints(refused, model):
    reconfigure(model, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    refused(1, ["already quantised (gptq)", "before quantisation"], "model")


def test_weights_of_eight_bits(refused, model):
    rewrite(model, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items() if v.dim() == 2}))
    refused(1, ["F8_E4M3", "before quantisation"], "model")


def test_encoder_decoders(refused, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    refused(1, ["encoder-decoder (t5)", "causal language models"], "t5")


def test_models_that_are_no_language_models(refused, tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    refused(1, ["(vit)", "not a causal language model"], "vit")


# The calibration.


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_text(refused, model, tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    refused(1, ["text.txt", "token"], "model", "--calibration", "text.txt")


def test_short_text_says_how_much_is_there_and_the_mended_command_works(run, refused, model, tmp_path):
    (tmp_path / "text.txt").write_text(tiny_models.text(12))
    words = ["text.txt has ", "2 samples of 128 and 4 more", "need 768", "a longer text, or at most --sequence-length 2"]
    refused(1, words, "model", "--calibration", "text.txt", "--sequence-length", 128)
    refused(1, "at most --samples", "model", "--calibration", "text.txt", "--samples", 900)
    refused(1, "Give a longer text.\n", "model", "--calibration", "text.txt", "--sequence-length", 128, "--samples", 99)
    code, _, err = run("model", "-o", "out.bstk", *QUICK, "--calibration", "text.txt")
    assert code == 0, err


def test_a_length_beyond_what_the_model_reads(refused, model, tmp_path):
    refused(1, ["--sequence-length is 4000", "at most 128"], "model", "--sequence-length", 4000)


def test_text_that_is_not_utf8(refused, model, tmp_path):
    (tmp_path / "text.txt").write_bytes("é".encode("latin-1") * 4000)
    refused(1, ["text.txt is not UTF-8 text", "byte 0: 0xe9"], "model", "--calibration", "text.txt")


def test_text_in_a_record_that_is_none(refused, model, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "fine"}\n{"content": "no"}\n')
    refused(1, ["text.jsonl, line 2", '"text" field'], "model", "--calibration", "text.jsonl")


def test_folder_without_text(refused, model, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "picture.png").touch()
    refused(1, ["texts holds no text", ".txt"], "model", "--calibration", "texts")


def test_text_that_is_not_there(refused, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(2, ["no file or folder 'nothing.txt'", "pip install"], "model", "--calibration", "nothing.txt")


def test_data_set_that_cannot_be_read(refused, model, monkeypatch):
    def load_dataset(*_arguments, **_more):
        raise RuntimeError("Couldn't reach it\nand more")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    refused(2, ["no file or folder 'owner/set'", "Couldn't reach it"], "model", "--calibration", "owner/set")


def test_text_without_a_tokenizer(refused, tmp_path):
    tiny_models.save("llama", tmp_path / "bare")
    (tmp_path / "text.txt").write_text(tiny_models.text())
    refused(1, ["no tokenizer", "--calibration self"], "bare", "--calibration", "text.txt")


def test_too_little_memory_to_write_a_text(refused, model, monkeypatch):
    memory = Memory(free=1000, total=10**9, source="a small box")
    monkeypatch.setattr("bstack.calibration.selftext.free_memory", lambda: memory)
    refused(7, ["the whole model must be in memory", "free of a small box", "--calibration FILE"], "model")


# The settings.


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--rank", "0", "1 to 256"), ("--rank", "257", "1 to 256"), ("--rank", "-1", "1 to 256"), ("--rank", "many", "nor auto"),
        ("--rank", "1.5", "nor auto"), ("--planes", "0", "1 to 64"), ("--planes", "65", "1 to 64"), ("--planes", "x", "integer"),
        ("--samples", "0", "samples is 0"), ("--samples", "-1", "samples is -1"), ("--samples", "x", "integer"),
        ("--sequence-length", "7", "sequence-length is 7; allowed are 8"), ("--seed", "-1", "seed is -1"),
        ("--order", "best", "gain"), ("--codec", "zip", "sign"), ("--embeddings", "no", "dense"), ("--preset", "x", "paper"),
        ("--nothing", "x", "No such option"),
    ],
)  # fmt: skip
def test_settings_that_are_none(run, tiny_llama, tmp_path, option, value, words):
    code, out, err = run(tiny_llama, "-o", "out.bstk", *QUICK, option, value)
    assert (code, out) == (2, "") and words in err
    assert everything(tmp_path) == []


def test_nothing_is_assumed(run, tiny_llama):
    assert run()[0] == 2
    code, _, err = run(tiny_llama)
    assert code == 2 and "--output" in err


# The output.


def test_output_in_a_folder_that_is_not_there(run, tiny_llama):
    code, _, err = run(tiny_llama, "-o", "no/such/out.bstk", *QUICK)
    assert code == 1 and "is not a folder" in err and "Create it first" in err


def test_output_that_is_a_folder(run, tiny_llama, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, err = run(tiny_llama, "-o", "out", *QUICK)
    assert code == 2 and "out is a folder" in err


def test_output_that_cannot_be_written(run, tiny_llama, tmp_path):
    target = tmp_path / "closed"
    target.mkdir(mode=0o555)
    if os.access(target, os.W_OK):  # a superuser may write everywhere but into the kernel
        target = Path("/proc/self")
        if not target.is_dir():
            pytest.skip("no folder that this user may not write to")
    code, _, err = run(tiny_llama, "-o", target / "out.bstk", *QUICK)
    assert code == 1 and f"{target} cannot be written to" in err


def test_existing_output_needs_force(run, model, tmp_path):
    (tmp_path / "out.bstk").write_text("precious")
    code, _, err = run("model", "-o", "out.bstk", *QUICK)
    assert code == 2 and "exists already" in err and "--force" in err
    assert (tmp_path / "out.bstk").read_text() == "precious"
    # A forced run that fails leaves the old output where it was.
    assert run("nothing", "-o", "out.bstk", "--force", *QUICK)[0] == 2
    assert (tmp_path / "out.bstk").read_text() == "precious"
    assert run("model", "-o", "out.bstk", "--force", *QUICK)[0] == 0
    with bstk.open(tmp_path / "out.bstk", strict=True) as file:
        assert file.blocks


def test_the_model_is_never_its_own_output(run, tmp_path):
    from test_load import write_gguf

    before = write_gguf(tmp_path / "model.gguf").read_bytes()
    code, _, err = run("model.gguf", "-o", "model.gguf", "--force", *QUICK)
    assert code == 2 and "is the model itself" in err
    assert (tmp_path / "model.gguf").read_bytes() == before


def test_work_directory_of_somebody_else(run, model, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("all of it")
    code, _, err = run("model", "-o", "out.bstk", "--work-dir", "work", *QUICK)
    assert code == 2 and "not a work directory of bstack" in err and "thesis.tex" in err
    assert (tmp_path / "work" / "thesis.tex").read_text() == "all of it"


def small_disk(size: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run bstack with `folder` on a disk of its own, seen by that process alone; skip where the system does not allow it."""
    folder.mkdir(exist_ok=True)
    mount = f'mount -t tmpfs -o size={size} none "$0" && cd "$0"'
    try:
        allowed = subprocess.run(["unshare", "-rm", "sh", "-c", mount, folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no unshare command to mount a small disk with")
    if allowed.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    script = mount + '; "$@"; code=$?; ls -A >&2; exit $code'
    command = [sys.executable, "-m", "bstack", *map(str, arguments)]
    return subprocess.run(["unshare", "-rm", "sh", "-c", script, folder, *command], capture_output=True, text=True)


# Full while the tokenizer is kept, at the sensitivities, in the layers.
@pytest.mark.parametrize("size", ["16k", "48k", "128k"])
def test_full_disk(size, tiny_llama, tmp_path):
    done = small_disk(size, tmp_path, "compress", tiny_llama, "-o", "out.bstk", "-q", *QUICK, "--planes", 6)
    assert (done.returncode, done.stdout) == (7, ""), done.stderr
    assert "No space left" in done.stderr and "Free some space" in done.stderr and "Traceback" not in done.stderr


def test_full_disk_at_the_very_end(run, tiny_llama, tmp_path):
    """The blocks fit once, but not twice, in the work directory and in the output."""
    arguments = [tiny_llama, "-o", "out.bstk", "-q", *QUICK, "--planes", 16]
    assert run(*arguments)[0] == 0
    size = f"{(tmp_path / 'out.bstk').stat().st_size * 2 // 1024}k"
    done = small_disk(size, tmp_path / "disk", "compress", *arguments)
    assert (done.returncode, done.stdout) == (7, ""), done.stderr
    assert "out.bstk: cannot write: No space left" in done.stderr
    # Kept for the run that follows, and no half of an output.
    assert done.stderr.endswith("\nout.bstk.work\n")


# What comes out.


def test_summary(run, model):
    code, out, err = run("model", "-o", "out.bstk", *QUICK)
    assert code == 0
    for word in ("out.bstk: done", "original", "full file", "smallest file", "bits per weight", "time", "peak memory"):
        assert word in out
    # Not a terminal: the stages by name, and no bars.
    assert "Compressing layers" in err and "\r" not in err


def test_json_and_quiet(run, model, tmp_path):
    code, out, err = run("model", "-o", "out.bstk", "--json", "-q", *QUICK)
    report = json.loads(out)
    assert (code, err) == (0, "")
    with bstk.open(tmp_path / "out.bstk") as file:
        assert report["schema"] == "bstack.compress/1" and report["file_bytes"] == file.length
        assert report["smallest_bytes"] == file.smallest_length and report["blocks"] == sum(chunk.is_block for chunk in file.chunks)
    # 16 linears: 7 in each of two layers, embedding and head.
    assert report["linears"] == 16 and report["blocks"] == 32
    assert report["original_bytes"] == (model / "model.safetensors").stat().st_size
    assert 2 < report["bits_per_weight"] < 8 and report["peak_memory_bytes"] > 1e6


def test_nothing_of_this_machine_is_in_the_file(run, model, tmp_path):
    (tmp_path / "text.txt").write_text(tiny_models.text())
    assert run(tmp_path / "model", "-o", "out.bstk", "--calibration", tmp_path / "text.txt", *QUICK)[0] == 0
    with bstk.open(tmp_path / "out.bstk") as file:
        contents = json.dumps(file.metadata).encode() + b"".join(file.read(chunk) for chunk in file.files.values())
        assert file.metadata["model"]["name"] == "model" and file.metadata["settings"]["calibration"] == "text.txt"
    assert str(tmp_path).encode() not in contents and os.fsencode(Path.home()) + b"/" not in contents


def test_every_option_has_a_help_text(run):
    _, out, _ = run("--help")
    for option in command.params:
        if isinstance(option, click.Option):
            assert all(name in out for name in option.opts) and option.help
            assert " ".join(option.help.split()[:2]) in " ".join(out.split())


# Models of the hub: a cache as the hub's own client leaves it, no network.


@pytest.fixture
def hub(tiny_llama, tmp_path):
    """A folder for HF_HOME that holds the tiny model as owner/tiny, a revision called old, and a model of pickles."""
    for name, revision in (("owner--tiny", "main"), ("owner--tiny", "old"), ("owner--pickled", "main")):
        home = tmp_path / "home" / "hub" / f"models--{name}"
        commit = {"main": "1" * 40, "old": "2" * 40}[revision]
        snapshot = home / "snapshots" / commit
        shutil.copytree(tiny_llama, snapshot)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(commit)
        if revision == "old":
            rewrite(snapshot, lambda tensors: tensors["model.norm.weight"].mul_(2))
        if name == "owner--pickled":
            (snapshot / "model.safetensors").unlink()
            (snapshot / "pytorch_model.bin").write_bytes(b"\x80\x02")
    return tmp_path / "home"


def test_hub_ids(run, hub, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub / "hub"))
    norms = {}
    for name in ("owner/tiny", "owner/tiny@old"):
        code, _, err = run(name, "-o", "out.bstk", "--force", *QUICK)
        assert code == 0, err
        with bstk.open(tmp_path / "out.bstk") as file:
            assert file.metadata["model"]["name"] == name
            norms[name] = file.read(next(c for c in file.chunks if c.name == "model.norm.weight"))
    doubled = torch.frombuffer(bytearray(norms["owner/tiny"]), dtype=torch.float32) * 2
    assert doubled.numpy().tobytes() == norms["owner/tiny@old"]
    assert run("owner/pickled", "-o", "p.bstk", *QUICK)[0] == 1
    assert run("owner/other", "-o", "p.bstk", *QUICK)[0] == 2


def test_hub_id_with_the_command_as_installed(bstack, hub, tmp_path):
    done = bstack("compress", "owner/tiny", "-o", "out.bstk", "--json", "-q", *QUICK, HF_HOME=str(hub), HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["linears"] == 16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out.bstk"]
