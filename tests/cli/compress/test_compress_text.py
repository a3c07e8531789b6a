"""``bstack compress``: calibration texts that it refuses, and what would help."""

from __future__ import annotations

import json
import sys
import types

import pytest
import tiny_models
from compressing import QUICK
from transformers import AutoTokenizer

import bstk
from bstack.memory.free import Memory


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_text(refused, model, tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    refused(1, ["text.txt", "token"], "model", "--calibration", "text.txt")


def test_short_text_says_how_much_is_there_and_the_mended_command_works(run, refused, model, tmp_path):
    (tmp_path / "text.txt").write_text(tiny_models.text(12))
    words = [
        "text.txt has ",
        "2 samples of 128 and 4 more",
        "need 768",
        "a longer text, or a sequence length of at most 2",
    ]
    refused(1, words, "model", "--calibration", "text.txt", "--sequence-length", 128)
    refused(1, "at most ", "model", "--calibration", "text.txt", "--samples", 900)
    refused(1, "Give a longer text.\n", "model", "--calibration", "text.txt", "--sequence-length", 128, "--samples", 99)
    code, _, err = run("model", "-o", "out.bstk", *QUICK, "--calibration", "text.txt")
    assert code == 0, err


def test_a_length_beyond_what_the_model_reads(refused, model, tmp_path):
    refused(1, ["sequence_length is 4000", "at most 128"], "model", "--sequence-length", 4000)


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


def test_a_token_beyond_the_embedding_and_the_mended_command(run, refused, model, tmp_path):
    """An added token that no row of the embedding belongs to; nothing is left that refuses the next command."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    (tmp_path / "text.txt").write_text(tiny_models.text().replace(".", "<extra>"))
    rows = tiny_models.VOCABULARY
    words = [f"text.txt: the tokenizer gives '<extra>' the id {rows}", f"has {rows} rows", "resize_token_embeddings"]
    refused(1, words, "model", "--calibration", "text.txt")
    (tmp_path / "other.txt").write_text(tiny_models.text())
    code, _, err = run("model", "-o", "out.bstk", *QUICK, "--calibration", "other.txt")
    assert code == 0, err


def test_a_tokenizer_that_cannot_be_read_and_the_mended_command(run, refused, model):
    (model / "tokenizer.json").write_text("{")
    refused(1, ["model/tokenizer.json: the tokenizer cannot be read", "Use --no-tokenizer to leave it out."], "model")
    code, _, err = run("model", "-o", "out.bstk", *QUICK, "--no-tokenizer")
    assert code == 0, err
    with bstk.open("out.bstk") as file:
        assert "tokenizer.json" not in file.files and file.metadata["settings"]["tokenizer"] is False


@pytest.mark.parametrize("quiet", [False, True])
def test_generation_settings_that_are_left_out_are_named(run, model, quiet):
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7], "early_stopping": "maybe"}')
    code, _, err = run("model", "-o", "out.bstk", *QUICK, *(["-q"] if quiet else []))
    line = "Warning: model: generation_config.json: its early_stopping is left out, the rest kept: "
    assert code == 0 and err.count(line) == (not quiet) and err.count("Warning") == (not quiet)


def test_a_work_directory_takes_the_tokenizer_as_it_is_now(run, model, monkeypatch):
    """What an interrupted run packed of the model's files may have been mended since."""

    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("bstack.compression.stages.compress_outside", stop)
    run("model", "-o", "out.bstk", *QUICK)
    monkeypatch.undo()
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    monkeypatch.chdir(model.parent)
    code, _, err = run("model", "-o", "out.bstk", *QUICK)
    assert code == 0, err
    with bstk.open("out.bstk") as file:
        assert file.file("chat_template.jinja") == b"{{ messages }}"
        assert json.loads(file.file("generation_config.json"))["eos_token_id"] == [2, 7]


def test_text_without_a_tokenizer(refused, tmp_path):
    tiny_models.save("llama", tmp_path / "bare")
    (tmp_path / "text.txt").write_text(tiny_models.text())
    refused(1, ["no tokenizer", "calibration to self"], "bare", "--calibration", "text.txt")


def test_too_little_memory_to_write_a_text(refused, model, monkeypatch):
    memory = Memory(free=1000, total=10**9, source="a small box")
    monkeypatch.setattr("bstack.memory.free.free_memory", lambda: memory)
    refused(7, ["the whole model must be in memory", "free of a small box", "Give a calibration text"], "model")
