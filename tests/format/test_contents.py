"""Blocks that hold positions: what is read points into the matrix, whatever a file says."""

import math
import struct
import tracemalloc

import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st

import bstk
from bstk import kinds


def block(pointer, columns):
    values = [0.5] * len(columns)
    return struct.pack(f"<{len(pointer)}I{len(columns)}H{len(columns)}e", *pointer, *columns, *values)


@pytest.mark.parametrize(
    ("pointer", "columns", "words"),
    [
        ([1, 1, 2], [0, 1], "start at 0"),
        ([0, 2, 1], [0], "falls"),
        ([0, 2**32 - 1, 2], [0, 1], "falls"),
        ([0, 1, 3], [0, 1], "ends at 3, but its length has room for 2"),
        ([0, 1, 1], [0, 1], "ends at 1"),
        ([0, 1, 2], [0, 5], "column 5; the matrix has 5"),
        ([0, 2, 2], [3, 3], "do not rise"),
        ([0, 1, 4], [3, 1, 2, 0], "do not rise"),
    ],
)
def test_bad_outliers(pointer, columns, words):
    with pytest.raises(ValueError, match=words):
        kinds.check_outliers(block(pointer, columns), (2, 5))


@pytest.mark.parametrize(
    ("pointer", "columns"), [([0, 0, 0], []), ([0, 1, 2], [4, 0]), ([0, 0, 5], [0, 1, 2, 3, 4]), ([0, 2, 2], [0, 4])]
)
def test_good_outliers(pointer, columns):
    kinds.check_outliers(block(pointer, columns), (2, 5))


@given(data=st.binary(min_size=12, max_size=40).filter(lambda data: len(data) % 4 == 0))
def test_what_passes_can_be_decoded(data):
    try:
        kinds.check_outliers(data, (2, 3))
    except ValueError:
        return
    count = (len(data) - 12) // 4
    pointer, columns = struct.unpack_from("<3I", data), struct.unpack_from(f"<{count}H", data, 12)
    for row in range(2):
        places = columns[pointer[row] : pointer[row + 1]]
        assert list(places) == sorted(set(places)) and all(column < 3 for column in places)
    assert pointer[0] == 0 and pointer[2] == count


@pytest.mark.parametrize(("permutation", "fine"), [((2, 0, 1), True), ((0, 1, 1), False), ((0, 1, 3), False)])
def test_permutation(permutation, fine):
    raw = struct.pack("<3H", *permutation).ljust(64 + 148, b"\0")
    if fine:
        kinds.check_spqr(raw, (1, 3))
    else:
        with pytest.raises(ValueError, match="each of the 3 columns once"):
            kinds.check_spqr(raw, (1, 3))


@pytest.mark.parametrize(
    ("kind", "shape", "rank", "length"),
    [
        (kinds.SPQR, (16, 16), 20, 64 + 148),
        (kinds.SPQR, (17, 33), 19, 128 + 2 * 3 * 116),
        (kinds.SPQR, (1, 1), 132, 64 + 2 * 4 * 128 + 20),
        (kinds.OUTLIERS, (3, 2), 0, range(16, 16 + 24 + 1, 4)),
        (kinds.TRELLIS, (5, 9), 2, 8 * 3 + 10),
        (kinds.TRELLIS5, (5, 9), 2, 9 * 3 + 10),
    ],
)
def test_lengths(kind, shape, rank, length):
    assert kind.rule(shape, "f16", rank) == length


@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 700),
    group=st.sampled_from([16, 32, 64, 128]),
    bits=st.sampled_from([3, 4]),
)
def test_parts_of_an_spqr_block(rows, columns, group, bits):
    """Against the table of SPEC.md, section 6, and what the tiles hold one by one."""
    parts = kinds.spqr_parts((rows, columns), group + bits)
    tiles = sum(1 for _ in range(0, rows, 16) for _ in range(0, columns, group))
    assert parts.codes * 8 == tiles * 16 * group * bits and parts.statistics == tiles * (6 + 6 + 8)
    assert sum(parts) == 64 * math.ceil(2 * columns / 64) + math.ceil(rows / 16) * math.ceil(columns / group) * (
        2 * bits * group + 20
    )


def test_number_of_outliers():
    assert kinds.outlier_count((2, 5), len(block([0, 1, 2], [4, 0]))) == 2


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "rank", "words"),
    [
        (kinds.SPQR, (4,), "f16", 19, "two dimensions"),
        (kinds.SPQR, (4, 4), "f32", 19, "are f16"),
        (kinds.SPQR, (4, 4), "f16", 18, "3 or 4"),
        (kinds.SPQR, (4, 4), "f16", 3, "16, 32, 64 or 128"),
        (kinds.SPQR, (4, 4), "f16", 52, "16, 32, 64 or 128"),
        (kinds.SPQR, (4, 65536), "f16", 19, "at most 65535 columns"),
        (kinds.OUTLIERS, (4, 65536), "f16", 0, "at most 65535 columns"),
        (kinds.OUTLIERS, (4, 4), "f16", 1, "is 0"),
        (kinds.TRELLIS5, (4, 4), "f16", 3, "bits per code, 2, found 3"),
        (kinds.TRELLIS5, (4, 4), "f32", 2, "the scales of a trellis5 block are f16"),
        (kinds.OUTLIERS, (4, 4, 1), "f16", 0, "two dimensions"),
        (kinds.OUTLIERS, (4, 4), "bf16", 0, "are f16"),
    ],
)
def test_what_the_rules_refuse(kind, shape, dtype, rank, words):
    with pytest.raises(ValueError, match=words):
        kind.rule(shape, dtype, rank)


def spqr_stack(outliers, shape=(2, 3)):
    """An spqr block and one of outliers."""
    columns = shape[1]
    length = kinds.SPQR.rule(shape, "f16", 20)
    dense = struct.pack(f"<{columns}H", *range(columns)).ljust(length, b"\0")
    fields = {"shape": shape, "dtype": "f16"}
    return [
        samples.entry("w", bstk.SPQR, dense, rank=20, **fields),
        samples.entry("w", bstk.OUTLIERS, outliers, level=1, rank=0, **fields),
    ]


@pytest.mark.parametrize("length", [8, 14, 12 + 4 * 6 + 4])
def test_lengths_that_the_index_may_not_state(length, tmp_path):
    with pytest.raises(bstk.UsageError, match="12 to 36 in steps of 4"):
        bstk.write(tmp_path / "out.bstk", {}, spqr_stack(bytes(length)), 1)


def test_reading_names_the_block(tmp_path):
    bstk.write(tmp_path / "out.bstk", {}, spqr_stack(block([0, 1, 1], [7])), 1)
    with (
        bstk.open(tmp_path / "out.bstk") as file,
        pytest.raises(bstk.DamagedError, match=r"outliers 'w' level 1.*column 7") as caught,
    ):
        file.verify()
    assert caught.value.chunk == file.chunks[1]


def test_a_block_of_zeros_takes_little_memory(tmp_path):
    # A million values in column 0, in 16 kB of the file: none of them rises.
    count = 2**20 - 16
    raw = struct.pack("<17I", 0, *[count] * 16) + bytes(4 * count)
    bstk.write(tmp_path / "out.bstk", {}, spqr_stack(raw, (16, 65535)), 1)
    with bstk.open(tmp_path / "out.bstk") as file:
        chunk = file.chunks[1]
        assert chunk.stored_length < 2**15
        tracemalloc.start()
        try:
            with pytest.raises(bstk.DamagedError, match="columns of row 0 do not rise"):
                file.read(chunk)
            assert tracemalloc.get_traced_memory()[1] < 2 * len(raw)
        finally:
            tracemalloc.stop()
