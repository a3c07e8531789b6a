"""Every bad file is refused with the right class, a message that says something, and little memory."""

import struct
import tracemalloc

import bad_files
import pytest
import samples
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bstk
from bstk import index

MOST_MEMORY = 4 * 2**20


@pytest.mark.parametrize("case", bad_files.OPEN)
def test_refused_on_opening(case, good):
    change, expected = bad_files.OPEN[case]
    data = bad_files.build(change, good)
    assert data != good
    tracemalloc.start()
    try:
        with pytest.raises(bstk.BstkError) as caught:
            bstk.open(data)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert type(caught.value).__name__ == expected
    message = str(caught.value)
    assert message.startswith("<bytes>: ") and len(message) > 30


@pytest.mark.parametrize("case", bad_files.CHUNK)
def test_refused_on_reading(case, good):
    number, change = bad_files.CHUNK[case]
    with bstk.open(bad_files.build(change, good)) as f, bstk.open(good) as g:
        for i, chunk in enumerate(f.chunks):
            if i != number:
                assert f.read(chunk) == g.read(g.chunks[i])
        tracemalloc.start()
        try:
            with pytest.raises(bstk.DamagedError, match=f"{f.chunks[number].name}.*offset {f.chunks[number].offset}"):
                f.read(f.chunks[number])
            assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
        finally:
            tracemalloc.stop()
        if f.chunks[number].kind == bstk.FILE:
            with pytest.raises(
                bstk.DamagedError, match=f"{f.chunks[number].name}.*offset {f.chunks[number].offset}"
            ) as caught:
                list(f.file_pieces(f.chunks[number].name))
            assert caught.value.chunk == f.chunks[number]
        with pytest.raises(bstk.DamagedError) as caught:
            f.verify()
        assert caught.value.chunk == f.chunks[number]


def test_the_last_of_many_names_stands_twice():
    # With a comparison of each with all the test would not end.
    names = [f"{i:07}".encode() for i in range(200_000)]
    table = b"".join(struct.pack("<I", 7) + name for name in [*names, names[-1]])
    with pytest.raises(bstk.DamagedError, match="'0199999' appears twice"):
        index.parse_names(table, len(names) + 1)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("empty", "empty"),
        ("git-lfs-pointer", "git lfs pull"),
        ("html", "web page"),
        ("json", "JSON"),
        ("text", "text"),
        ("gguf", "GGUF"),
        ("safetensors", "safetensors"),
        ("zip", "zip"),
        ("transferred-as-text", "as binary"),
        ("random", "not with 89 42 53"),
        ("sealed-elsewhere", "was sealed at .* bytes and has"),
        ("appended", "1 more than"),
        ("major-2", "version 2.0; .* reads 1.x"),
        ("incompatible-flag-63", "flags 0x8000000000000000"),
        ("level-gap", "level 3 follows level 1; allowed: 2"),
        ("stack-of-outliers", "does not begin with outliers; allowed below it: spqr"),
        ("stack-of-sign-and-trellis", "trellis stands on sign; allowed below it: trellis or spqr or outliers"),
        ("stack-of-trellis-spqr-and-outliers", "spqr stands on trellis; allowed below it: nothing"),
        ("metadata-repeated-key", "'a' appears twice"),
    ],
)
def test_says_what_is_wrong(case, words, good):
    with pytest.raises(bstk.BstkError, match=words):
        bstk.open(bad_files.build(bad_files.OPEN[case][0], good))


def test_flags_that_may_be_ignored(good, tmp_path):
    for flag in ("compatible", "read_only_compatible"):
        draft = samples.Draft(good)
        draft.forced[flag] = 1 << 40
        draft.forced["minor"] = 7
        path = tmp_path / flag
        path.write_bytes(draft.bytes())
        with bstk.open(path) as f:
            assert samples.content(f) == samples.content(bstk.open(good))
            size = f.base_length / bstk.MB
        if flag == "compatible":
            bstk.truncate(path, tmp_path / "cut", mb=size)
            with bstk.open(tmp_path / "cut") as f:
                assert (f.preamble.compatible, f.preamble.minor, f.state) == (1 << 40, 7, "sealed")
        else:
            with pytest.raises(bstk.UnsupportedVersionError, match="not rewrite"):
                bstk.truncate(path, None, mb=size)
            assert path.read_bytes() == draft.bytes()


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_byte_flipped(good, mask):
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= mask
        # Every byte is under some check.
        with pytest.raises(bstk.BstkError), bstk.open(data) as f:
            f.verify()


@settings(max_examples=150, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=4), st.integers(0, 8)), max_size=4))
@example(edits=[])
@pytest.mark.filterwarnings("ignore::bstk.PartialWarning")
def test_bytes_replaced_inserted_and_removed(good, edits):
    data = good
    for position, insert, remove in edits:
        data = data[:position] + insert + data[position + remove :]
    whole = samples.content(bstk.open(good))
    try:
        with bstk.open(data) as f:
            got = samples.content(f)
    except bstk.BstkError:
        return
    assert got == whole[: len(got)]


_number = st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1), st.sampled_from([2**31, 2**32 - 1, 2**48, 2**63]))
_preamble_field = st.sampled_from(
    [name for name, (_, code) in samples.PREAMBLE.items() if code in "HIQ" and name != "crc"]
)
_record_field = st.sampled_from([name for name, (_, code) in samples.RECORD.items() if code in "BHIQ"])
_LARGEST = {"B": 2**8, "H": 2**16, "I": 2**32, "Q": 2**64}


@settings(max_examples=300, deadline=None)
@given(
    heads=st.dictionaries(_preamble_field, _number, max_size=3),
    records=st.lists(st.tuples(st.integers(0, 7), _record_field, _number), max_size=3),
    metadata=st.none() | st.binary(max_size=30),
    length=st.none() | st.integers(0, 3000),
)
@pytest.mark.filterwarnings("ignore::bstk.PartialWarning")
def test_fields_set_to_anything_with_good_digests(good, heads, records, metadata, length):
    """The fuzz target: past the digests, so that the rules themselves are met."""
    draft = samples.Draft(good)
    draft.forced = {name: value % _LARGEST[samples.PREAMBLE[name][1]] for name, value in heads.items()}
    for number, name, value in records:
        draft.set(number, **{name: value % _LARGEST[samples.RECORD[name][1]]})
    if metadata is not None:
        draft.metadata = metadata
    data = draft.bytes()[:length]
    try:
        with bstk.open(data) as f:
            assert f.base_length <= f.length <= f.full_length
            for chunk in f.chunks:
                assert len(f.read(chunk)) == chunk.raw_length
    except bstk.BstkError:
        pass
