"""Where calibration texts come from: files, folders and data sets of the hub."""

import sys
import types

import pytest

from bstack.calibration import texts
from bstack.calibration.texts import TextSource, open_text, token_windows
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

    def counting(path):
        for text in original(path):
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
    with pytest.raises(BstkError, match='no "text" column, only content, label'):
        open_text("owner/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install"):
        open_text("owner/set")
