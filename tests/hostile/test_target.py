"""The fuzz target under hypothesis, and that it would notice a reader that breaks its word."""

import bad_files
import pytest
import target
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bstk

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(good):
    return [good, *(bad_files.build(change, good) for change, _ in bad_files.OPEN.values() if change)]


@settings(max_examples=200, deadline=None)
@given(
    number=st.integers(0, 400),
    edits=st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=8), st.integers(0, 8)), max_size=4),
)
@example(number=0, edits=[])
def test_target(corpus, number, edits):
    data = corpus[number % len(corpus)]
    for position, insert, remove in edits:
        data = data[:position] + insert + data[position + remove :]
    target.check(data)


@given(st.binary(max_size=600))
@settings(max_examples=100, deadline=None)
def test_any_bytes(data):
    target.check(data)


def test_repaired_files_get_past_the_digests(good):
    assert target.repaired(good) == good and target.read_all(good)
    metadata = bytearray(good)
    position = good.index(b'"tiny"')
    metadata[position + 1] ^= 1
    assert not target.read_all(bytes(metadata)) and target.read_all(target.repaired(bytes(metadata)))


@pytest.mark.parametrize("name", ["..", "a/../b", "/etc/passwd", "C:x", "..\\x", "\\x"])
def test_names_that_lead_out(name):
    assert not target.is_inside(name)


def test_target_notices_errors_that_are_not_documented(good, monkeypatch):
    monkeypatch.setattr(bstk.Reader, "read", lambda self, chunk: b"")
    with pytest.raises(AssertionError, match="another length"):
        target.check(good)
    monkeypatch.setattr(bstk.Reader, "read", lambda self, chunk: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        target.check(good)
