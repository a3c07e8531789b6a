import json
import shutil
from types import SimpleNamespace

import pytest
import tiny_models
from transformers import AutoTokenizer

import bstack
from bstack.bench.options import Options
from bstack.bench.run import run_bench
from bstack.bench.text import DEFAULT, digest, first_windows, measuring_text, window_length
from bstack.calibration.texts import TextSource
from bstack.errors import UnsupportedModelError
from bstack.progress import no_progress
from bstk.errors import BstkError, UsageError


class Letters:
    """A tokenizer of one token a character; remembers how much it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        self.asked.append(len(text))
        return {"input_ids": [ord(c) for c in text]}


def test_the_default_is_long_english_prose():
    text = measuring_text(None)
    assert text.name == DEFAULT and len(text.text) > 300_000
    assert text.text.count(" the ") > 3000
    assert digest(text) == digest(measuring_text(None)) and len(digest(text)) == 64


def test_windows_are_the_beginning_one_after_the_other():
    text = TextSource("t", "".join(chr(33 + i % 90) for i in range(100_000)))
    letters = Letters()
    found = first_windows(text, letters, 3, 40)
    assert found.shape == (3, 40)
    assert found.reshape(-1).tolist() == [ord(c) for c in text.text[:120]]
    assert sum(letters.asked) < 10_000  # a long text is not tokenised whole


class Words(Letters):
    """Words of a thousand characters: the first guess at how much text is needed is too little."""

    def __call__(self, text, add_special_tokens, verbose):
        super().__call__(text, add_special_tokens, verbose)
        return {"input_ids": [len(word) for word in text.split()]}


def test_a_tokenizer_of_long_words():
    text = TextSource("t", " ".join("w" * 1000 for _ in range(1000)))
    found = first_windows(text, Words(), 10, 20)
    assert set(found.reshape(-1).tolist()) == {1000}


def test_a_text_of_just_enough():
    assert first_windows(TextSource("t", "x" * 80), Letters(), 2, 40).shape == (2, 40)


@pytest.mark.parametrize(
    ("windows", "length", "advice"), [(3, 40, "at most 2 windows"), (1, 90, "windows of at most 85 tokens")]
)
def test_a_short_text(windows, length, advice):
    with pytest.raises(BstkError, match=advice):
        first_windows(TextSource("t", "x" * 85), Letters(), windows, length)


def test_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    assert measuring_text(str(tmp_path / "a.txt")) == TextSource("a.txt", "hello")


def test_a_token_beyond_the_vocabulary(tiny_llama, tmp_path):
    """Before anything is measured, and for the true reason: the file's own tokenizer gives more ids than it has rows."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    settings = bstack.Settings(codec="sign", planes=1, rank=1, samples=2, sequence_length=16)
    bstack.compress(folder, tmp_path / "a.bstk", settings=settings)
    (tmp_path / "text.txt").write_text(tiny_models.text().replace(".", "<extra>"))
    options = Options(text=str(tmp_path / "text.txt"), windows=2, sequence_length=16, original=str(folder))
    with pytest.raises(UnsupportedModelError, match=r"^text\.txt: the tokenizer gives '<extra>' the id 211.* 211 rows"):
        run_bench(tmp_path / "a.bstk", options, no_progress)


@pytest.mark.parametrize(
    "config", [{"max_position_embeddings": 96}, {"n_positions": 96}, {"text_config": {"max_position_embeddings": 96}}]
)
def test_windows_are_no_longer_than_the_model_reads(config):
    file = SimpleNamespace(files=["config.json"], file=lambda name: json.dumps(config))
    assert window_length(file, None) == window_length(file, 96) == 96
    with pytest.raises(UsageError, match="at most 96"):
        window_length(file, 97)
