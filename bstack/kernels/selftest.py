"""Tests the C kernels before their first use: each must agree with the reference on small inputs."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np

from bstack.kernels import reference
from bstack.kernels.decoder import Decoder, Layer, Sizes
from bstack.kernels.matrix import (
    OUTLIERS,
    PLAIN,
    ROTATED,
    SIGN,
    SPQR,
    TRELLIS,
    TRELLIS5,
    Matrix,
    block_bytes,
    kind_bits,
    pointer,
)
from bstack.kernels.remainder import Remainder, code
from bstack.kernels.spqr import ROWS as TILE
from bstack.kernels.spqr import Dense, Outliers, rank_of
from bstk.kinds import spqr_form

__all__ = ["failure", "random_payload"]

# More rows than the loops take at a time, twice over and some left; more tokens than they take at a time.
ROWS, COLUMNS, TOKENS = 71, 300, 5
BLOCKS = {
    "trellis": [(TRELLIS, 2)],
    "trellis5": [(TRELLIS5, 2)],
    "sign": [(SIGN, 3)],
    "SpQR": [(SPQR, rank_of(3, 16)), (SPQR, rank_of(4, 32)), (OUTLIERS, 0)],
}


def failure(native: ctypes.CDLL) -> str:
    """Return which result of the kernels is wrong, in a few words; an empty string if none is."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, COLUMNS)).astype(np.float32)
    for name, parts in BLOCKS.items():
        blocks = [(kind, rank, random_payload(rng, ROWS, COLUMNS, kind, rank, COLUMNS)) for kind, rank in parts]
        matrix = Matrix.of(ROWS, COLUMNS, blocks)
        y = np.zeros((TOKENS, ROWS), np.float32)
        matrices = (ctypes.c_void_p * 1)(ctypes.addressof(matrix))
        native.bstack_multiply(matrices, 1, pointer(x), TOKENS, (ctypes.c_void_p * 1)(y.ctypes.data))
        if y.tobytes() != reference.multiply(matrix, x).tobytes():
            return f"a product with a {name} block"
        rows = np.zeros((ROWS, COLUMNS), np.float32)
        kinds = PLAIN if parts[0][0] in PLAIN else ROTATED
        native.bstack_decode_rows(ctypes.byref(matrix), kind_bits(kinds), 0, ROWS, pointer(rows))
        if rows.tobytes() != reference.decode_rows(matrix, kinds, 0, ROWS).tobytes():
            return f"a decoded {name} block"
        index = np.array([ROWS - 1, 0, ROWS // 2])
        native.bstack_lookup(ctypes.byref(matrix), pointer(index), len(index), pointer(rows))
        if rows[: len(index)].tobytes() != reference.lookup(matrix, index).tobytes():
            return f"a row looked up in a {name} block"
    if not _many_tokens_agree(native, rng):
        return "a product for many tokens"
    if not _encoder_agrees(native, rng):
        return "an encoded trellis5 block"
    if native.bstack_feedback_offers() and not _feedback_agrees(native, rng):
        return "the feedback of the encoder"
    if not _remainder_agrees(native, rng):
        return "an exact chunk"
    return "" if _decoder_agrees(native, rng) else "a step of the decoder"


def _remainder_agrees(native: ctypes.CDLL, rng: np.random.Generator) -> bool:
    """Code what a prediction lacks to values of two types with both, compare the bytes, and decode them."""
    rows, columns = 9, 70  # the reference takes long
    predicted = rng.standard_normal((rows, columns)).astype(np.float32)
    near = (predicted + rng.standard_normal(predicted.shape).astype(np.float32) / 100).view(np.uint32)
    scales = rng.integers(100, 112, rows, np.uint8)
    for trailing in (0, 16):
        values = near >> trailing << trailing
        payload = b"".join(code(native, predicted, scales, values, trailing))
        if payload != b"".join(code(None, predicted, scales, values, trailing)):
            return False
        if not np.array_equal(Remainder(native, payload, rows, columns).rows(predicted), values):
            return False
    return True


def _many_tokens_agree(native: ctypes.CDLL, rng: np.random.Generator) -> bool:
    """Products of decoded rows and of floats, to rounding: fused multiplications differ by it."""
    matrix = Matrix.of(ROWS, COLUMNS, [(TRELLIS, 2, random_payload(rng, ROWS, COLUMNS, TRELLIS, 2))])
    w, x = reference.decode_rows(matrix, (TRELLIS,), 0, ROWS), rng.standard_normal((TOKENS, COLUMNS)).astype(np.float32)
    found, rows, columns = np.zeros((2, TOKENS, ROWS), np.float32), *map(ctypes.c_size_t, (ROWS, COLUMNS))
    bits = kind_bits((TRELLIS,))
    native.bstack_multiply_decoded(ctypes.byref(matrix), bits, pointer(x), TOKENS, pointer(found[0]), rows, 0)
    native.bstack_multiply_dense(
        pointer(w), columns, ROWS, COLUMNS, pointer(x), columns, TOKENS, pointer(found[1]), rows
    )
    return bool(np.allclose(found, x @ w.T, rtol=1e-3, atol=1e-4 * np.abs(w).max() * COLUMNS))


def _encoder_agrees(native: ctypes.CDLL, rng: np.random.Generator) -> bool:
    """Encode some columns of a trellis block with both, and compare the bits."""
    rows, columns = 37, 3  # more rows than pass between two corrections of the costs
    target, original = rng.standard_normal((2, columns, rows)).astype(np.float32) * 50
    feedback = rng.standard_normal((columns, columns)).astype(np.float32) / 4
    table = np.array(reference.TABLE5, np.float32)
    scale, weight = (0.5 + rng.random((2, rows))).astype(np.float32)
    codes, errors = np.zeros((columns, reference.EARLIER5 + rows), np.uint8), np.zeros_like(original)
    arrays = target.copy(), original, feedback, table, scale, weight, codes, errors
    target_, original_, *rest = map(pointer, arrays)
    native.bstack_trellis_encode(target_, original_, columns, rows, *rest)
    expected = reference.encode_columns(target, original, feedback, table, scale, weight)
    return (codes.tobytes(), errors.tobytes()) == tuple(array.tobytes() for array in expected)


def _feedback_agrees(native: ctypes.CDLL, rng: np.random.Generator) -> bool:
    """Pass on values and a matrix to a third group, and compare with double precision."""
    rows, before, columns = 37, 128, 130
    lines = rng.standard_normal((columns, columns)).astype(np.float32)  # of the factor, its columns
    codes = rng.integers(0, 4, (before, reference.EARLIER5 + rows), np.uint8)
    size = native.bstack_feedback_bytes(columns, rows)
    digits, values, matrix = map(_aligned, (native.bstack_feedback_factor_bytes(columns), size, 3 * size))
    unit, sums = np.zeros(columns), np.zeros(native.bstack_feedback_sums(columns), np.int64)
    cut = [pointer(array) for array in (digits, unit, sums)]
    native.bstack_feedback_cut(pointer(lines), columns, *cut)
    for start in range(0, before, 64):
        native.bstack_feedback_place(pointer(codes[start : start + 64]), 64, rows, start, columns, pointer(values))
    dense, scale = rng.standard_normal((rows, columns)).astype(np.float32), rng.random(rows).astype(np.float32)
    step = np.zeros(rows, np.float32)
    native.bstack_feedback_place_rows(pointer(dense), columns, rows, pointer(matrix), pointer(step))
    step *= 2**16
    table = np.array(reference.TABLE5, np.float64)[reference.places(codes.T)]
    for placed, depth, factor, expected in (
        (values, 1, scale, table * scale[:, None]),
        (matrix, 3, step, dense[:, :before]),
    ):
        found = np.zeros((columns - before, rows), np.float32)
        last = pointer(factor), pointer(found)
        native.bstack_feedback_pass(*cut, pointer(placed), depth, before, columns - before, columns, rows, *last)
        exact = lines[before:, :before].astype(np.float64) @ expected.T
        if not np.allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max()):
            return False
    return True


def _aligned(size: int) -> np.ndarray:
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def _decoder_agrees(native: ctypes.CDLL, rng: np.random.Generator) -> bool:
    """Run two steps of a decoder of one layer with both, and compare to rounding: C libraries have different exponentials."""
    sizes = Sizes(width=24, inner=40, heads=4, key_heads=2, head_width=6, epsilon=1e-5, scale=0.4)
    queries, keys = sizes.heads * sizes.head_width, sizes.key_heads * sizes.head_width

    def matrix(rows: int, columns: int) -> Matrix:
        return Matrix.of(rows, columns, [(TRELLIS5, 2, random_payload(rng, rows, columns, TRELLIS5, 2))])

    def vector(length: int) -> np.ndarray:
        return rng.standard_normal(length).astype(np.float32)

    shapes = [(queries, 24), (keys, 24), (keys, 24), (24, queries), (40, 24), (40, 24), (24, 40)]
    norms = [vector(length) for length in (24, 24, 6, 6)]
    parts: list[Any] = [*(matrix(*shape) for shape in shapes), *norms]
    layer = replace(Layer(*parts), query_bias=vector(queries), down_bias=vector(24))
    final_norm, head = vector(24), matrix(50, 24)
    decoder = Decoder(native, sizes, [layer], final_norm, [head])
    cache = np.zeros((2, sizes.key_heads, 2, sizes.head_width), np.float32)
    decoder.use_cache([cache[0].ctypes.data], [cache[1].ctypes.data], 2)
    past: list[np.ndarray] = []
    for position in range(2):
        x, cosine, sine = vector(24), vector(6), vector(6)
        expected = _decoder_step(sizes, layer, final_norm, head, x, cosine, sine, past)
        if not np.allclose(decoder.step(x, cosine, sine, position), expected, rtol=1e-3, atol=1e-3):
            return False
    return True


def _decoder_step(
    sizes: Sizes,
    layer: Layer,
    final_norm: np.ndarray,
    head: Matrix,
    x: np.ndarray,
    cosine: np.ndarray,
    sine: np.ndarray,
    past: list[np.ndarray],
) -> np.ndarray:
    """Return the logits of a token in plain numpy; `past` holds keys and values of the tokens before and grows."""

    def norm(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + sizes.epsilon) * weight

    def product(matrix: Any, x: np.ndarray) -> np.ndarray:
        return reference.multiply(matrix, x[None].astype(np.float32))[0]

    def heads(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        x = norm(x.reshape(-1, sizes.head_width), weight)
        low, high = np.split(x, 2, -1)
        return x * cosine + np.concatenate([-high, low], -1) * sine

    normal = norm(x, layer.input_norm)
    query = heads(product(layer.query, normal) + layer.query_bias, layer.query_norm)
    key = heads(product(layer.key, normal), layer.key_norm)
    past.append(np.stack([key, product(layer.value, normal).reshape(key.shape)]))
    keys, values = np.stack(past, 2).repeat(sizes.heads // sizes.key_heads, 1)
    scores = np.exp(sizes.scale * np.einsum("hd,htd->ht", query, keys))
    attended = np.einsum("ht,htd->hd", scores / scores.sum(-1, keepdims=True), values)
    x = x + product(layer.out, attended.reshape(-1))
    normal = norm(x, layer.post_norm)
    gate = product(layer.gate, normal)
    x = x + product(layer.down, gate / (1 + np.exp(-gate)) * product(layer.up, normal)) + layer.down_bias
    return product(head, norm(x, final_norm))


def random_payload(rng: np.random.Generator, rows: int, columns: int, kind: int, rank: int, count: int = 0) -> bytes:
    """Make a block of random codes or signs, with scales or factors of a trained matrix's size; `count` is that of outliers."""
    if kind == SPQR:
        return _random_dense(rng, rows, columns, rank)
    if kind == OUTLIERS:
        flat = np.sort(rng.choice(rows * columns, count, replace=False))
        pointer = np.searchsorted(flat, np.arange(rows + 1) * columns)
        return Outliers(pointer, flat % columns, rng.standard_normal(count) / 10).pack()
    factors = rows if kind in ROTATED else rank * (rows + columns)
    codes = rng.integers(0, 256, block_bytes(rows, columns, kind, rank) - 2 * factors, np.uint8)
    return codes.tobytes() + (rng.standard_normal(factors) / 50).astype("<f2").tobytes()


def _random_dense(rng: np.random.Generator, rows: int, columns: int, rank: int) -> bytes:
    """Make a dense SpQR block with random codes and order."""
    bits, group = spqr_form(rank)
    tiles, groups = -(-rows // TILE), -(-columns // group)
    codes = rng.integers(0, 2**bits, (tiles * TILE, groups * group), np.uint8)
    codes[rows:], codes[:, columns:] = 0, 0
    scale_codes, zero_codes = rng.integers(0, 8, (2, tiles * TILE, groups), np.uint8)
    low, step = np.array([0.01, 0.002, 4, 1]), np.array([0.01, 0.002, 3, 0.3])
    scales = (low + step * rng.random((tiles, groups, 4))).astype(np.float16)
    return Dense(rng.permutation(columns), codes, scale_codes, zero_codes, scales).pack(rank)
