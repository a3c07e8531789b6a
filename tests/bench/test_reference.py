"""The file of log probabilities, and the cache it is kept in."""

import os

import pytest
import torch

import bstk
from bstack.bench import reference
from bstack.bench.reference import Reference, cached, file_bytes, write_reference
from bstack.folders import cache_folder

LOGITS = torch.randn(3, 9, 50, generator=torch.Generator().manual_seed(1)) * 4


def fill(writer):
    for number, logits in enumerate(LOGITS):
        writer.add(number, logits)


@pytest.fixture
def written(tmp_path):
    write_reference(tmp_path / "a.ref", "key", 3, fill, lambda half: {"seen": float(half.window(2).sum())})
    return tmp_path / "a.ref"


def test_what_is_read_is_what_was_written(written):
    reference = Reference(written, "key")
    assert reference.shape == (3, 8, 50)
    for number in range(3):
        found, expected = reference.window(number), LOGITS[number, :-1].log_softmax(-1)
        assert (found - expected).abs().max() < 0.009 and found.dtype == torch.float32
        assert torch.allclose(found.exp().sum(-1), torch.ones(8))
    # What was computed from the unfinished file is what the finished one says.
    assert reference.extra == {"seen": float(reference.window(2).sum())}
    assert written.stat().st_size <= file_bytes(3, 9, 50)


def test_rounding_to_half_precision_is_far_below_any_divergence_of_interest(written):
    p = LOGITS[:, :-1].double().log_softmax(-1)
    q = torch.stack([Reference(written).window(i) for i in range(3)]).double()
    assert (p.exp() * (p - q)).sum(-1).mean() < 1e-6


def test_extreme_logits(tmp_path):
    logits = torch.tensor([[0.0, -1e30, 1e4], [float("-inf"), 0.0, 0.0], [0.0, 0.0, 0.0]])
    reference = write_reference(tmp_path / "r", "k", 1, lambda writer: writer.add(0, logits))
    found = reference.window(0)
    assert found.isfinite().all() and found[0].exp().tolist() == [0, 0, 1]


def test_every_flipped_byte_is_noticed(written):
    data = written.read_bytes()
    for position in (0, 5, 18, 19, 400, 1200, len(data) - 8, len(data) - 3):
        spoilt = bytearray(data)
        spoilt[position] ^= 0x10
        written.write_bytes(spoilt)
        with pytest.raises(bstk.DamagedError):
            Reference(written, "key").check()


@pytest.mark.parametrize("length", [0, 1, 18, 19, 30, 2000, -1, -8, -9])
def test_cut_files_are_refused(written, length):
    written.write_bytes(written.read_bytes()[:length])
    with pytest.raises(bstk.DamagedError):
        Reference(written, "key").check()


def test_of_another_model(written):
    with pytest.raises(bstk.DamagedError, match="another model or text"):
        Reference(written, "other")


def test_windows_come_in_order(tmp_path):
    with pytest.raises(bstk.UsageError, match="in order"):
        write_reference(tmp_path / "r", "k", 2, lambda writer: writer.add(1, LOGITS[0]))
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path):
    def stop(writer):
        fill(writer)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_reference(tmp_path / "r", "k", 3, stop)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "scratch").mkdir()
    return tmp_path


class Maker:
    def __init__(self):
        self.paths = []

    def get(self, key, home, size=4096):
        def make(path):
            self.paths.append(path)
            return write_reference(path, key, 3, fill)

        return cached(key, size, home / "scratch", make)


def test_the_second_time_is_a_hit(home):
    maker = Maker()
    first = maker.get("aa", home)
    second = maker.get("aa", home)
    assert maker.paths == [home / "cache" / "bstack" / "references" / "aa.ref"]
    assert torch.equal(first.window(1), second.window(1))
    maker.get("bb", home)
    assert len(maker.paths) == 2


@pytest.mark.parametrize("spoil", ["flip", "cut", "empty", "other"])
def test_a_damaged_one_is_made_again(home, spoil):
    maker = Maker()
    path = home / "cache" / "bstack" / "references" / "aa.ref"
    maker.get("aa", home)
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    other = path.read_bytes().replace(b'"aa"', b'"zz"')
    path.write_bytes({"flip": bytes(data), "cut": data[:-40], "empty": b"", "other": other}[spoil])
    assert maker.get("aa", home).shape == (3, 8, 50)
    assert len(maker.paths) == 2
    maker.get("aa", home)
    assert len(maker.paths) == 2


def test_the_oldest_make_room(home, monkeypatch):
    maker = Maker()
    maker.get("aa", home)
    size = (cache_folder("references") / "aa.ref").stat().st_size
    monkeypatch.setattr(reference, "LIMIT", 3 * size)
    for age, key in enumerate(["aa", "bb", "cc"]):
        maker.get(key, home, size)
        os.utime(cache_folder("references") / f"{key}.ref", (1000 + age, 1000 + age))
    os.utime(cache_folder("references") / "aa.ref", (2000, 2000))  # used again
    maker.get("dd", home, size)
    assert sorted(path.name for path in cache_folder("references").iterdir()) == ["aa.ref", "cc.ref", "dd.ref"]


def test_one_that_is_too_large_is_not_kept(home, monkeypatch):
    monkeypatch.setattr(reference, "LIMIT", 4000)
    maker = Maker()
    maker.get("aa", home, size=4001)
    assert maker.paths == [home / "scratch" / "aa.ref"] and not (cache_folder("references") / "aa.ref").exists()


def test_a_folder_that_cannot_be_made(home, monkeypatch):
    (home / "cache").write_text("a file in the way")
    maker = Maker()
    assert maker.get("aa", home).shape == (3, 8, 50)
    assert maker.paths == [home / "scratch" / "aa.ref"]


@pytest.mark.parametrize("given", ["", "relative/path"])
def test_the_cache_is_where_its_specification_says(given, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("references") == tmp_path / ".cache" / "bstack" / "references"
