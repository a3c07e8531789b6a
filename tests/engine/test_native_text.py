"""Choosing tokens and writing text without torch, held against transformers."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process

import bstack
import bstk
from bstack.engine.chat_template import render
from bstack.engine.native import generate, sampling
from bstack.engine.native.architecture import NotNativeError
from bstack.engine.native.load import load
from bstack.errors import UnsupportedModelError
from bstack.models import tokenizer as tokenizer_of_models
from bstack.models.tokenizer import export_tokenizer

SETTINGS = bstack.Settings(codec="trellis", planes=2, samples=2, sequence_length=16)
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{{ eos_token }}"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny_models.add_tokenizer(tiny_models.save("llama", tmp_path_factory.mktemp("text") / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def path(source):
    target = source.parent / "model.bstk"
    bstack.compress(source, target, settings=SETTINGS)
    return target


@pytest.fixture(scope="module")
def native(path):
    return load(path)


def write(native, prompt="the river", **options):
    model, tokenizer = native
    pieces = []
    ids = generate.encode_prompt(tokenizer, prompt, chat=False)
    written = generate.write_text(model, tokenizer, ids, pieces.append, **{"max_new_tokens": 20, **options})
    assert "".join(pieces) == written.text
    return written


OPTIONS = [
    {"temperature": 0.7, "top_k": None},
    {"top_k": 5},
    {"top_k": 500, "top_p": 0.6},
    {"top_k": 0, "top_p": 0.9, "temperature": 3.0},
    {"top_p": 0.01},
    {"min_p": 0.3, "temperature": 2.0},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.2, "temperature": 1.5},
    {"min_p": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_chances_are_those_of_transformers(options):
    rng = np.random.default_rng(0)
    for _ in range(5):
        logits = (3 * rng.standard_normal(211)).astype(np.float32)
        config = {**sampling._NEUTRAL, "top_k": 50, "top_p": 1.0, "min_p": None, "temperature": 1.0, **options}
        warpers = LogitsProcessorList()
        warpers.append(logits_process.TemperatureLogitsWarper(float(config["temperature"])))
        if config["top_k"]:
            warpers.append(logits_process.TopKLogitsWarper(config["top_k"]))
        if config["top_p"] < 1:
            warpers.append(logits_process.TopPLogitsWarper(config["top_p"]))
        if config["min_p"] is not None:
            warpers.append(logits_process.MinPLogitsWarper(config["min_p"]))
        expected = torch.softmax(warpers(None, torch.from_numpy(logits)[None]), -1)[0].numpy()
        tokens, chances = sampling.candidates(logits, sampling.Sampling(do_sample=True, **options))
        found = np.zeros(211, np.float32)
        found[tokens] = chances
        assert np.allclose(found, expected, atol=1e-6) and set(tokens) == set(np.flatnonzero(expected))


def test_the_penalty_is_that_of_transformers():
    rng = np.random.default_rng(1)
    logits, prompt = rng.standard_normal(50).astype(np.float32), [3, 3, 7, 99]
    sampler = sampling.Sampler(sampling.Sampling(repetition_penalty=1.7), 50, prompt)
    processor = logits_process.RepetitionPenaltyLogitsProcessor(1.7)
    seen = prompt[:3]
    for _ in range(10):
        expected = processor(torch.tensor([seen]), torch.from_numpy(logits)[None])[0].numpy()
        assert np.allclose(sampler._penalised(logits), expected)
        seen.append(sampler.choose(logits))
        assert seen[-1] == expected.argmax()


def test_penalties_of_the_new_text_and_biases():
    """As OpenAI describes them; the prompt does not count."""
    rng = np.random.default_rng(2)
    options = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "bias": {4: 2.5, 9: -100.0}}
    sampler, counts = sampling.Sampler(sampling.Sampling(**options), 12, [4, 4, 4]), np.zeros(12)
    for _ in range(30):
        logits = rng.standard_normal(12).astype(np.float32)
        expected = logits - 0.7 * (counts > 0) - 0.4 * counts
        expected[4] += 2.5
        expected[9] -= 100
        assert np.allclose(sampler._penalised(logits), expected, atol=1e-5)
        token = sampler.choose(logits)
        assert token == expected.argmax() != 9
        counts[token] += 1


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = sampling.Sampler(sampling.Sampling(do_sample=True), 3, seed=3)
    counts = np.bincount([sampler.choose(logits) for _ in range(4000)], minlength=3) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.03


def test_greedy_text_is_that_of_transformers(native, path):
    model, tokenizer = bstack.load(path, mode="packed")
    for options in ({}, {"repetition_penalty": 1.4}):
        ids = tokenizer("the river", return_tensors="pt")
        text = model.generate(**ids, max_new_tokens=20, do_sample=False, pad_token_id=0, **options)
        expected = tokenizer.decode(text[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert write(native, **options).text == expected


def test_the_same_seed_gives_the_same_text(native):
    draw = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 30}
    assert (
        write(native, seed=1, **draw).text == write(native, seed=1, **draw).text != write(native, seed=2, **draw).text
    )


def test_a_string_or_a_token_ends_a_text(native, monkeypatch):
    whole = write(native).text
    stop = whole[5:9]
    stopped = write(native, stop=[stop, "never written"])
    assert stopped.text.startswith(whole[: whole.index(stop)]) and stop in stopped.text
    first = next(count for count in range(1, 20) if stop in write(native, max_new_tokens=count).text)
    assert stopped.new_tokens == first
    model, tokenizer = native
    ids = tokenizer.encode("the river", special=True)
    text = model.sequence()
    logits, own = model.read(text, ids), []
    for _ in range(5):
        own.append(int(logits.argmax()))
        logits = model.step([text], own[-1:])[0]
    ends = sampling.Generation(frozenset((own[3],)), (), sampling.Sampling())
    monkeypatch.setattr(model, "generation", ends)
    assert write(native).new_tokens == own.index(own[3]) + 1


def test_the_context_ends_a_text(native):
    model, tokenizer = native
    ids = tokenizer.encode("the river " * 10, special=True)[:60]
    written = generate.write_text(model, tokenizer, ids, lambda _: None, max_new_tokens=500)
    assert written.prompt_tokens + written.new_tokens <= 128
    with pytest.raises(bstk.UsageError, match="reads at most 128"):
        generate.write_text(model, tokenizer, (ids * 128)[:128], lambda _: None, max_new_tokens=5)


def test_ctrl_c_ends_the_text(native):
    model, tokenizer = native
    ids = tokenizer.encode("the river", special=True)
    calls = []

    def once(piece):
        calls.append(piece)
        if len(calls) == 1:
            raise KeyboardInterrupt

    written = generate.write_text(model, tokenizer, ids, once, max_new_tokens=20)
    assert written.interrupted and written.new_tokens <= 2


@pytest.mark.parametrize(
    "prompt", ["the river", " two  spaces", "line\nline\n", "naïve – 文字 🙂", "</s> special <pad>"]
)
def test_prompts_are_encoded_as_by_transformers(prompt, native, path):
    _, theirs = bstack.load(path, mode="packed")
    ours = native[1]
    for special in (True, False):
        assert ours.encode(prompt, special) == theirs(prompt, add_special_tokens=special)["input_ids"]
    ids = ours.encode(prompt, True)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (
        generate.encode_prompt(ours, prompt, chat=True)
        == theirs(render(theirs, prompt), add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize(
    ("changes", "template"),
    [
        ({"split_special_tokens": True}, TEMPLATE),
        ({"extra_special_tokens": {"image_token": "<image>"}}, TEMPLATE + "{{ image_token }}"),
        ({"extra_special_tokens": {"thought": "</s>"}}, TEMPLATE + "{{ thought }}"),
        ({"clean_up_tokenization_spaces": True}, TEMPLATE),
        ({"bos_token": None, "add_bos_token": True}, TEMPLATE),
    ],
)
def test_settings_of_a_tokenizer_count_as_in_transformers(changes, template, source, tmp_path):
    """Prompts, chats and written texts: the ids and words of the tokenizer as it was before it was packed."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    (folder / "chat_template.jinja").write_text(template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    (tmp_path / "packed").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "packed")
    export_tokenizer(tmp_path / "packed", folder)
    packed = {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    file = SimpleNamespace(files=packed, file=packed.get, source=SimpleNamespace(name="a.bstk"))
    ours = generate.TextTokenizer.read(file)
    prompt = "the river </s> don 't stop . <image>"
    for special in (True, False):
        ids = theirs(prompt, add_special_tokens=special)["input_ids"]
        assert ours.encode(prompt, special) == ids and ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": prompt}]
    assert generate.encode_prompt(ours, prompt, chat=True) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_a_copied_tokenizer_is_not_for_this_engine(source, tmp_path, monkeypatch):
    """Where transformers reads another tokenizer from what it saved: its settings may change what tokenizer.json says."""
    monkeypatch.setattr(tokenizer_of_models, "_save", lambda *_: None)
    shutil.copy(source / "config.json", tmp_path)
    export_tokenizer(tmp_path, source)
    packed = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert packed["tokenizer.json"] == (source / "tokenizer.json").read_bytes()
    with pytest.raises(NotNativeError, match="as transformers 5 saves it"):
        generate.TextTokenizer.read(SimpleNamespace(files=packed, file=packed.get))


def test_a_tokenizer_that_changes_written_texts_is_not_for_this_engine(source):
    raw, name = (source / "tokenizer.json").read_bytes(), "clean_up_tokenization_spaces"
    force = {f"{name}_for_bpe_even_though_it_will_corrupt_output": True}
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode()
    for case in ((raw, {name: True, **force}), (words, {name: True})):
        with pytest.raises(NotNativeError, match="removes spaces"):
            generate.TextTokenizer(*case, None)
    generate.TextTokenizer(raw, {name: True}, None)


def test_an_id_beyond_the_embedding(native):
    model, tokenizer = native
    with pytest.raises(UnsupportedModelError, match=r"^the prompt: the tokenizer gives None the id 211.* 211 rows"):
        generate.write_text(model, tokenizer, [5, 211], lambda _text: None, max_new_tokens=2)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"config.json": {}}, None),
        ({"tokenizer.json": {}}, NotNativeError),  # transformers may change what it says
        ({"vocab.txt": {}}, NotNativeError),
        ({"tokenizer.json": {}, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, NotNativeError),
        ({"tokenizer.json": {}, "tokenizer_config.json": {"backend": "sentencepiece"}}, NotNativeError),
        ({"tokenizer.json": {}, "tokenizer_config.json": {"backend": "tokenizers"}}, UnsupportedModelError),
    ],
)
def test_tokenizers_of_other_kinds_are_not_taken_for_none(files, found):
    if found is None:
        assert generate.TextTokenizer.read(embedded(files)) is None
    else:
        with pytest.raises(found) as caught:
            generate.TextTokenizer.read(embedded(files))
        assert type(caught.value) is found


def test_a_tokenizer_that_refuses_a_word():
    made = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedModelError, match="its tokenizer cannot read the prompt"):
        generate.TextTokenizer(made.to_str().encode(), {}, None).encode("b", special=True)


def test_bytes_of_tokens():
    """Those of a letter of several tokens join to it, in both ways of writing bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<é>"])
    read = generate.TextTokenizer(made.to_str().encode(), {}, None)
    text = "aé 文🙂\n\0"
    assert [read.token_bytes(token) for token in read.encode(text, special=False)] == [
        bytes([byte]) for byte in text.encode()
    ]
    assert read.token_bytes(256) == "<é>".encode()
    made = Tokenizer(models.BPE({"\u2581a": 0, "<0xC3>": 1, "<0xA9>": 2, "<0x>": 3}, []))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    read = generate.TextTokenizer(made.to_str().encode(), {}, None)
    assert [read.token_bytes(token) for token in range(4)] == [b" a", b"\xc3", b"\xa9", b"<0x>"]


def test_pieces_join_to_the_text():
    """Letters of several tokens come whole, and what never becomes one comes at the end."""
    raw = "aé文🙂".encode()
    tokenizer = SimpleNamespace(decode=lambda ids, kept: bytes(ids).decode(errors="replace"))
    for cut, expected in ((len(raw), "aé文🙂"), (len(raw) - 1, "aé文\ufffd")):
        pieces = generate.Pieces(tokenizer)
        found = [pieces.add(byte) for byte in raw[:cut]]
        assert "\ufffd" not in "".join(found) and "".join(found) + pieces.rest() == expected
        assert [piece for piece in found if piece] == list(expected.rstrip("\ufffd"))
    pieces = generate.Pieces(tokenizer)
    found = [pieces.add(0x80) for _ in range(100)]
    assert len("".join(found)) > 90, "what is no letter is not held back for ever"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"num_beams": 4}, "num_beams"),
        ({"suppress_tokens": [1]}, "suppress_tokens"),
        ({"a_new_setting": 1}, "a_new_setting"),
        ({"temperature": "hot"}, "temperature to 'hot'"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop_strings": 5}, "stop_strings"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
    ],
)
def test_settings_that_are_not_known_are_named(settings, reason):
    with pytest.raises(NotNativeError, match=reason):
        sampling.Generation.read(embedded({"generation_config.json": settings}))


def test_settings_of_the_model(tmp_path):
    """As transformers writes them all; without them config.json says which token ends a text."""
    GenerationConfig(
        eos_token_id=[2, 5], do_sample=True, top_k=7, temperature=0.6, stop_strings=["END"]
    ).save_pretrained(tmp_path)
    given = json.loads((tmp_path / "generation_config.json").read_text())
    whole = {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params(), **given}
    for settings in (given, whole):
        found = sampling.Generation.read(
            embedded({"generation_config.json": settings, "config.json": {"eos_token_id": 9}})
        )
        assert found.ends == {2, 5} and found.stop == ("END",)
        assert found.sampling == sampling.Sampling(do_sample=True, top_k=7, temperature=0.6)
    assert sampling.Generation.read(embedded({"config.json": {"eos_token_id": 9}})).ends == {9}
    # transformers does not look there where it has generation settings, even without any in them.
    empty = {"generation_config.json": {}, "config.json": {"eos_token_id": 9}}
    assert sampling.Generation.read(embedded(empty)).ends == set()


def embedded(files):
    """A file with some JSON files in it."""
    return SimpleNamespace(
        files=files, file=lambda name: json.dumps(files[name]).encode(), source=SimpleNamespace(name="a.bstk")
    )


def test_what_was_read_is_not_read_again(native, monkeypatch):
    """The next turn of a conversation reads what is new, with the logits of the whole, but for rounding."""
    model, tokenizer = native
    first = tokenizer.encode("the river and the house", special=True)
    text = model.sequence()
    generate.write_text(model, tokenizer, first, lambda _: None, max_new_tokens=5, text=text)
    assert text.tokens[: len(first)] == first and len(text.tokens) == len(first) + 4
    second = [*text.tokens, *tokenizer.encode(" then", special=False)]
    lengths, read = [], model.read
    monkeypatch.setattr(model, "read", lambda text, ids: lengths.append(len(ids)) or read(text, ids))
    generate.write_text(model, tokenizer, second, lambda _: None, max_new_tokens=1, text=text)
    assert lengths == [len(second) - len(first) - 4]
    logits = read(model.sequence(), second)
    text.keep(second)
    assert np.allclose(read(text, second[-1:]), logits, atol=2e-2 * logits.std())
    assert text.keep(first) == len(first) - 1 and text.tokens == first[:-1]
    assert text.keep([first[0], -1, *first[2:]]) == 1 and text.keep([]) == 0
