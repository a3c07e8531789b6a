"""A kind that is added after version 1.0: announced by a flag, so that older readers refuse the file and say why."""

import pytest
import samples

import bstk
from bstk import kinds

LATER = kinds.Kind(
    900, "later", is_weight=True, is_block=True, rule=lambda shape, dtype, rank: None, feature=1 << 5, on=("sign",)
)


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(kinds.BY_CODE, LATER.code, LATER)


@pytest.fixture
def written(tmp_path, known):
    chunks = samples.entries()
    chunks.append(samples.entry("layers.0.up", LATER, b"something new", level=3, shape=(4, 10), dtype="u8"))
    bstk.write(tmp_path / "later.bstk", {}, chunks, samples.BASE)
    return (tmp_path / "later.bstk").read_bytes()


def test_reader_that_knows_it(written):
    with bstk.open(written) as f:
        assert f.preamble.incompatible == 1 << 5
        assert f.read(f.chunks[-1]) == b"something new" and f.chunks[-1].kind is LATER


def test_flag_without_the_kind_and_kind_without_the_flag(written, good):
    for data, flags in ((written, 0), (good, 1 << 5)):
        draft = samples.Draft(data)
        draft.forced["incompatible"] = flags
        with pytest.raises(bstk.DamagedError, match="the kinds in the index need"):
            bstk.open(draft.bytes())


def test_reader_that_does_not_know_it(written, monkeypatch):
    monkeypatch.delitem(kinds.BY_CODE, LATER.code)
    with pytest.raises(bstk.UnsupportedVersionError, match="incompatible flags 0x20"):
        bstk.open(written)
