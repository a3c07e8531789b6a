"""Tokenizers of GGUF files: the tokens that their keys ask for, or a refusal that names the key."""

from __future__ import annotations

import json

import pytest
import tiny_gguf
import tiny_models
import transformers
from tokenizers import Tokenizer, pre_tokenizers

from bstack.errors import ModelWarning, UnsupportedModelError
from bstack.models.gguf import GGUFCheckpoint

gguf = pytest.importorskip("gguf")

# The pieces of "a 12, 3456" by tokenizer.ggml.pre.
BPE = [
    "1",
    "2",
    "12",
    "3",
    "4",
    "5",
    "6",
    "34",
    "345",
    "56",
    "3456",
    "a",
    ",",
    "\u0120",
    "\u01201",
    "\u012012",
    "\u0120a",
]
BPE += [*(f"<{i}>" for i in range(211 - len(BPE)))]
MERGES = ["\u0120 1", "\u01201 2", "1 2", "3 4", "5 6", "34 56", "34 5", "\u0120 a"]
SPLITS = {
    "gpt-2": ["a", "\u012012", ",", "\u0120", "3456"],
    "smollm": ["a", "\u0120", "1", "2", ",", "\u0120", "3", "4", "5", "6"],
    "starcoder": ["a", "\u0120", "1", "2", ",", "\u0120", "3", "4", "5", "6"],
    "falcon": ["a", "\u0120", "12", ",", "\u0120", "345", "6"],
    "stablelm2": ["a", "\u0120", "1", "2", ",", "\u0120", "3", "4", "5", "6"],
    "bloom": ["a", "\u012012", ",", "\u0120", "3456"],
    "llama-bpe": ["a", "\u0120", "12", ",", "\u0120", "345", "6"],
}


def exported(tmp_path, **keys):
    """The tokenizer that a container carries of a GGUF file with these keys."""
    keys = {f"tokenizer.{name}": value for name, value in keys.items()}
    checkpoint = GGUFCheckpoint(tiny_gguf.write(tmp_path / "m.gguf", keys=keys))
    checkpoint.config.save_pretrained(tmp_path / "out")
    checkpoint.export_tokenizer(tmp_path / "out")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


def byte_level(**keys):
    common = {"ggml.model": "gpt2", "ggml.tokens": BPE, "ggml.token_type": [1] * 211, "ggml.merges": MERGES}
    return {**common, "ggml.eos_token_id": 30, **keys}


@pytest.mark.parametrize("pre", SPLITS)
def test_text_is_split_as_the_file_says(tmp_path, pre):
    assert exported(tmp_path, **byte_level(**{"ggml.pre": pre})).tokenize("a 12, 3456") == SPLITS[pre]


def test_a_split_that_is_not_known_is_refused_and_a_missing_one_named(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.pre is 'deepseek-coder'") as raised:
        exported(tmp_path, **byte_level(**{"ggml.pre": "deepseek-coder"}))
    assert raised.value.option == "tokenizer"
    with pytest.warns(ModelWarning, match=r"does not say how .*tokenizer\.ggml\.pre.* GPT-2"):
        assert exported(tmp_path, **byte_level()).tokenize("a 12, 3456") == SPLITS["gpt-2"]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_space_before_the_text(tmp_path, prefix):
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a", *(f"<x{i}>" for i in range(205))]
    keys = {"ggml.model": "llama", "ggml.tokens": tokens, "ggml.scores": [-float(i) for i in range(211)]}
    keys |= {"ggml.token_type": [2, 3, 3] + [1] * 208, "ggml.add_space_prefix": prefix, "ggml.eos_token_id": 2}
    if prefix:
        assert exported(tmp_path, **keys).tokenize("a") == ["\u2581a"]
    else:
        with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.add_space_prefix is False"):
            exported(tmp_path, **keys)


def test_chat_templates_with_names(tmp_path):
    keys = {"ggml.pre": "qwen2", "chat_template": "A", "chat_template.tool_use": "B", "chat_templates": ["tool_use"]}
    assert exported(tmp_path, **byte_level(**keys)).chat_template == {"default": "A", "tool_use": "B"}


@pytest.mark.parametrize(("model", "written"), [("gpt2", True), ("rwkv", False)])
def test_a_tokenizer_is_read_or_refused(tmp_path, model, written):
    tokens = [*"abc ", "ab", *(f"<{i}>" for i in range(206))]
    keys = {
        "model": model,
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * 211,
        "merges": ["a b"],
        "eos_token_id": 3,
    }
    keys = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    checkpoint = GGUFCheckpoint(tiny_gguf.write(tmp_path / "m.gguf", keys=keys))
    out = tmp_path / "out"
    checkpoint.config.save_pretrained(out)
    if written:
        checkpoint.export_tokenizer(out)
        assert (out / "tokenizer.json").is_file()
    else:
        with pytest.raises(UnsupportedModelError, match=r"the tokenizer cannot be read: .*'rwkv'") as raised:
            checkpoint.export_tokenizer(out)
        assert raised.value.option == "tokenizer"


@pytest.mark.parametrize("kind", ["LlamaConfig", "Starcoder2Config"])
def test_words_are_cut_as_the_file_says(tmp_path, kind, recwarn):
    """Against a tokenizer with the pre-tokenizer of the models that have the name; for others there is a refusal."""
    folder = tiny_models.add_tokenizer(tiny_models.save("llama", tmp_path / "model"))
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = sorted(reference.get_vocab(), key=reference.token_to_id)
    merges = json.loads(reference.to_str())["model"]["merges"]
    keys = {"model": "gpt2", "tokens": vocabulary, "token_type": [3] * 3 + [1] * (len(vocabulary) - 3)}
    keys["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    model = tiny_gguf.built(kind, vocab_size=len(vocabulary))
    # As transformers reads it, of any model.
    named = {f"tokenizer.ggml.{key}": value for key, value in {**keys, "pre": "llama-bpe"}.items()}
    tiny_gguf.write(tmp_path / "m.gguf", model, keys=named)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    llama3 = read.backend_tokenizer.pre_tokenizer
    assert isinstance(llama3[0], pre_tokenizers.Split)
    text = "the river's number  12345,\t6 DON'T   stop\n\n"
    for name, expected, warned in (
        ("gpt-2", words, False),
        ("smollm", apart, False),
        ("llama-bpe", llama3, False),
        (None, words, True),
    ):
        named = {f"tokenizer.ggml.{key}": value for key, value in {**keys, "pre": name}.items()}
        checkpoint = GGUFCheckpoint(tiny_gguf.write(tmp_path / "m.gguf", model, keys=named))
        out = tmp_path / f"{name}"
        checkpoint.config.save_pretrained(out)
        recwarn.clear()
        checkpoint.export_tokenizer(out)
        said = [str(warning.message) for warning in recwarn if warning.category is ModelWarning]
        assert len(said) == warned and all("tokenizer.ggml.pre" in message for message in said)
        reference.pre_tokenizer = expected
        found = transformers.AutoTokenizer.from_pretrained(out)(text, add_special_tokens=False)["input_ids"]
        assert found == reference.encode(text, add_special_tokens=False).ids, name
    named["tokenizer.ggml.pre"] = "of-tomorrow"
    checkpoint = GGUFCheckpoint(tiny_gguf.write(tmp_path / "m.gguf", model, keys=named))
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.pre is 'of-tomorrow'"):
        checkpoint.export_tokenizer(out)
