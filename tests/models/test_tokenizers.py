"""A tokenizer in any form: what transformers reads is carried with the same ids, what it cannot read is refused."""

import json
import shutil
import warnings

import pytest
import tiny_gguf
import tiny_models
import tiny_tokenizers
import torch
from transformers import AutoConfig, AutoTokenizer

import bstack
import bstk
from bstack.errors import ModelWarning, UnsupportedModelError
from bstack.models import tokenizer as module
from bstack.models.gguf import GGUFCheckpoint
from bstack.models.tokenizer import check_ids, export_tokenizer, tokenizer_files

SETTINGS = bstack.Settings(codec="sign", planes=1, rank=1, samples=2, sequence_length=16)
TEXT = tiny_models.text(40) + "\n  Füße,\t東京 🙂 <s> 1234.5"


@pytest.fixture
def source(tmp_path):
    """Make a folder with a configuration and what a function writes into it."""

    def make(write, model="llama"):
        folder = tmp_path / "source"
        folder.mkdir()
        AutoConfig.for_model(model, vocab_size=500).save_pretrained(folder)
        write(folder)
        return folder

    return make


@pytest.fixture
def target(tmp_path):
    def make(source):
        folder = tmp_path / "target"
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        return folder

    return make


def configured(write, kind):
    def both(folder):
        write(folder)
        tiny_tokenizers.configured(folder, kind)

    return both


def words_alone(folder):
    """A tokenizer that raises an error for an unknown word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"n{number}": number for number in range(200)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))


READ = {
    "tekken": (tiny_tokenizers.tekken, "mistral"),
    "tekken of another model": (tiny_tokenizers.tekken, "llama"),
    "vocab.json and merges.txt": (tiny_tokenizers.vocabulary_and_merges, "gpt2"),
    "vocab.json and merges.txt by the configuration": (
        configured(tiny_tokenizers.vocabulary_and_merges, "GPT2Tokenizer"),
        "opt",
    ),
    "vocab.txt": (configured(tiny_tokenizers.words, "BertTokenizer"), "llama"),
    "bytes": (configured(lambda folder: None, "ByT5Tokenizer"), "llama"),
    "tokenizer.json": (tiny_models.add_tokenizer, "llama"),
    "tokenizer.json without a token for unknown words": (words_alone, "llama"),
}
WITH_PACKAGE = {
    "tiktoken, tokenizer.model": ("tiktoken", tiny_tokenizers.tiktoken, "llama"),
    "tiktoken, tiktoken.model": ("tiktoken", lambda f: tiny_tokenizers.tiktoken(f, "tiktoken.model"), "llama"),
    "sentencepiece, unigram": ("sentencepiece", tiny_tokenizers.sentencepiece, "llama"),
    "sentencepiece, BPE": ("sentencepiece", lambda f: tiny_tokenizers.sentencepiece(f, kind="bpe"), "gemma"),
    "sentencepiece, spiece.model": (
        "sentencepiece",
        configured(lambda f: tiny_tokenizers.sentencepiece(f, "spiece.model"), "T5Tokenizer"),
        "llama",
    ),
}


@pytest.mark.parametrize("kind", [*READ, *WITH_PACKAGE])
def test_what_transformers_reads_is_carried_with_the_same_ids(source, target, kind):
    package, write, model = WITH_PACKAGE.get(kind) or (None, *READ[kind])
    if package:
        pytest.importorskip(package)
    if package == "sentencepiece":  # transformers reads its files with this
        pytest.importorskip("google.protobuf")
    source = source(write, model)
    export_tokenizer(target := target(source), source)
    wanted, found = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(target)
    assert found.get_vocab() == wanted.get_vocab() and len(wanted.get_vocab()) > 50
    text = "n5 n17" if kind.endswith("unknown words") else TEXT
    ids = wanted(text)["input_ids"]
    assert len(ids) > 1 and found(text)["input_ids"] == ids and found.decode(ids) == wanted.decode(ids)


UNREAD = {
    "cut": lambda f: (tiny_models.add_tokenizer(f) / "tokenizer.json").write_bytes(b'{"version": "1.0", "trunca'),
    "of an unknown kind": lambda f: (tiny_models.add_tokenizer(f) / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "Odd"}}'
    ),
    "empty": lambda f: (tiny_models.add_tokenizer(f) / "tokenizer.json").write_text(""),
    "a pointer": lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n"),
    "broken, with words beside": lambda f: (
        tiny_tokenizers.vocabulary_and_merges(f),
        (f / "tokenizer.json").write_text("{}"),
    ),
    "no sentencepiece": lambda f: (f / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15"),
    "under a name that the class does not read": lambda f: tiny_tokenizers.tiktoken(f, "words.tiktoken"),
    "spiece.model": lambda f: (f / "spiece.model").write_bytes(b"\n\x0e\n\x05<unk>\x15"),
    "sentencepiece.bpe.model": lambda f: (f / "sentencepiece.bpe.model").write_bytes(b"\n\x0e\n\x05<unk>\x15"),
    "vocab.txt without a class": tiny_tokenizers.words,
    "no vocabulary": lambda f: tiny_tokenizers.configured(f, "LlamaTokenizer"),
    "a broken tekken.json": lambda f: (f / "tekken.json").write_text("{}"),
}


@pytest.mark.parametrize("kind", UNREAD)
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_what_transformers_cannot_read_is_refused_by_its_name(source, target, kind, model):
    source = source(UNREAD[kind], model)
    if model == "qwen2" and kind == "vocab.txt without a class":
        (source / "vocab.txt").rename(source / "qwen.tiktoken")  # transformers makes a tokenizer without words of it
    name = tokenizer_files(path.name for path in source.iterdir())[0]
    target = target(source)
    with pytest.raises(UnsupportedModelError, match=f"source/{name}: the tokenizer cannot be read: .*leave") as caught:
        export_tokenizer(target, source)
    assert caught.value.option == "tokenizer" and "\n" not in str(caught.value)
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_no_tokenizer(source, target):
    """For GPT-2 without a vocabulary transformers makes a tokenizer of one special token."""
    source = source(lambda folder: (folder / "added_tokens.json").write_text('{"<x>": 5}'), "gpt2")
    export_tokenizer(target := target(source), source)
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_files_are_copied_where_the_saved_tokenizer_gives_other_ids(source, target, monkeypatch):
    save = module._save

    def with_other_words(tokenizer, folder):
        save(tokenizer, folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        content["normalizer"] = {"type": "Lowercase"}
        (folder / "tokenizer.json").write_text(json.dumps(content))

    monkeypatch.setattr(module, "_save", with_other_words)
    source = source(tiny_tokenizers.tekken)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    target = target(source)
    export_tokenizer(target, source)
    assert sorted(path.name for path in target.iterdir()) == ["chat_template.jinja", "config.json", "tekken.json"]
    assert (target / "tekken.json").read_bytes() == (source / "tekken.json").read_bytes()
    (source / "tekken.json").rename(source / "tokenizer.json")  # which a copy does not have under that name any more
    monkeypatch.setattr(module, "_is_read", lambda folder, tokenizer: False)
    tiny_models.add_tokenizer(source)
    with pytest.raises(
        UnsupportedModelError, match="neither a copy of the tokenizer nor what transformers saves"
    ) as caught:
        export_tokenizer(target, source)
    assert caught.value.option == "tokenizer"


def test_a_container_carries_it_and_gives_its_ids(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "model", vocab_size=300)
    tiny_tokenizers.tekken(folder)
    bstack.compress(folder, tmp_path / "a.bstk", settings=SETTINGS)
    _, found = bstack.load(tmp_path / "a.bstk")
    assert found(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    """Such as one whose tokenizer is in a folder of its own, where transformers does not look."""
    folder = tiny_models.save("llama", tmp_path / "model")
    (folder / "tokenizer").mkdir()
    tiny_models.add_tokenizer(folder / "tokenizer")
    with pytest.warns(ModelWarning, match="^model: no tokenizer was found beside the weights"):
        bstack.compress(folder, tmp_path / "a.bstk", settings=SETTINGS)
    assert bstack.load(tmp_path / "a.bstk")[1] is None


def test_an_unreadable_tokenizer_is_refused_before_any_work_or_left_out(tmp_path, capsys, monkeypatch):
    folder = tiny_models.save("llama", tmp_path / "model")
    tiny_tokenizers.tiktoken(folder, "words.tiktoken")
    monkeypatch.setattr("bstack.models.safetensors.SafetensorsCheckpoint.provenance", None)  # reads all weights
    with pytest.raises(UnsupportedModelError, match=r"words\.tiktoken"):
        bstack.compress(folder, tmp_path / "a.bstk", settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelWarning)
        bstack.compress(folder, tmp_path / "a.bstk", settings=SETTINGS.with_changes(tokenizer=False))
    model, tokenizer = bstack.load(tmp_path / "a.bstk")
    assert tokenizer is None and model(torch.tensor([[5, 6]])).logits.isfinite().all()
    with bstk.open(tmp_path / "a.bstk") as file:
        assert sorted(file.files) == ["config.json", "generation_config.json"]


def test_the_tokenizer_of_a_gguf_file(tmp_path, target, source, monkeypatch):
    """One without a tokenizer has none, whatever lies beside it; one that transformers cannot read is refused."""
    checkpoint = GGUFCheckpoint(tiny_gguf.write(tmp_path / "tiny.gguf"))
    (tmp_path / "spiece.model").write_bytes(b"of another model")
    folder = target(source(lambda folder: None))
    checkpoint.export_tokenizer(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    checkpoint._reader.fields["tokenizer.ggml.tokens"] = None
    with pytest.raises(UnsupportedModelError, match=r"tiny\.gguf: the tokenizer cannot be read"):
        checkpoint.export_tokenizer(folder)


class Words:
    @staticmethod
    def convert_ids_to_tokens(number):
        return f"<{number}>"


def test_ids_beyond_the_embedding():
    check_ids(torch.tensor([[0, 210]]), 211, Words(), "a.txt")
    with pytest.raises(UnsupportedModelError, match=r"^a\.txt: the tokenizer gives '<211>' the id 211.*has 211 rows"):
        check_ids(torch.tensor([[0, 211], [5, 3]]), 211, Words(), "a.txt")
