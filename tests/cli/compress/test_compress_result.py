"""``bstack compress``: settings that are none, what it prints, what is in the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import pytest
import tiny_models
from compressing import QUICK, everything, rewrite

import bstk
from bstack.cli._text import megabytes
from bstack.cli.compress import command


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--rank", "0", "1 to 256"),
        ("--rank", "257", "1 to 256"),
        ("--rank", "-1", "1 to 256"),
        ("--rank", "many", "nor auto"),
        ("--rank", "1.5", "nor auto"),
        ("--planes", "0", "1 to 64"),
        ("--planes", "65", "1 to 64"),
        ("--planes", "x", "integer"),
        ("--samples", "0", "samples is 0"),
        ("--samples", "-1", "samples is -1"),
        ("--samples", "x", "integer"),
        ("--sequence-length", "7", "sequence length is 7; allowed are 8"),
        ("--seed", "-1", "seed is -1"),
        ("--order", "best", "gain"),
        ("--codec", "zip", "sign"),
        ("--embeddings", "no", "dense"),
        ("--preset", "x", "paper"),
        ("--nothing", "x", "No such option"),
    ],
)
def test_settings_that_are_none(run, tiny_llama, tmp_path, option, value, words):
    code, out, err = run(tiny_llama, "-o", "out.bstk", *QUICK, option, value)
    assert (code, out) == (2, "") and words in err
    assert everything(tmp_path) == []


def test_nothing_is_assumed(run, tiny_llama):
    assert run()[0] == 2
    code, _, err = run(tiny_llama)
    assert code == 2 and "--output" in err


def test_summary(run, model):
    code, out, err = run("model", "-o", "out.bstk", *QUICK)
    assert code == 0
    for word in ("out.bstk: done", "original", "full file", "base model", "bits per weight", "time", "peak memory"):
        assert word in out
    # Not a terminal: the stages by name, and no bars.
    assert "Compressing layers" in err and "\r" not in err


@pytest.mark.parametrize("quantisation", [None, "Q4_1"])
def test_what_the_original_takes_in_its_own_precision(run, model, tmp_path, monkeypatch, quantisation):
    """The source's dtype, or 16 bits for each parameter of a quantised source, whose own size is then named, too."""
    monkeypatch.setattr("bstack.models.safetensors.SafetensorsCheckpoint.quantisation", quantisation)
    rewrite(model, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    code, out, err = run("model", "-o", "out.bstk", *QUICK)
    assert code == 0, err
    stored = (model / "model.safetensors").stat().st_size
    with bstk.open(tmp_path / "out.bstk") as file:
        found = file.metadata["model"]
    assert (found["original_bytes"], found["original_dtype"]) == (stored, "bfloat16")
    assert found["original_dtype_bytes"] == 2 * found["parameters"]
    assert found.get("source_quantisation") == (quantisation and "SAFETENSORS Q4_1")
    lines = [line for line in out.splitlines() if line.startswith("  original") or "better choice" in line]
    assert f"{megabytes(2 * found['parameters'])} as bfloat16" in lines[0]
    assert len(lines) == (2 if quantisation else 1) and (f"above {megabytes(stored)} the source" in out) == (
        len(lines) == 2
    )
    assert main_page(tmp_path / "out.bstk").count("as bfloat16") == 1


def main_page(path):
    from bstack.cli.inspect import _page

    with bstk.open(path) as file:
        return _page(file)


def test_the_type_of_most_bytes_is_the_quantisation_of_a_gguf_file():
    from types import SimpleNamespace

    from bstack.models.gguf import _quantisation

    def tensors(**sizes):
        return [SimpleNamespace(tensor_type=SimpleNamespace(name=name), n_bytes=size) for name, size in sizes.items()]

    assert _quantisation(tensors(F32=10, Q4_1=100, Q6_K=50)) == "Q4_1"
    assert _quantisation(tensors(F32=10, BF16=100, Q6_K=50)) is None
    assert _quantisation([]) is None


def test_json_and_quiet(run, model, tmp_path):
    code, out, err = run("model", "-o", "out.bstk", "--json", "-q", *QUICK)
    report = json.loads(out)
    assert (code, err) == (0, "")
    with bstk.open(tmp_path / "out.bstk") as file:
        assert report["schema"] == "bstack.compress/2" and report["file_bytes"] == file.length
        assert report["base_bytes"] == file.base_length and report["blocks"] == sum(
            chunk.is_block for chunk in file.chunks
        )
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
