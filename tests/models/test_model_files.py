"""Putting a model's files into a folder: names that are none, and disks that refuse."""

import errno
import os
from pathlib import Path

import pytest

import bstack
import bstk
from bstack.engine.export import export_safetensors
from bstack.errors import UnsupportedModelError
from bstack.models import tokenizer
from bstack.models.files import put_files
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton
from bstack.models.tokenizer import export_tokenizer


def test_files_in_folders(tmp_path):
    put_files([("a.json", [b"1", b"", b"23"]), ("templates/b.jinja", [b"2"]), ("templates/c.jinja", [])], tmp_path, "x")
    assert (tmp_path / "a.json").read_bytes() == b"123" and (tmp_path / "templates" / "b.jinja").read_bytes() == b"2"


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a"], ["x" * 300]])
def test_a_name_that_is_none_here_is_damage_of_where_it_comes_from(tmp_path, names):
    with pytest.raises(bstk.DamagedError, match=r"^x\.bstk: its file '[a/bx]+' cannot be written: "):
        put_files([(name, [b""]) for name in names], tmp_path, "x.bstk")


@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, bstk.ResourceError), (errno.EIO, bstk.OutputError)])
def test_a_disk_that_refuses_is_no_damage(tmp_path, monkeypatch, code, expected):
    def refuse(sink, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("bstack.models.files.Sink.write", refuse)
    with pytest.raises(expected) as caught:
        put_files([("a", [b"1"])], tmp_path, "x.bstk")
    assert type(caught.value) is expected and str(tmp_path / "a") in str(caught.value)


def test_files_that_no_container_takes_are_refused_before_anything_is_computed(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("bstk.limits.MAX_FILES_LENGTH", 1000)
    with pytest.raises(UnsupportedModelError, match=r"configuration and tokenizer take .* at most"):
        bstack.compress(
            tiny_llama,
            tmp_path / "x.bstk",
            settings=bstack.Settings(codec="sign", planes=1, rank=1, samples=2, sequence_length=16),
        )
    assert not (tmp_path / "x.bstk").exists()


class FailingTokenizer:
    """Stands for transformers' AutoTokenizer and a tokenizer that breaks without a message."""

    @staticmethod
    def from_pretrained(*_args, **_kwargs):
        raise ValueError


def test_a_broken_tokenizer_without_a_message(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer", FailingTokenizer)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer.json: the tokenizer cannot be read: ValueError"):
        export_tokenizer(tmp_path, tiny_llama)


def test_what_a_tokenizer_saves_is_exported(tiny_llama, tmp_path, monkeypatch):
    """One rule says which files are fetched, packed and exported: a vocabulary as .spm (DeBERTa, Marian) is among them."""
    save = tokenizer._save

    def with_spm(what, folder):
        (Path(folder) / "source.spm").write_bytes(b"pieces")
        save(what, folder)

    monkeypatch.setattr("bstack.models.tokenizer._save", with_spm)
    settings = bstack.Settings(codec="sign", planes=1, rank=1, samples=2, sequence_length=16)
    bstack.compress(tiny_llama, tmp_path / "x.bstk", settings=settings)
    with bstk.open(tmp_path / "x.bstk") as file:
        assert "source.spm" in file.files
        export_safetensors(file, tmp_path / "out")
    assert (tmp_path / "out" / "source.spm").read_bytes() == b"pieces"


def test_a_file_that_no_export_takes_is_refused_before_anything_is_computed(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("bstack.models.tokenizer._save", lambda what, target: (target / "words.dat").write_bytes(b"x"))
    monkeypatch.setattr("bstack.models.tokenizer._is_read", lambda *_args: True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"its tokenizer writes words\.dat"):
        export_tokenizer(tmp_path, tiny_llama)


@pytest.mark.parametrize("call", ["AutoConfig.from_pretrained", "AutoModelForCausalLM.from_config"])
def test_a_lack_of_memory_is_no_fault_of_the_model(tiny_llama, monkeypatch, call):
    def refuse(*arguments, **settings):
        raise MemoryError

    monkeypatch.setattr(f"transformers.{call}", refuse)
    with pytest.raises(MemoryError):
        Skeleton(open_checkpoint(str(tiny_llama)))
