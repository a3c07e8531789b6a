"""Products with packed matrices: every instruction set of this CPU against the reference, bit for bit."""

import ctypes
import mmap
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bstk
from bstack.codecs import SignCodec, TrellisCodec
from bstack.kernels import reference
from bstack.kernels.matrix import BLOCKS, RANK, ROTATED, SIGN, TRELLIS, TRELLIS5, Matrix, block_bytes, pointer
from bstack.kernels.multiply import (
    decode_rows,
    lookup,
    multiply,
    multiply_decoded,
    multiply_dense,
    multiply_many,
    rotate,
)
from bstack.kernels.native import CHOICES, library
from bstack.kernels.reference import TABLE, TABLE5
from bstack.kernels.selftest import random_payload
from bstack.numerics import rotation

CSRC = Path(__file__).parents[2] / "csrc"
BUILT = library() is not None
needs_kernels = pytest.mark.skipif(not BUILT, reason="the C kernels are not built, or not wanted")
INSTRUCTIONS = [name for name in CHOICES[1:] if BUILT and library().bstack_offers(name.encode()) == 0]


@pytest.fixture(params=INSTRUCTIONS or [pytest.param("none", marks=needs_kernels)])
def instructions(request):
    before = library().bstack_instructions()
    assert library().bstack_use(request.param.encode()) == 0
    yield request.param
    library().bstack_use(before)


@pytest.fixture
def threads():
    before = library().bstack_threads()
    yield library().bstack_set_threads
    library().bstack_set_threads(before)


def stack(rng, rows, columns, kinds):
    """A matrix of random blocks; kinds are 0 for trellis, -1 for trellis5, or the rank of a sign block."""
    blocks = [(SIGN, min(k, rows, columns)) if k > 0 else (TRELLIS5 if k else TRELLIS, 2) for k in kinds]
    return Matrix.of(rows, columns, [(*b, random_payload(rng, rows, columns, *b)) for b in blocks])


def inputs(rng, tokens, columns):
    return (rng.standard_normal((tokens, columns)) * rng.gamma(1, 1, columns)).astype(np.float32)


def same(left, right):
    return left.shape == right.shape and left.tobytes() == right.tobytes()


SHAPES = [(1, 1), (2, 3), (5, 5), (7, 64), (3, 8), (70, 100), (33, 576), (6, 252), (9, 257), (20, 1536), (4, 1030)]


@pytest.mark.parametrize("kinds", [[0], [-1], [1], [2], [5], [RANK], [-1, -1, -1], [0, 3, -1, 1], [1, 0]], ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_multiply_gives_the_bits_of_the_reference(instructions, rows, columns, kinds):
    rng = np.random.default_rng(rows * columns)
    matrix = stack(rng, rows, columns, kinds)
    for tokens in (1, 2, 3, 4, 5, 8, 9):
        x = inputs(rng, tokens, columns)
        assert same(multiply(matrix, x), reference.multiply(matrix, x)), tokens


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    tokens=st.integers(1, 9),
    kinds=st.lists(st.integers(-1, RANK), max_size=4),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([1e-20, 1.0, 1e20]),
)
@settings(max_examples=60, deadline=None)
@needs_kernels
def test_every_instruction_set_gives_the_bits_of_the_reference(rows, columns, tokens, kinds, seed, spread):
    rng = np.random.default_rng(seed)
    matrix = stack(rng, rows, columns, kinds)
    x = inputs(rng, tokens, columns) * np.float32(spread)
    expected = reference.multiply(matrix, x)
    before = library().bstack_instructions()
    for name in INSTRUCTIONS:
        library().bstack_use(name.encode())
        assert same(multiply(matrix, x), expected), name
    library().bstack_use(before)


def test_extreme_codes_do_not_overflow(instructions):
    """The largest sums there are: one window everywhere, its value the farthest from 0, and inputs at the limit."""
    columns, rows = 4 * 8192 + 5, 2
    rng = np.random.default_rng(0)
    quarter = -(-columns // 4)
    cases = []
    for value in (min(TABLE), max(TABLE)):
        window = TABLE.index(value)
        # Rows 0 to 3 spell the window of the first row of weights, oldest code first.
        cases.append((TRELLIS, [window >> 2 * (3 - row % 4) & 3 for row in range(rows + 3)]))
    for value in (min(TABLE5), max(TABLE5)):
        place = TABLE5.index(value)
        cases.append((TRELLIS5, [0, place >> 4, 0, place & 3, place >> 2 & 3, 0]))
    for kind, spelt in cases:
        codes = np.repeat(np.array(spelt, np.uint8)[:, None] * 0b01010101, quarter, 1).astype(np.uint8)
        payload = codes.tobytes() + np.ones(rows, "<f2").tobytes()
        matrix = Matrix.of(rows, columns, [(kind, 2, payload)])
        # Its rotation is constant up to sign where the width is odd: no Hadamard step.
        x = np.where(rotation.signs(columns).numpy() > 0, 1, -1).astype(np.float32)[None] * np.float32(
            rng.choice([-1, 1])
        )
        for tokens in (1, 2, 8):
            many = np.repeat(x, tokens, 0)
            assert same(multiply(matrix, many), reference.multiply(matrix, many)), tokens
    bits = np.full((rows, -(-columns * 2 // 8)), 255, np.uint8)
    payload = bits.tobytes() + np.ones(rows + columns * 2, "<f2").tobytes()
    matrix = Matrix.of(rows, columns * 2, [(SIGN, 1, payload)])
    for sign in (1, -1):
        x = np.full((1, columns * 2), sign, np.float32)
        y = multiply(matrix, x)
        assert same(y, reference.multiply(matrix, x))
        assert np.allclose(y, sign * columns * 2)


def test_matrices_that_share_an_input(instructions):
    rng = np.random.default_rng(1)
    matrices = [
        stack(rng, rows, 96, kinds) for rows, kinds in ((96, [0, 0]), (32, [0]), (5, [2]), (17, []), (1, [0, 1]))
    ]
    x = inputs(rng, 3, 96)
    for y, matrix in zip(multiply_many(matrices, x), matrices, strict=True):
        assert same(y, multiply(matrix, x))
    assert not multiply(matrices[3], x).any()


def test_a_token_does_not_see_the_others(instructions):
    rng = np.random.default_rng(2)
    matrix = stack(rng, 40, 192, [0, 2, 0])
    x = inputs(rng, 9, 192)
    x[4] *= 1e6
    together = multiply(matrix, x)
    assert all(same(together[t : t + 1], multiply(matrix, x[t : t + 1])) for t in range(9))


def test_threads_do_not_change_the_bits(instructions, threads):
    rng = np.random.default_rng(3)
    matrices = [stack(rng, rows, 576, [0, 0, 1]) for rows in (1536, 192, 70)]
    x = inputs(rng, 2, 576)
    threads(1)
    expected = multiply_many(matrices, x)
    for count in (2, 5, 2, 3):
        threads(count)
        assert all(same(y, z) for y, z in zip(multiply_many(matrices, x), expected, strict=True)), count


def test_blocks_come_and_go_between_calls(instructions):
    rng = np.random.default_rng(4)
    matrix, x = stack(rng, 30, 100, [0] * BLOCKS), inputs(rng, 2, 100)
    for count in (BLOCKS, 3, 0, 1, 7):
        matrix.count = count
        assert same(multiply(matrix, x), reference.multiply(matrix, x))
        assert multiply(matrix, x).any() == (count > 0)


@needs_kernels
@needs_kernels
def test_blocks_that_come_while_products_run_count_from_the_next_one(threads):
    threads(2)
    rng = np.random.default_rng(19)
    matrix, levels = stack(rng, 400, 1500, [0, 9, 0, 8, 7, 0, 9]), 7
    x, index = inputs(rng, 4, 1500), np.arange(100)
    products, rows = [], []
    for count in range(levels + 1):
        matrix.count = count
        products.append(multiply(matrix, x).tobytes())
        rows.append(lookup(matrix, index).tobytes())

    def grow():
        for count in range(1, levels + 1):
            matrix.count = count
            time.sleep(2e-4)

    with ThreadPoolExecutor(1) as pool:
        for _ in range(60):
            for call, allowed in ((lambda: multiply(matrix, x), products), (lambda: lookup(matrix, index), rows)):
                matrix.count = 0
                growth = pool.submit(grow)
                while not growth.done():
                    assert call().tobytes() in allowed


def test_what_is_not_finite_stays_with_its_token():
    rng = np.random.default_rng(5)
    for kinds in ([0], [2], [0, 1]):
        matrix, x = stack(rng, 10, 64, kinds), inputs(rng, 5, 64)
        x[1, 3], x[2, 0], x[3, 7], x[4] = np.nan, np.inf, -np.inf, 0
        y = multiply(matrix, x)
        assert np.isnan(y[1:4]).all() and np.isfinite(y[0]).all() and not y[4].any()
        assert (np.isnan(y) == np.isnan(reference.multiply(matrix, x))).all()


@pytest.mark.parametrize("codec", [TrellisCodec(3), SignCodec(3, 4)], ids=lambda codec: codec.name)
def test_close_to_the_dense_product(codec):
    """Within the tolerance of `multiply`, against the codec's own matrix in double precision."""
    generator = torch.Generator().manual_seed(0)
    m, n = 48, 160
    x = torch.randn(300, n, generator=generator)
    blocks = list(codec.encode(torch.randn(m, n, generator=generator), x.t() @ x, 300, torch.ones(m)))
    dense = codec.rebuild(
        [b.payload for b in blocks], [b.kind for b in blocks], [b.rank for b in blocks], (m, n)
    ).double()
    matrix = Matrix.of(m, n, [(b.kind.code, b.rank, b.payload) for b in blocks])
    y = torch.from_numpy(multiply(matrix, x[:8].numpy())).double()
    expected = x[:8].double() @ dense.t()
    assert float((y - expected).norm() / expected.norm()) < (1e-4 if codec.name == "trellis" else 4e-4)
    if codec.name == "trellis":
        rotated = rotation.rotate(x[:8].double())
        bound = 2e-5 * rotated.abs().amax(1, keepdim=True) * rotation.rotate(dense).abs().sum(1) + 1e-6
        assert ((y - expected).abs() <= bound).all()
    picked = lookup(matrix, np.array([3, 0, 47, 3]))
    assert np.allclose(picked, dense[[3, 0, 47, 3]], atol=1e-5)
    rows = sum(
        side @ decode_rows(matrix, kind, 0, m).T
        for kind, side in ((ROTATED, rotate(x[:8].numpy())), (SIGN, x[:8].numpy()))
    )
    assert np.allclose(rows, expected, atol=1e-3)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 300),
    kinds=st.lists(st.integers(-1, RANK), max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
@needs_kernels
def test_rows_are_those_of_the_reference(m, n, kinds, seed):
    rng = np.random.default_rng(seed)
    matrix = stack(rng, m, n, kinds)
    start, stop = sorted(rng.integers(0, m + 1, 2).tolist())
    index = rng.integers(0, m, 5)
    before = library().bstack_instructions()
    try:
        for name in INSTRUCTIONS:
            library().bstack_use(name.encode())
            for kind in (TRELLIS, TRELLIS5, SIGN):
                assert same(
                    decode_rows(matrix, kind, start, stop), reference.decode_rows(matrix, (kind,), start, stop)
                ), name
            assert same(lookup(matrix, index), reference.lookup(matrix, index)), name
    finally:
        library().bstack_use(before)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 8, 12, 100, 576, 4096, 16384, 20000])
def test_rotation_is_that_of_the_codec(columns):
    x = inputs(np.random.default_rng(columns), 37, columns)
    expected = rotation.rotate(torch.from_numpy(x).double()).numpy()
    assert np.abs(rotate(x) - expected).max() <= 1e-6 * np.abs(expected).max()
    assert same(rotate(x), reference.rotate(x))
    assert np.abs(reference.unrotate(rotate(x)) - x).max() <= 1e-6 * np.abs(x).max()


@given(st.lists(st.floats(width=32), min_size=1, max_size=50), st.sampled_from([127, 8191, reference.LIMIT]))
@needs_kernels
def test_quantisation_is_that_of_the_reference(values, limit):
    x = np.array([values], np.float32)
    codes = np.empty(x.shape, np.int16)
    scale = np.array([library().bstack_quantise(pointer(x), x.shape[1], limit, pointer(codes))], np.float32)
    expected, expected_scale = reference.quantise(x, limit)
    assert (codes == expected).all() and np.array_equal(scale, expected_scale, equal_nan=True)
    if np.isfinite(scale).all() and np.abs(x).max() >= 1e-30:
        assert np.abs(codes).max() == limit
        assert (np.abs(x - codes * scale[:, None].astype(float)) <= 0.501 * scale[0]).all()


@pytest.fixture
def fenced():
    """Put bytes at the end of a page that a page without access follows; returns their address."""
    libc, page, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

    def fence(payload):
        size = -(-len(payload) // page) * page
        memory = mmap.mmap(-1, size + page)
        memory[size - len(payload) : size] = payload
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
        kept.append((memory, start + size))
        return start + size - len(payload)

    yield fence
    for _, after in kept:
        libc.mprotect(ctypes.c_void_p(after), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect of Linux")
@pytest.mark.parametrize("rank", [0, -1, 1, 3, 16])
def test_nothing_past_a_block_is_read(instructions, fenced, rank):
    """Also at odd addresses: the end of the block is at the end of a page, whatever its length.

    With one row little or nothing stands between the last codes and that end.
    """
    rng = np.random.default_rng(7)
    kind = SIGN if rank > 0 else TRELLIS5 if rank else TRELLIS
    for rows, columns in ((1, 1), (1, 3), (3, 64), (5, 253), (2, 256), (17, 100), (4, 576), (1, 1031)):
        stored = min(rank, rows, columns) if rank > 0 else 2
        payload = random_payload(rng, rows, columns, kind, stored)
        matrix = Matrix(rows, columns, 1)
        matrix.put(0, kind, stored, fenced(payload))
        x = inputs(rng, 9, columns)
        assert same(multiply(matrix, x), reference.multiply(matrix, x))
        assert same(multiply(matrix, x[:1]), reference.multiply(matrix, x[:1]))
        decode_rows(matrix, kind, 0, rows)


def test_bad_calls_are_refused():
    matrix = stack(np.random.default_rng(0), 4, 8, [0])
    good = np.zeros((1, 8), np.float32)
    for x in (good[0], good[:, :7], good.astype(np.float64)):
        with pytest.raises(ValueError, match=r"needed is float32 of shape \(tokens, 8\)"):
            multiply(matrix, x)
    for start, stop in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(ValueError, match="rows"):
            decode_rows(matrix, TRELLIS, start, stop)
    with pytest.raises(ValueError, match="kind is 8"):
        decode_rows(matrix, 8, 0, 1)
    with pytest.raises(ValueError, match="needed is contiguous"):
        decode_rows(matrix, TRELLIS, 0, 1, np.empty((1, 9), np.float32))
    for index in ([4], [-1], [[0]]):
        with pytest.raises(ValueError, match="index"):
            lookup(matrix, np.array(index))
    for kind, rank in ((TRELLIS, 1), (SIGN, 0), (SIGN, 17), (2, 1)):
        with pytest.raises(ValueError, match=r"a .* block|a block"):
            matrix.put(1, kind, rank, 0)
    with pytest.raises(ValueError, match="level is 16"):
        matrix.put(16, TRELLIS, 2, 0)
    with pytest.raises(ValueError, match="a block has 3 bytes; one of 4 x 8, kind 4, has 22"):
        Matrix.of(4, 8, [(TRELLIS, 2, b"abc")])


def test_the_table_in_c_is_that_of_python():
    text = (CSRC / "table.c").read_text(encoding="utf-8")
    tables = re.findall(r"\{(.*?)\}", text, re.DOTALL)
    assert [[int(v) - 128 for v in re.findall(r"\d+", values)] for values in tables] == [list(TABLE), list(TABLE5)]


def test_kinds_are_those_of_the_container():
    assert (bstk.SIGN.code, bstk.TRELLIS.code, bstk.TRELLIS5.code) == (SIGN, TRELLIS, TRELLIS5)
    for kind, rank in ((bstk.SIGN, 3), (bstk.TRELLIS, 2), (bstk.TRELLIS5, 2)):
        for shape in ((5, 7), (64, 576)):
            assert kind.rule(shape, "f16", rank) == block_bytes(*shape, kind.code, rank)


def test_more_inputs_than_signs_are_kept(instructions):
    rng = np.random.default_rng(9)
    matrix, x = stack(rng, 2, 33000, [0, 1]), inputs(rng, 1, 33000)
    assert same(multiply(matrix, x), reference.multiply(matrix, x))


def run(script, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BSTACK_")}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**clean, **environment})


@needs_kernels
def test_a_child_after_a_fork_has_threads_of_its_own():
    script = """
import os, sys, numpy as np
from bstack.kernels.native import set_threads
from bstack.kernels.multiply import multiply
from bstack.kernels.matrix import Matrix, TRELLIS
from bstack.kernels.selftest import random_payload
set_threads(3)
matrix = Matrix.of(900, 600, [(TRELLIS, 2, random_payload(np.random.default_rng(0), 900, 600, TRELLIS, 2))])
x = np.ones((1, 600), np.float32)
expected = multiply(matrix, x).tobytes()
for _ in range(5):
    child = os.fork()
    if not child:
        os._exit(0 if all(multiply(matrix, x).tobytes() == expected for _ in range(20)) else 1)
    assert os.waitpid(child, 0)[1] == 0
assert multiply(matrix, x).tobytes() == expected
"""
    done = run(script)
    assert done.returncode == 0, done.stderr


@needs_kernels
def test_calls_from_many_threads_at_once(threads):
    rng = np.random.default_rng(0)
    matrix, x = stack(rng, 700, 256, [0, 0]), inputs(rng, 1, 256)
    expected = multiply(matrix, x)
    threads(3)
    with ThreadPoolExecutor(4) as pool:
        assert all(same(y, expected) for y in pool.map(lambda _: multiply(matrix, x), range(400)))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 200),
    tokens=st.integers(1, 20),
    kinds=st.lists(st.sampled_from([0, 2]), max_size=3),
    seed=st.integers(0, 99),
)
def test_products_for_many_tokens_are_those_of_real_numbers(rows, columns, tokens, kinds, seed):
    """To single precision, with every instruction set; and a token does not see the others."""
    rng = np.random.default_rng(seed)
    matrix, x = stack(rng, rows, columns, kinds), inputs(rng, tokens, columns)
    w = lookup(matrix, np.arange(rows))
    wide = np.full((tokens, rows + 3), np.nan, np.float32)
    before = library() and library().bstack_instructions()
    for name in INSTRUCTIONS or [None]:
        if name:
            library().bstack_use(name.encode())
        multiply_decoded(matrix, x, rotate(x), wide[:, 1 : rows + 1])
        dense = multiply_dense(w, x)
        alone = multiply_dense(w, x[-1:])
        limit = 1e-5 * (np.abs(x).max(1, keepdims=True) * columns * np.abs(w).max() + 1e-30)
        for found in (wide[:, 1 : rows + 1], dense):
            assert (np.abs(found - x.astype(np.float64) @ w.T.astype(np.float64)) <= limit).all()
        assert np.isnan(wide[:, [0, -1, -2]]).all()
        assert library() is None or same(alone, dense[-1:])
    if before:
        library().bstack_use(before)


def test_bad_calls_of_products_for_many_tokens_are_refused():
    rng = np.random.default_rng(0)
    matrix, x = stack(rng, 5, 7, [0]), inputs(rng, 3, 7)
    for wrong in (np.empty((3, 4), np.float32), np.empty((3, 5)), np.empty((5, 3), np.float32).T):
        with pytest.raises(ValueError, match="out is"):
            multiply_decoded(matrix, x, x, wrong)
    with pytest.raises(ValueError, match="needed is float32"):
        multiply_decoded(matrix, x, x[:, :6], np.empty((3, 5), np.float32))
    with pytest.raises(ValueError, match="needed is float32"):
        multiply_dense(np.ones((4, 6), np.float32), x)
    with pytest.raises(ValueError, match="contiguous"):
        multiply_dense(np.ones((7, 4), np.float32).T, x)
