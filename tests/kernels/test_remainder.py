"""Exact chunks: every bit of the original comes back, as SPEC.md says, with every choice of kernels."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exact_samples import original, special_values, to_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import bstk
from bstack.kernels import exact, native
from bstack.kernels.exact import Decoder, encode, narrow, predict, restore, widen
from bstack.kernels.matrix import OUTLIERS, SIGN, SPQR, TRELLIS, TRELLIS5, Matrix
from bstack.kernels.selftest import random_payload
from bstack.kernels.spqr import rank_of
from bstk.kinds import check_exact

VECTORS = Path(__file__).parents[2] / "format" / "vectors"
STACKS = [[(TRELLIS5, 2)] * 3, [(TRELLIS, 2)], [(SIGN, 1)] * 2, [(SPQR, rank_of(3, 16)), (OUTLIERS, 0), (TRELLIS5, 2)]]
TYPES = ("bf16", "f16", "f32")


def stack_of(rows, columns, kinds, seed=0):
    rng = np.random.default_rng(seed)
    return Matrix.of(rows, columns, [(k, r, random_payload(rng, rows, columns, k, r, rows)) for k, r in kinds])


def restored_as_specified(p, payload, shape, dtype):
    """A second decoder, written from SPEC.md alone: one weight at a time, in numpy's single precision."""
    rows, columns = shape
    one, bits_of = np.float32, lambda x: int(np.float32(x).view(np.uint32))
    words = np.frombuffer(payload[:260], "<u4").tolist()
    t, counts = words[0], words[1:]
    scales, at = payload[260 : 260 + rows], 260 + rows
    symbols = []
    for count in counts:
        symbols.append(np.frombuffer(payload[at : at + count], np.int8).tolist()[::-1])
        at += count
    shift = lambda number: min(max(number // 2 - 5, 0), 22 - t)  # noqa: E731
    low_bits = sum(shift(number) * sum(s != -128 for s in some) for number, some in enumerate(symbols))
    low = [payload[at + j // 8] >> j % 8 & 1 for j in range(low_bits)][::-1]
    at += -(-low_bits // 8)
    escapes = (len(payload) - at) // 4
    escaped = [sum(payload[at + b * escapes + e] << 8 * b for b in range(4)) for e in range(escapes)][::-1]
    profile = [one(1)] * columns
    out = np.zeros(shape, np.uint32)
    for i in range(rows):
        scale = np.uint32((134 + scales[i]) << 22).view(np.float32)
        for j in range(columns):
            x, v = p[i, j], one(scale * profile[j])
            floor = ((bits_of(v) >> 23) - 4 << 23 - t) - 1
            e = max(bits_of(x) >> 23 & 255, (bits_of(v) >> 23) - 4) + t - 23
            number = min(max((bits_of(v) >> 22) - 2 * e + 8, 0), 63)
            symbol = symbols[number].pop()
            if symbol == -128:
                out[i, j] = escaped.pop()
            else:
                magnitude = (bits_of(x) & 0x7FFFFFFF) + (1 << t >> 1) >> t
                m = (max(magnitude, floor) - floor) * (-1 if bits_of(x) >> 31 else 1)
                k = shift(number)
                m += (symbol << k) + sum(low.pop() << b for b in range(k))
                out[i, j] = (abs(m) + floor << t) | (0x80000000 if m < 0 else 0)
            y = one(abs(one(out[i, j].view(np.float32) - x)) * one(one(1) / scale))
            y = max(y if y < 16 else one(16), one(2**-12))
            profile[j] = one(profile[j] + one(one(y - profile[j]) * one(2**-6)))
    assert not any(symbols) and not low and not escaped
    return narrow(out, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kinds", STACKS, ids=["trellis5", "trellis", "sign", "spqr"])
def test_every_bit_comes_back_as_specified(kinds, dtype):
    for rows, columns in ((1, 1), (5, 7), (70, 48), (3, 300)):
        stack = stack_of(rows, columns, kinds)
        p = predict(stack)
        bits = original(p, dtype, rows)
        parts = encode(stack, bits, dtype)
        payload = b"".join(parts)
        check_exact(payload, (rows, columns))
        assert np.array_equal(restore(stack, payload, dtype), bits)
        with np.errstate(all="ignore"):
            assert np.array_equal(restored_as_specified(p, payload, (rows, columns), dtype), bits)
        frame = bstk.pack_parts(parts)
        assert bstk.frames.unpack(frame.stored, len(payload)) == payload


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(TYPES),
    spread=st.sampled_from([0.0, 1e-4, 0.01, 1.0, 1e6, 1e30]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_any_values_come_back(rows, columns, dtype, spread, seed):
    stack = stack_of(rows, columns, STACKS[seed % 4], seed)
    with np.errstate(over="ignore"):
        bits = original(predict(stack), dtype, seed, spread)
    assert np.array_equal(restore(stack, b"".join(encode(stack, bits, dtype)), dtype), bits)


@pytest.mark.parametrize("dtype", TYPES)
def test_noise_and_constants_come_back(dtype):
    stack = stack_of(33, 40, STACKS[0])
    rng = np.random.default_rng(1)
    kind = np.uint32 if dtype == "f32" else np.uint16
    for bits in (
        rng.integers(0, np.iinfo(kind).max, (33, 40), kind, endpoint=True),
        np.zeros((33, 40), kind),
        *(np.full((33, 40), value) for value in special_values(dtype)),
    ):
        assert np.array_equal(restore(stack, b"".join(encode(stack, bits, dtype)), dtype), bits)


@pytest.mark.parametrize("native", [True, False])
def test_a_right_prediction_leaves_symbols_alone(native, monkeypatch):
    """No low bits and no escaped weights: nothing follows the symbols."""
    if not native:
        monkeypatch.setattr(exact, "library", lambda: None)
    for shape in ((1, 1), (2, 1)):
        stack = stack_of(*shape, STACKS[0])
        bits = to_bits(predict(stack), "bf16")
        parts = encode(stack, bits, "bf16")
        assert not any(parts[-5:])
        assert np.array_equal(restore(stack, b"".join(parts), "bf16"), bits)


def test_blocks_of_zeros_and_infinite_scales():
    for scale in (0.0, np.inf, np.nan):
        raw = bytes(40 * 12) + np.full(36, scale, "<f2").tobytes()
        stack = Matrix.of(36, 48, [(TRELLIS5, 2, raw)])
        bits = original(np.ones((36, 48), np.float32), "bf16", 2)
        with np.errstate(invalid="ignore"):
            assert np.array_equal(restore(stack, b"".join(encode(stack, bits, "bf16")), "bf16"), bits)


@pytest.mark.parametrize("use_native", [True, False])
def test_a_prediction_that_is_no_number_has_no_sign(use_native, monkeypatch):
    """Infinity minus infinity is a NaN of another sign on another processor."""
    if not use_native:
        monkeypatch.setattr(exact, "library", lambda: None)
    rng = np.random.default_rng(5)
    bits = original(rng.standard_normal((9, 40)).astype(np.float32), "bf16", 2)
    stack = Matrix.of(9, 40, [(TRELLIS5, 2, bytes(13 * 10) + np.ones(9, "<f2").tobytes())])
    made = []
    for nan in (0x7FC00000, 0xFFC00000, 0x7F800001):
        predicted = np.full((9, 40), nan, np.uint32)
        predicted[::2] = np.float32(0.5).view(np.uint32)
        monkeypatch.setattr(exact, "predict", lambda _, p=predicted: p.view(np.float32))
        monkeypatch.setattr(exact, "lookup", lambda _, rows, p=predicted: p[rows].view(np.float32))
        made.append(b"".join(encode(stack, bits, "bf16")))
        assert np.array_equal(restore(stack, made[0], "bf16"), bits)
    assert made[0] == made[1] == made[2]


def test_all_halves_widen_and_narrow():
    halves = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    for dtype in ("f16", "bf16"):
        assert np.array_equal(narrow(widen(halves, dtype), dtype), halves)
    finite = np.isfinite(halves.view(np.float16))
    assert np.array_equal(
        widen(halves, "f16").view(np.float32)[finite], halves.view(np.float16).astype(np.float32)[finite]
    )


def test_better_blocks_leave_less():
    """A prediction within a hundredth leaves some 4 bits of a bfloat16, one of zeros some 11."""
    stack = stack_of(256, 64, STACKS[0])
    p = predict(stack)
    rng = np.random.default_rng(3)
    error = np.sqrt((p**2).mean()) * rng.standard_normal(p.shape, np.float32)
    sizes = []
    for fraction in (0.001, 0.01, 0.1):
        bits = to_bits((p + fraction * error).astype(np.float32), "bf16")
        sizes.append(bstk.pack_parts(encode(stack, bits, "bf16")).stored_length * 8 / p.size)
    assert sizes[0] < sizes[1] - 1 < sizes[2] - 2
    assert 3 < sizes[1] < 5


def test_values_with_zeros_at_the_end_take_the_bits_that_they_have():
    stack = stack_of(64, 64, STACKS[0])
    bits = original(predict(stack), "bf16", 5)
    as_bf16, as_f32 = encode(stack, bits, "bf16"), encode(stack, widen(bits, "bf16"), "f32")
    assert as_bf16 == as_f32


def test_a_chunk_that_asks_for_other_symbols_is_refused():
    stack = stack_of(64, 40, STACKS[0])
    bits = original(predict(stack), "bf16", 5)
    payload = bytearray(b"".join(encode(stack, bits, "bf16")))
    counts = np.frombuffer(payload, "<u4", 64, 4).tolist()
    pair = next(c for c in range(0, 64, 2) if counts[c] and counts[c + 1])  # with the same number of low bits
    payload[4 + 4 * pair : 12 + 4 * pair] = np.array([counts[pair] - 1, counts[pair + 1] + 1], "<u4").tobytes()
    check_exact(bytes(payload), (64, 40))
    with pytest.raises(ValueError, match="fewer symbols"):
        restore(stack, bytes(payload), "bf16")


def test_rows_come_in_order():
    stack = stack_of(70, 8, STACKS[0])
    bits = original(predict(stack), "bf16", 5)
    decoder = Decoder(stack, b"".join(encode(stack, bits, "bf16")), "bf16")
    assert np.array_equal(decoder.rows(0), bits[:64])
    with pytest.raises(ValueError, match="next row is 64"):
        decoder.rows(0)
    assert np.array_equal(decoder.rows(64), bits[64:])


def test_golden_file():
    expected = {
        name: bytes.fromhex(text) for name, text in json.loads((VECTORS / "expected-exact.json").read_text()).items()
    }
    with bstk.open(VECTORS / "exact.bstk") as file:
        tops = [chunk for chunk in file.chunks if chunk.kind is bstk.EXACT]
        assert len(tops) == 5
        for chunk in tops:
            below = [c for c in file.chunks if c.name == chunk.name and c.is_block]
            stack = Matrix.of(*chunk.shape, [(c.kind.code, c.rank, file.read(c)) for c in below])
            payload = file.read(chunk)
            assert restore(stack, payload, chunk.dtype).tobytes() == expected[chunk.name]
            with np.errstate(all="ignore"):
                again = restored_as_specified(predict(stack), payload, chunk.shape, chunk.dtype)
            assert again.tobytes() == expected[chunk.name]


DIGEST = """
import hashlib, sys
sys.path[:0] = sys.argv[1:]
import test_remainder
print(test_remainder.digest())
"""


def digest():
    """Return a digest of encoded chunks and of what they give back."""
    total = hashlib.sha256()
    for number, kinds in enumerate(STACKS):
        stack = stack_of(130, 96, kinds)
        dtype = TYPES[number % 3]
        bits = original(predict(stack), dtype, 1)
        payload = b"".join(encode(stack, bits, dtype))
        total.update(payload + restore(stack, payload, dtype).tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("kernels", native.CHOICES)
def test_the_same_bits_everywhere(kernels, threads):
    if kernels != "reference" and (native.library() is None or native.library().bstack_offers(kernels.encode())):
        pytest.skip(f"this CPU has no {kernels}")
    here = Path(__file__).parent
    command = [sys.executable, "-c", DIGEST, str(here), str(here.parent / "helpers")]
    chosen = {"BSTACK_KERNELS": kernels, "BSTACK_THREADS": threads}
    found = subprocess.run(command, env=os.environ | chosen, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest()


def test_the_reference_is_slow_but_there(monkeypatch):
    monkeypatch.setattr(exact, "library", lambda: None)
    stack = stack_of(9, 20, STACKS[0])
    bits = original(predict(stack), "f16", 5)
    payload = b"".join(encode(stack, bits, "f16"))
    monkeypatch.undo()
    assert payload == b"".join(encode(stack, bits, "f16"))
    assert np.array_equal(restore(stack, payload, "f16"), bits)
