"""Files inside a container that make transformers raise all kinds of errors: one documented error, in words, for each."""

import json

import pytest
import samples

import bstack
import bstk
from bstack.cli import main

SETTINGS = bstack.Settings(codec="sign", planes=1, rank=1, samples=2, sequence_length=16)
CONFIG, TOKENIZER, WORDS, GENERATION = (
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "generation_config.json",
)

NO_JSON = {
    "cut": b'{"model_type": "llama"',
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "empty": b" ",
    "no UTF-8": b'{"a": "\xff"}',
    "deep": b"[" * 100_000,
    "twice": b"{}{}",
    "huge number": b'{"model_type": ' + b"9" * 5000 + b"}",
}
CHANGES = {
    CONFIG: [
        {"model_type": "unknown"},
        {"model_type": 5},
        {"model_type": ["llama"]},
        {"model_type": None},
        {"model_type": "bert"},
        {"model_type": "t5"},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": 3},
        {"hidden_size": 0},
        {"hidden_size": -8},
        {"hidden_size": "x"},
        {"hidden_size": 10**12},
        {"hidden_size": 56},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"num_key_value_heads": 0},
        {"vocab_size": -1},
        {"vocab_size": 100},
        {"vocab_size": "many"},
        {"intermediate_size": 1},
        {"hidden_act": "os.system"},
        {"hidden_act": 7},
        {"rope_parameters": 5},
        {"rope_parameters": {"rope_type": "evil"}},
        {"rms_norm_eps": "x"},
        {"attn_implementation": 5},
        {"attention_bias": True},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"quantization_config": "x"},
        {"head_dim": 0},
        {"head_dim": 10**15},
        {"pad_token_id": 10**6},
        {"layer_types": ["evil", "evil"]},
        {"tie_word_embeddings": False, "num_hidden_layers": 10**6},
    ],
    TOKENIZER: [
        {"tokenizer_class": "os.system", "auto_map": {"AutoTokenizer": ["x.y", None]}},
        {"added_tokens_decoder": {"x": 5}},
        {"tokenizer_class": 5},
        {"auto_map": {"AutoTokenizer": {"a": 1}}, "tokenizer_class": "Nothing"},
    ],
    WORDS: [
        {"model": None},
        {"model": {"type": "evil"}},
        {"added_tokens": 7},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}},
    ],
    GENERATION: [
        {"max_length": "x"},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": -1},
        {"eos_token_id": "x"},
        {"cache_implementation": "evil"},
        {"temperature": "hot", "do_sample": True},
        {"forced_bos_token_id": 10**9},
        {"suppress_tokens": [10**9]},
        {"prompt_lookup_num_tokens": 3},
        {"stop_strings": 5},
        {"num_return_sequences": 2},
    ],
}
CASES = [(name, what, content) for name in (CONFIG, TOKENIZER, WORDS, GENERATION) for what, content in NO_JSON.items()]
CASES += [(name, json.dumps(change)[:60], change) for name, changes in CHANGES.items() for change in changes]


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.bstk"
    bstack.compress(tiny_llama, path, settings=SETTINGS)
    return path


def with_file(whole, path, name, content):
    """Write the container again with one file in place of another; a dictionary changes what was there."""
    with bstk.open(whole) as file:
        if isinstance(content, dict):
            content = json.dumps({**(json.loads(file.file(name)) if name in file.files else {}), **content}).encode()
        files = {**{inside: file.file(inside) for inside in file.files}, name: content}
        others = [
            samples.entry(
                c.name,
                c.kind,
                file.read(c),
                level=c.level,
                shape=c.shape,
                dtype=c.dtype,
                rank=c.rank,
                transposed=c.transposed,
            )
            for c in file.chunks
            if c.kind != bstk.FILE
        ]
        base = file.base_count - len(file.files) + len(files)
        bstk.write(
            path, file.metadata, [samples.entry(key, bstk.FILE, data) for key, data in files.items()] + others, base
        )


@pytest.mark.parametrize(("name", "what", "content"), CASES, ids=[f"{name}: {what}" for name, what, _ in CASES])
def test_hostile_file(whole, tmp_path, monkeypatch, capsys, name, what, content):
    monkeypatch.chdir(tmp_path)
    with_file(whole, tmp_path / "bad.bstk", name, content)
    refused = 0
    for mode in ("dense", "stack"):
        try:
            bstack.load("bad.bstk", mode=mode)
        except bstk.BstkError as error:
            refused += 1
            assert str(error).endswith(".") or "bad.bstk" in str(error), error
            assert "\n" not in str(error)
    with pytest.raises(SystemExit) as caught:
        main.main(["run", "bad.bstk", "-p", "the river", "--mb", "100", "--max-new-tokens", "4"])
    _out, err = capsys.readouterr()
    assert "unexpected" not in err and "Traceback" not in err, err
    assert caught.value.code == 0 or (
        caught.value.code in (1, 2, 5, 7) and err.splitlines()[-1].startswith("Error: ")
    ), err
    # What cannot be loaded packed cannot be run; and no file that is no JSON is passed over.
    assert caught.value.code or not refused
    assert caught.value.code or isinstance(content, dict) or name == GENERATION, "a broken file is used"


def test_the_file_itself_is_good(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with_file(whole, tmp_path / "good.bstk", "note.txt", b"hello")
    with pytest.raises(SystemExit) as caught:
        main.main(["run", "good.bstk", "-p", "the river", "--mb", "100", "--max-new-tokens", "4"])
    assert caught.value.code in (0, None), capsys.readouterr().err
