"""Where calibration texts come from: files, folders and data sets of the hub."""

import gzip
import json
import os
import sys
import threading
import types
import warnings

import pytest

from bstack.calibration import texts
from bstack.calibration.texts import TextSource, open_text, token_windows
from bstack.errors import ModelWarning
from bstk.errors import BstkError, UsageError


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text, **_options):
        return {"input_ids": [ord(c) for c in text]}


def test_windows_are_spread_over_the_text():
    text = TextSource("t", "".join(chr(i) for i in range(1000)))
    windows = token_windows(text, Letters(), 4, 10)
    assert windows[:, 0].tolist() == [0, 250, 500, 750] and windows[3].tolist() == list(range(750, 760))
    assert token_windows(TextSource("t", "x" * 40), Letters(), 4, 10).shape == (4, 10)
    assert token_windows(text, Letters(), 4, 10, held_out=2).shape == (6, 10)
    with pytest.raises(BstkError, match="39 tokens, but 4 samples of 10 need 40"):
        token_windows(TextSource("t", "x" * 39), Letters(), 4, 10)
    for length, advice in ((30, "Give a longer text, or at most 1 samples."), (20, "Give a longer text.")):
        with pytest.raises(BstkError) as caught:
            token_windows(TextSource("t", "x" * length), Letters(), 4, 10, held_out=2)
        assert caught.value.hint == advice


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("Füße\n", encoding="utf-8")
    assert open_text(str(tmp_path / "a.txt")) == TextSource("a.txt", "Füße\n")
    (tmp_path / "b.JSONL").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert open_text(str(tmp_path / "b.JSONL")).text == "one\n\ntwo"


def test_folders_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in {"z.md": "last", "a.txt": "first", "deep/m.txt": "middle", "picture.png": "no"}.items():
        (tmp_path / name).write_text(text)
    assert open_text(str(tmp_path)).text == "first\n\nmiddle\n\nlast"
    assert open_text(str(tmp_path)).name == tmp_path.name


def test_no_more_is_read_than_the_bound(tmp_path, monkeypatch):
    read = []
    original = texts._records

    def counting(*args):
        for text in original(*args):
            read.append(text)
            yield text

    monkeypatch.setattr(texts, "_records", counting)
    monkeypatch.setattr(texts, "MAX_CHARACTERS", 20)
    (tmp_path / "a.jsonl").write_text('{"text":"abcdef"}\n' * 50)
    (tmp_path / "b.txt").write_text("x" * 50)
    (tmp_path / "c.txt").write_bytes(b"\xff" * 50)  # would be refused
    assert open_text(str(tmp_path / "a.jsonl")).text == "abcdef\n\nabcdef\n\nabcd"
    assert len(read) == 3
    assert open_text(str(tmp_path / "b.txt")).text == "x" * 20
    assert open_text(str(tmp_path)).text == "abcdef\n\nabcdef\n\nabcd"
    (tmp_path / "a.jsonl").write_text('{"text": "this is too long"}\n')
    with pytest.raises(BstkError, match=r"a\.jsonl, line 1: longer than 20 characters"):
        open_text(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("line", ["[1]", '"text"', "{", '{"txt": "x"}', "7"])
def test_records_that_are_none(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
    with pytest.raises(BstkError, match="line 2"):
        open_text(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ('{"text": null}', '"text" is null'),
        ('{"text": 5}', '"text" is 5'),
        ('{"text": ["a", "b"]}', r'"text" is \["a", "b"\]'),
        ('{"text": {"a": "b"}}', '"text" is {"a": "b"}'),
        ('{"text": true}', '"text" is true'),
        ('{"text": "a \\ud800 b"}', r"half a character, \\ud800\."),
        ('{"messages": [{"role": "user", "content": "x"}], "id": 1}', 'no "text" field, only id, messages'),
        ("[" * 100_000, "expected a JSON object"),
    ],
)
@pytest.mark.parametrize("form", ["lines", "array", "pipe"])
def test_a_record_without_a_text_is_named(tmp_path, record, words, form):
    if form == "array" and record[0] != "[":
        (tmp_path / "a.json").write_text(f'[{{"text": "x"}},\n{record}]')
        where = r"a\.json, record 2: "
    elif form == "pipe":
        with piped(f'{{"text": "x"}}\n\n{record}\n'.encode()) as path, pytest.raises(BstkError, match=words):
            open_text(path)
        return
    else:
        (tmp_path / "a.json").write_text(f'{{"text": "x"}}\n\n{record}\n')
        where = r"a\.json, line 3: "
    with pytest.raises(BstkError, match=where + ".*" + words):
        open_text(str(tmp_path / "a.json"))


class piped:
    """The path of a pipe that a process of a shell or a thread here fills, as in ``<(zcat text.gz)``."""

    def __init__(self, data):
        self.data = data

    def __enter__(self):
        self.end, start = os.pipe()
        self.thread = threading.Thread(target=self.fill, args=(start,))
        self.thread.start()
        return f"/dev/fd/{self.end}"

    def fill(self, start):
        try:
            with open(start, "wb") as stream:
                stream.write(self.data)
        except BrokenPipeError:
            pass

    def __exit__(self, *_error):
        os.close(self.end)
        self.thread.join()


def test_whole_characters_of_two_escapes_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert open_text(str(tmp_path / "a.jsonl")).text == "\U0001f600"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(("name", "record"), [("a.txt", False), ("a", False), ("a.jsonl", True), ("a.json", True)])
def test_a_byte_order_mark_is_no_text(tmp_path, encoding, name, record):
    text = "Füße\n\u4e2d."
    data = json.dumps({"text": text}) + "\r\n" if record else text.replace("\n", "\r\n")
    mark = "\ufeff" if encoding[-2:] in ("le", "be") else ""
    (tmp_path / name).write_bytes((mark + data).encode(encoding))
    assert open_text(str(tmp_path / name)).text == text
    if encoding == "utf-8-sig" and record:  # files with marks that were put together
        (tmp_path / name).write_bytes(2 * data.encode(encoding))
        assert open_text(str(tmp_path / name)).text == f"{text}\n\n{text}"


def test_arrays_of_records_and_one_record(tmp_path):
    (tmp_path / "a.json").write_text('[\n {"text": "one"},\n {"text": "two"}\n]')
    assert open_text(str(tmp_path / "a.json")) == TextSource("a.json", "one\n\ntwo")
    (tmp_path / "a.json").write_text('{"text": "one"}\n\n{"text": "two"}')
    assert open_text(str(tmp_path / "a.json")).text == "one\n\ntwo"
    (tmp_path / "a.json").write_text('{\n"text":\n"one"}')
    assert open_text(str(tmp_path / "a.json")).text == "one"


@pytest.mark.parametrize("hidden", ["._a.txt", ".git/a.txt", "deep/.cache/a.jsonl", "__MACOSX/._a.txt"])
def test_hidden_files_in_a_folder_are_none_of_its_texts(tmp_path, hidden):
    folder = tmp_path / ".texts"  # a hidden folder that was asked for is one
    (folder / hidden).parent.mkdir(parents=True)
    (folder / hidden).write_bytes(b"\x00\x05\x16\x07Mac OS X\xb0")
    with pytest.raises(BstkError, match="holds no text"):
        open_text(str(folder))
    (folder / "a.txt").write_text("seen")
    (folder / "picture.png").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_text(str(folder)) == TextSource(".texts", "seen")


def test_files_of_a_folder_that_are_left_out_are_named(tmp_path):
    for name in ("a.txt", "b.json", "c.txt.gz"):
        (tmp_path / name).write_text("x")
    with pytest.warns(ModelWarning, match=r"b\.json is left out \(files like it: 2\)"):
        assert open_text(str(tmp_path)).text == "x"


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="process substitution of POSIX")
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain\n{text}\n" * 20_000, "plain\n{text}\n" * 20_000),
        (b"{no record}\nmore", "{no record}\nmore"),
        (b'{"text": "one"}\n{"text": "two"}\n', "one\n\ntwo"),
        (b'\n \n{"text": "one"}\n{"text": "two"}\n', "one\n\ntwo"),
        (b'  {"text": "one"}\n  {"text": "two"}', "one\n\ntwo"),
        (b'{\n "text": "one"\n}\n{\n "text": "two"\n}\n', "one\n\ntwo"),
        (b'[{"text": "one"}, {"text": "two"}]', "one\n\ntwo"),
        (b'\n[\n {"text": "one"},\n {"text": "two"}\n]\n', "one\n\ntwo"),
        (b"[1] A note.\n[2] Another.", "[1] A note.\n[2] Another."),
        (b"[[1, 2], 3]", "[[1, 2], 3]"),
        (b"\xef\xbb\xbfmark", "mark"),
        (b"", ""),
    ],
)
def test_pipes(tmp_path, data, text):
    with piped(data) as path:
        assert open_text(path) == TextSource("(pipe)", text)
    os.mkfifo(tmp_path / "a.jsonl")
    filling = threading.Thread(target=(tmp_path / "a.jsonl").write_bytes, args=(b'{"text": "x"}',))
    filling.start()
    assert open_text(str(tmp_path / "a.jsonl")) == TextSource("(pipe)", "x")
    filling.join()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"some\x00text", "character 4 is NUL"),
        ("a", b"some text".decode().encode("utf-16-le"), "character 1 is NUL"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0), "compressed with gzip. Unpack it"),
        ("a.txt", b"\xff\xfea\x00b", "is not UTF-16"),
    ],
)
def test_files_that_are_no_text(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BstkError, match=f"{name}.*{words}"):
        open_text(str(tmp_path / name))


def test_hub_data_sets(monkeypatch):
    asked = []

    def load_dataset(name, configuration, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert open_text("owner/set") == TextSource("owner/set", "one\n\ntwo")
    open_text("owner/set:small")
    open_text("set:small:validation")
    assert asked == [
        ("owner/set", None, "train", True),
        ("owner/set", "small", "train", True),
        ("set", "small", "validation", True),
    ]


def test_no_more_of_a_data_set_is_fetched_than_the_bound(monkeypatch):
    fetched = []

    def rows():
        for number in range(100):
            fetched.append(number)
            yield {"text": "abcdef"}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_a, **_k: rows()))
    monkeypatch.setattr(texts, "MAX_FETCHED", 20)
    assert open_text("owner/set").text == "abcdef\n\nabcdef\n\nabcd" and fetched == [0, 1, 2]


def test_hub_data_sets_without_texts(monkeypatch):
    rows = [{"label": 1, "content": "x"}]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_a, **_k: rows))
    with pytest.raises(BstkError, match='row 1: no "text" field, only content, label'):
        open_text("owner/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install"):
        open_text("owner/set")
