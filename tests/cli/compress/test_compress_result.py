"""``bstack compress``: settings that are none, what it prints, what is in the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import pytest
import tiny_models
from compressing import QUICK, everything

import bstk
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
        assert report["smallest_bytes"] == file.smallest_length and report["blocks"] == sum(
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
