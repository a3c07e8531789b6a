"""Products with SpQR's blocks: every instruction set against the reference, bit for bit, and that against the layout."""

import ctypes

import numpy as np
import pytest
import spqr_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_multiply import INSTRUCTIONS, fenced, inputs, instructions, needs_kernels, same, threads

import bstk
from bstack.kernels import reference
from bstack.kernels.matrix import OUTLIERS, PLAIN, SIGN, SPQR, TRELLIS, Matrix, block_bytes, check_block
from bstack.kernels.multiply import decode_rows, lookup, multiply, multiply_many
from bstack.kernels.native import library
from bstack.kernels.selftest import random_payload
from bstack.kernels.spqr import Dense, Outliers, rank_of
from bstk.kinds import spqr_form

__all__ = ["fenced", "instructions", "threads"]  # fixtures

RANKS = [rank_of(bits, group) for bits in (3, 4) for group in (16, 32, 64, 128)]
# Shares of the weights that are outliers: none, few, every second, all.
FRACTIONS = [0, 0.01, 0.5, 1]
SHAPES = [(1, 1), (2, 3), (16, 16), (15, 17), (17, 129), (33, 100), (70, 576), (48, 257), (5, 1030)]


def block(rng, rows, columns, kind, form):
    """A block by its kind and form: its rank (what the shape allows of a sign block's), or the fraction of outliers."""
    if kind == OUTLIERS:
        return kind, 0, random_payload(rng, rows, columns, kind, 0, int(form * rows * columns))
    rank = min(form, rows, columns) if kind == SIGN else form
    return kind, rank, random_payload(rng, rows, columns, kind, rank)


def stack(rng, rows, columns, forms):
    return Matrix.of(rows, columns, [block(rng, rows, columns, *form) for form in forms])


@pytest.mark.parametrize(
    "forms", [[(SPQR, RANKS[0])], [(SPQR, RANKS[4]), (OUTLIERS, 0.02)], [(OUTLIERS, 0.3)]], ids=str
)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_multiply_gives_the_bits_of_the_reference(instructions, rows, columns, forms):
    rng = np.random.default_rng(rows * columns)
    matrix = stack(rng, rows, columns, forms)
    for tokens in (1, 2, 3, 4, 5, 8, 9):
        x = inputs(rng, tokens, columns)
        assert same(multiply(matrix, x), reference.multiply(matrix, x)), tokens


FORMS = st.lists(
    st.one_of(
        st.tuples(st.just(SPQR), st.sampled_from(RANKS)),
        st.tuples(st.just(OUTLIERS), st.sampled_from(FRACTIONS)),
        st.just((TRELLIS, 2)),
        st.just((SIGN, 2)),
    ),
    min_size=1,
    max_size=4,
)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    tokens=st.integers(1, 9),
    forms=FORMS,
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([1e-20, 1.0, 1e20]),
)
@settings(max_examples=80, deadline=None)
@needs_kernels
def test_every_instruction_set_gives_the_bits_of_the_reference(rows, columns, tokens, forms, seed, spread):
    """Stacks of all kinds, in any order."""
    rng = np.random.default_rng(seed)
    matrix = stack(rng, rows, columns, forms)
    x = inputs(rng, tokens, columns) * np.float32(spread)
    start, stop = sorted(rng.integers(0, rows + 1, 2).tolist())
    index = rng.integers(0, rows, 5)
    before = library().bstack_instructions()
    try:
        for name in INSTRUCTIONS:
            library().bstack_use(name.encode())
            assert same(multiply(matrix, x), reference.multiply(matrix, x)), name
            for kinds in (PLAIN, SPQR, OUTLIERS, TRELLIS, (SPQR, OUTLIERS)):
                expected = reference.decode_rows(matrix, (kinds,) if isinstance(kinds, int) else kinds, start, stop)
                assert same(decode_rows(matrix, kinds, start, stop), expected), name
            assert same(lookup(matrix, index), reference.lookup(matrix, index)), name
    finally:
        library().bstack_use(before)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 40), (33, 129)])
def test_the_reference_reads_the_layout_of_the_specification(rows, columns, rank):
    rng = np.random.default_rng(rank)
    blocks = [block(rng, rows, columns, SPQR, rank), block(rng, rows, columns, OUTLIERS, 0.1)]
    matrix = Matrix.of(rows, columns, blocks)
    dense = spqr_oracle.dense(blocks[0][2], (rows, columns), rank)
    sparse = spqr_oracle.outliers(blocks[1][2], (rows, columns))
    assert same(reference.decode_rows(matrix, (SPQR,), 0, rows), dense)
    assert same(reference.decode_rows(matrix, (OUTLIERS,), 0, rows), sparse)
    assert same(reference.lookup(matrix, np.arange(rows)), dense + sparse)
    assert Dense.unpack(matrix.payload(0), columns, rank, 0, rows).pack(rank) == blocks[0][2]
    assert Outliers.unpack(matrix.payload(1), rows).pack() == blocks[1][2]


@pytest.mark.parametrize("rank", RANKS)
def test_close_to_the_product_in_real_numbers(rank):
    rng = np.random.default_rng(rank)
    matrix = stack(rng, 40, 300, [(SPQR, rank), (OUTLIERS, 0.05), (TRELLIS, 2)])
    x = inputs(rng, 3, 300)
    expected = x.astype(np.float64) @ lookup(matrix, np.arange(40)).astype(np.float64).T
    assert np.linalg.norm(multiply(matrix, x) - expected) <= 2e-4 * np.linalg.norm(expected)


def test_extreme_codes_do_not_overflow(instructions):
    """The largest codes there are, and inputs whose bytes are the farthest from 0."""
    rows, columns = 16, 256
    for bits in (3, 4):
        rank = rank_of(bits, 128)
        codes = np.full((rows, columns), 2**bits - 1, np.uint8)
        seven = np.full((rows, 2), 7, np.uint8)
        dense = Dense(np.arange(columns), codes, seven, seven, np.ones((1, 2, 4), np.float16))
        matrix = Matrix.of(rows, columns, [(SPQR, rank, dense.pack(rank))])
        # Rounded to 16 bits: the limit, 127 and -128 in both bytes, and so on.
        for integer in (32639, -32639, 32512 + 127, -32512 - 127, 32384 - 128, -128):
            x = np.full((3, columns), integer, np.float32)
            x[:, 0] = 32639
            assert same(multiply(matrix, x), reference.multiply(matrix, x)), integer


def test_rows_with_more_outliers_than_are_taken_together(instructions):
    rng = np.random.default_rng(0)
    matrix = stack(rng, 5, 3000, [(SPQR, RANKS[0]), (OUTLIERS, 1)])
    uneven = Outliers(
        np.array([0, 0, 2500, 2500, 2501, 2600]),
        np.concatenate([np.arange(2500), [7], np.arange(99)]),
        rng.standard_normal(2600),
    )
    x = inputs(rng, 2, 3000)
    for made in (matrix, Matrix.of(5, 3000, [(OUTLIERS, 0, uneven.pack())])):
        assert same(multiply(made, x), reference.multiply(made, x))


def test_values_that_are_small_or_negative(instructions):
    """Subnormal halves, in statistics and outliers."""
    rng = np.random.default_rng(1)
    dense = Dense.unpack(np.frombuffer(block(rng, 20, 50, SPQR, RANKS[4])[2], np.uint8), 50, RANKS[4], 0, 20)
    tiny = Dense(dense.order, dense.codes, dense.scale_codes, dense.zero_codes, np.float16(-1e-5) * dense.scales)
    outliers = Outliers(np.arange(21), np.arange(20), np.float16(6e-8) * np.arange(-10, 10))
    matrix = Matrix.of(20, 50, [(SPQR, RANKS[4], tiny.pack(RANKS[4])), (OUTLIERS, 0, outliers.pack())])
    x = inputs(rng, 2, 50)
    assert multiply(matrix, x).any() and same(multiply(matrix, x), reference.multiply(matrix, x))


def test_what_is_not_finite_stays_with_its_token(instructions):
    rng = np.random.default_rng(5)
    for forms in ([(SPQR, RANKS[0])], [(OUTLIERS, 1)]):
        matrix, x = stack(rng, 10, 64, forms), inputs(rng, 5, 64)
        x[1, 3], x[2, 0], x[3, 7], x[4] = np.nan, np.inf, -np.inf, 0
        y = multiply(matrix, x)
        assert np.isnan(y[1:4]).all() and np.isfinite(y[0]).all() and not y[4].any()


def test_matrices_that_share_an_input_tokens_and_threads(instructions, threads):
    rng = np.random.default_rng(3)
    stacks = (
        [(SPQR, RANKS[0]), (OUTLIERS, 0.01), (TRELLIS, 2)],
        [(SPQR, RANKS[5])],
        [(SIGN, 1)],
        [(OUTLIERS, 0.2)],
        [],
    )
    matrices = [stack(rng, rows, 576, forms) for rows, forms in zip((700, 192, 70, 33, 9), stacks, strict=True)]
    x = inputs(rng, 9, 576)
    threads(1)
    expected = [multiply(matrix, x) for matrix in matrices]
    assert not expected[-1].any()
    for count in (1, 2, 5):
        threads(count)
        assert all(same(y, z) for y, z in zip(multiply_many(matrices, x), expected, strict=True)), count
    alone = [multiply(matrices[0], x[t : t + 1]) for t in range(9)]
    assert same(np.concatenate(alone), expected[0])


def test_blocks_come_and_go_between_calls(instructions):
    rng = np.random.default_rng(4)
    matrix = stack(rng, 30, 100, [(SPQR, RANKS[0]), (OUTLIERS, 0.05), (TRELLIS, 2), (TRELLIS, 2)])
    x, seen = inputs(rng, 2, 100), set()
    for count in (4, 1, 2, 0, 3, 1):
        matrix.count = count
        assert same(multiply(matrix, x), reference.multiply(matrix, x))
        seen.add(multiply(matrix, x).tobytes())
    assert len(seen) == 5


@pytest.mark.parametrize(
    "form", [*((SPQR, rank) for rank in RANKS), *((OUTLIERS, fraction) for fraction in FRACTIONS)], ids=str
)
def test_nothing_past_a_block_is_read(instructions, fenced, form):
    rng = np.random.default_rng(1)
    for rows, columns in ((1, 1), (1, 3), (16, 64), (5, 253), (17, 100), (33, 130)):
        kind, rank, payload = block(rng, rows, columns, *form)
        matrix = Matrix(rows, columns, 1)
        matrix.put(0, kind, rank, fenced(payload), checked=True)
        x = inputs(rng, 5, columns)
        assert same(multiply(matrix, x), reference.multiply(matrix, x))
        assert same(multiply(matrix, x[:1]), reference.multiply(matrix, x[:1]))
        decode_rows(matrix, kind, 0, rows)


def changed(payload, at, kind, *numbers):
    array = np.frombuffer(payload, np.uint8).copy()
    array[at : at + np.dtype(kind).itemsize * len(numbers)] = np.array(numbers, kind).view(np.uint8)
    return array.tobytes()


def test_blocks_that_lead_outside_are_refused():
    rng = np.random.default_rng(0)
    rows, columns = 4, 20
    outliers = Outliers(np.array([0, 2, 2, 3, 5]), np.array([3, 19, 0, 1, 2]), np.ones(5)).pack()
    dense = random_payload(rng, rows, columns, SPQR, RANKS[0])
    check_block(rows, columns, OUTLIERS, 0, outliers)
    check_block(rows, columns, SPQR, RANKS[0], dense)
    broken = [
        changed(outliers, 0, "<u4", 1),
        changed(outliers, 16, "<u4", 6),
        changed(outliers, 16, "<u4", 4),
        changed(outliers, 4, "<u4", 2**32 - 1),
        changed(outliers, 4, "<u4", 3),
        outliers[:-4],
        outliers[:-1],
        outliers[:8],
        b"",
        changed(outliers, 20, "<u2", 3, 20),
        changed(outliers, 20, "<u2", 3, 3),
        changed(outliers, 20, "<u2", 4, 3),
    ]
    for payload in broken:
        with pytest.raises(ValueError, match=r"row pointer|column|bytes"):
            Matrix.of(rows, columns, [(OUTLIERS, 0, payload)])
    order = np.frombuffer(dense[: 2 * columns], "<u2")
    for payload in (changed(dense, 0, "<u2", 20), changed(dense, 0, "<u2", order[1]), dense[:-1], dense + b"\0"):
        with pytest.raises(ValueError, match=r"permutation|bytes"):
            Matrix.of(rows, columns, [(SPQR, RANKS[0], payload)])
    for kind, rank, words in (
        (SPQR, RANKS[0], "checked"),
        (OUTLIERS, 0, "checked"),
        (SPQR, 18, "found 18"),
        (SPQR, 52, "found 52"),
        (OUTLIERS, 1, "found 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Matrix(rows, columns).put(0, kind, rank, 0)
    with pytest.raises(ValueError, match="at most 65535"):
        block_bytes(1, 65536, SPQR, RANKS[0])


def test_kinds_are_those_of_the_container():
    assert (bstk.SPQR.code, bstk.OUTLIERS.code) == (SPQR, OUTLIERS)
    for rank in RANKS:
        for shape in ((5, 7), (64, 576)):
            assert bstk.SPQR.rule(shape, "f16", rank) == block_bytes(*shape, SPQR, rank)
            assert rank_of(*spqr_form(rank)) == rank


@needs_kernels
def test_blocks_at_any_address(instructions):
    rng = np.random.default_rng(8)
    kind, rank, payload = block(rng, 20, 70, SPQR, RANKS[1])
    _, _, sparse = block(rng, 20, 70, OUTLIERS, 0.1)
    x = inputs(rng, 2, 70)
    expected = multiply(Matrix.of(20, 70, [(kind, rank, payload), (OUTLIERS, 0, sparse)]), x)
    for shift in (1, 2, 3):
        kept = [ctypes.create_string_buffer(b"\0" * shift + bytes_) for bytes_ in (payload, sparse)]
        matrix = Matrix(20, 70, 2)
        matrix.put(0, kind, rank, ctypes.addressof(kept[0]) + shift, checked=True)
        matrix.put(1, OUTLIERS, 0, ctypes.addressof(kept[1]) + shift, checked=True)
        assert same(multiply(matrix, x), expected)
