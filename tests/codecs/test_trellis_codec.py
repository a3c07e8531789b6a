"""The trellis codec: kernel against reference, layout against the specification, promises of the contract."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_inputs import correlated_hessian, hessian
from hypothesis import given, settings
from hypothesis import strategies as st

import bstk
from bstack.codecs import make_codec
from bstack.codecs.trellis import UNIT, TrellisCodec
from bstack.kernels import feedback, reference
from bstack.kernels.encode import encode_columns
from bstack.kernels.native import library
from bstack.kernels.reference import TABLE5
from bstack.numerics.hessian import output_errors, shrinkage
from bstack.settings import Settings
from bstk.errors import UsageError

SPEC = Path(__file__).parents[2] / "format" / "SPEC.md"


def read_as_specified(payload: bytes, m: int, n: int) -> np.ndarray:
    """A second reader, written from SPEC.md alone: loops, float64, the table parsed from the text."""
    block = re.search(r"```\n((?:\s+-?\d+,.*\n)+)```", SPEC.read_text().partition("**trellis5**")[2])
    table = [int(v) for v in re.findall(r"-?\d+", block.group(1))]
    assert len(table) == 64
    quarter = -(-n // 4)
    codes = np.zeros((m + 4, n), int)
    for i in range(m + 4):
        for j in range(n):
            codes[i, j] = payload[i * quarter + j % quarter] >> (2 * (j // quarter)) & 3
    scale = np.frombuffer(payload[(m + 4) * quarter :], "<f2").astype(float)
    assert scale.shape == (m,)
    q = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            own, first, second, third, fourth = codes[i : i + 5, j][::-1]
            q[i, j] = scale[i] * table[first + 4 * (own ^ second ^ fourth) + 16 * third]
    z = n & -n
    b = np.zeros((n, n))
    for start in range(0, n, z):
        for i in range(z):
            for j in range(z):
                b[start + i, start + j] = (-1) ** bin(i & j).count("1") / z**0.5
    signs = []
    for j in range(n):
        x = (j + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        signs.append(-1 if (x ^ x >> 31) >> 63 else 1)
    return q @ b @ np.diag(signs)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 5), (17, 6), (8, 24), (40, 12), (5, 64), (33, 96)])
def test_rebuild_is_what_the_specification_says(m, n):
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(m * n))
    payloads = [b.payload for b in TrellisCodec(3).encode(weight, hessian(n), 10**6, torch.rand(m))]
    expected = sum(read_as_specified(p, m, n) for p in payloads)
    rebuilt = TrellisCodec.rebuild(payloads, [bstk.TRELLIS5] * 3, [2] * 3, (m, n))
    assert np.abs(rebuilt.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


@given(
    m=st.integers(1, 60), n=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-6, 1.0, 1e6])
)
@settings(max_examples=40, deadline=None)
def test_kernel_gives_the_codes_of_the_reference(m, n, seed, spread):
    if library() is None:
        pytest.skip("the C kernels are not built")
    rng = np.random.default_rng(seed)
    original = (rng.standard_normal((n, m)) * spread).astype(np.float32)
    feedback = (rng.standard_normal((n, n)) * 0.3).astype(np.float32)
    scale = (rng.uniform(0.01, 0.1, m) * spread).astype(np.float32)
    weight = rng.uniform(0.01, 10, m).astype(np.float32)
    table = np.array(TABLE5, np.float32)
    arrays = original.copy(), original, feedback, table, scale, weight
    one = [found.numpy() for found in encode_columns(*map(torch.from_numpy, arrays))]
    two = reference.encode_columns(original.copy(), original, feedback, table, scale, weight)
    assert (one[0] == two[0]).all()
    assert (one[1] == two[1]).all()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_search_finds_the_best_path(rows):
    """Against all paths, in float64."""
    rng = np.random.default_rng(rows)
    table = np.array(TABLE5, np.float32)
    for _ in range(3):
        x = (rng.standard_normal((1, rows)) / UNIT).astype(np.float32)
        weight = rng.uniform(0.1, 3, rows).astype(np.float32)
        ones = np.ones(rows, np.float32)
        arrays = x.copy(), x, np.zeros((1, 1), np.float32), table, ones, weight
        _, errors = encode_columns(*map(torch.from_numpy, arrays))
        found = (weight * errors[0].numpy().astype(float) ** 2).sum()
        best = np.inf
        for path in itertools.product(range(4), repeat=rows + 4):
            cost = 0.0
            for i in range(rows):
                fourth, third, second, first, own = path[i : i + 5]
                value = TABLE5[first + 4 * (own ^ second ^ fourth) + 16 * third]
                cost += weight[i] * (float(x[0, i]) - value) ** 2
            best = min(best, cost)
        assert found == pytest.approx(best, rel=1e-5)


@given(m=st.integers(1, 70), n=st.integers(1, 70), planes=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_every_block_lowers_the_error_it_reports(m, n, planes, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator) * torch.rand(m, 1, generator=generator)
    h = hessian(n, seed % 1000)
    codec = TrellisCodec(planes)
    blocks = list(codec.encode(weight, h, 10**6, torch.rand(m, generator=generator)))
    assert len(blocks) == planes
    before = output_errors(weight, h).sum()
    scale = float(before)
    for count, block in enumerate(blocks, 1):
        assert len(block.payload) == bstk.TRELLIS5.rule((m, n), "f16", 2)
        rebuilt = codec.rebuild([b.payload for b in blocks[:count]], [bstk.TRELLIS5] * count, [2] * count, (m, n))
        error = output_errors(weight - rebuilt, h)
        # The codec measures in rotated coordinates, this test in the original ones.
        assert torch.allclose(error, block.row_errors, rtol=2e-2, atol=1e-5 * scale)
        assert float(error.sum()) <= float(before) + 1e-6 * scale
        before = error.sum()


@given(m=st.integers(1, 40), n=st.integers(8, 90), tokens=st.integers(2, 400), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_scales_are_those_of_the_better_hessian_and_errors_of_the_sample(m, n, tokens, seed):
    """In float64, with products that are multiplied out: keep H + ridge I of `shrinkage`, and H, for few and many tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator) * torch.rand(n, generator=generator).square()
    h, weight = x.t() @ x, torch.randn(m, n, generator=generator)
    keep, ridge = shrinkage(h, tokens)
    better = keep * h.double() + ridge * torch.eye(n, dtype=torch.float64)
    residual = weight.double()
    for block in TrellisCodec(3).encode(weight, h, tokens, torch.rand(m, generator=generator)):
        before, size = ((residual @ h.double()) * residual).sum(1), residual.square().sum(1)
        stored = torch.from_numpy(np.frombuffer(block.payload[-2 * m :], "<f2").astype(np.float64))
        added = torch.from_numpy(read_as_specified(block.payload, m, n))
        value = added / stored[:, None]
        fitted = ((value @ better) * residual).sum(1) / ((value @ better) * value).sum(1)
        assert torch.allclose(stored, fitted, rtol=2e-3, atol=1e-7)
        residual -= added
        after = ((residual @ h.double()) * residual).sum(1)
        # Rounding of single precision, of the damped form of which the errors are a part.
        slack = 3e-5 * (before + float(better.diagonal().mean()) * size / max(keep, 0.02))
        assert ((block.errors_before.double() - before).abs() <= 1e-4 * before + slack).all()
        assert ((block.row_errors.double() - after).abs() <= 1e-4 * after + slack).all()


def test_a_factor_in_bytes_is_as_good_as_one_in_floats(monkeypatch):
    """Of wide matrices; here of one of 300 inputs, whose errors are multiplied out too."""
    if library() is None or not library().bstack_feedback_offers():
        pytest.skip("no instruction set here multiplies these bytes")
    m, n = 100, 300
    weight, h = torch.randn(m, n, generator=torch.Generator().manual_seed(1)), correlated_hessian(n)
    found = []
    for narrow in (0, n):
        monkeypatch.setattr(feedback, "NARROW", narrow)
        blocks = list(TrellisCodec(4).encode(weight, h, 10**6, torch.ones(m)))
        rebuilt = TrellisCodec.rebuild([b.payload for b in blocks], [bstk.TRELLIS5] * 4, [2] * 4, (m, n))
        assert float(output_errors(weight - rebuilt, h).sum()) == pytest.approx(
            float(blocks[-1].row_errors.sum()), rel=1e-3
        )
        found.append([float(block.row_errors.sum()) for block in blocks])
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_gaussian_weights_reach_the_rate_of_the_code():
    """With white inputs: at least 11.4, 22.8, 34.1 and 44.8 dB after 2, 4, 6 and 8 bits; the limit is 6.02 dB per bit."""
    weight = torch.randn(1024, 256, generator=torch.Generator().manual_seed(1))
    blocks = list(TrellisCodec(4).encode(weight, torch.eye(256), 10**6, torch.ones(1024)))
    power = float(weight.square().sum())
    reached = [10 * np.log10(power / float(b.row_errors.sum())) for b in blocks]
    assert all(found >= least for found, least in zip(reached, (11.4, 22.8, 34.1, 44.8), strict=True)), reached


def test_feedback_pays_where_inputs_are_correlated():
    n = 64
    h = correlated_hessian(n)
    weight = torch.randn(256, n, generator=torch.Generator().manual_seed(4))
    with_feedback = next(TrellisCodec(1).encode(weight, h, 10**6, torch.ones(256)))
    without = next(TrellisCodec(1).encode(weight, torch.eye(n), 10**6, torch.ones(256)))
    plain = weight - TrellisCodec.rebuild([without.payload], [bstk.TRELLIS5], [2], (256, n))
    assert float(with_feedback.row_errors.sum()) < 0.6 * float(output_errors(plain, h).sum())


def test_important_rows_get_the_better_codes():
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(5))
    importance = torch.ones(256)
    importance[::2] = 30
    h = hessian(64)
    even = next(TrellisCodec(1).encode(weight, h, 10**6, importance)).row_errors[::2].sum()
    equal = next(TrellisCodec(1).encode(weight, h, 10**6, torch.ones(256))).row_errors[::2].sum()
    assert float(even) < float(equal)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(8, 12), torch.full((8, 12), 3.0), torch.eye(16), torch.randn(8, 12) * 1e-20, torch.randn(8, 12) * 1e4],
    ids=["zeros", "constant", "identity", "tiny", "huge"],
)
@pytest.mark.parametrize("h", ["plain", "zero", "one channel"])
def test_degenerate_input_gives_finite_blocks(weight, h):
    n = weight.shape[1]
    matrix = {"plain": hessian(n), "zero": torch.zeros(n, n), "one channel": torch.diag(torch.eye(n)[0])}[h]
    blocks = list(TrellisCodec(2).encode(weight, matrix, 10**6, torch.zeros(weight.shape[0])))
    rebuilt = TrellisCodec.rebuild([b.payload for b in blocks], [bstk.TRELLIS5] * 2, [2, 2], tuple(weight.shape))
    assert rebuilt.isfinite().all()
    assert all(b.row_errors.isfinite().all() and (b.row_errors >= 0).all() for b in blocks)


def test_same_input_gives_the_same_bytes():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(6))
    one, two = (
        [b.payload for b in TrellisCodec(2).encode(weight, hessian(48), 10**6, torch.ones(64))] for _ in range(2)
    )
    assert one == two


@pytest.mark.parametrize("planes", [0, -1, 17])
def test_planes_out_of_range_are_refused(planes):
    with pytest.raises(UsageError, match="1 to 16"):
        TrellisCodec(planes)


def test_a_rank_is_refused():
    with pytest.raises(UsageError, match="belongs to the sign codec"):
        make_codec(Settings(rank=4))


@pytest.mark.slow
def test_without_kernels_it_warns_and_gives_the_same_bytes(tmp_path):
    script = """
import torch, warnings
warnings.simplefilter("always")
from bstack.codecs.trellis import TrellisCodec
g = torch.Generator().manual_seed(0)
w = torch.randn(20, 8, generator=g); x = torch.randn(50, 8, generator=g)
print(next(TrellisCodec(1).encode(w, x.t() @ x, 50, torch.ones(20))).payload.hex())
"""
    import os

    runs = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **extra}, check=True
        )
        for extra in ({}, {"BSTACK_KERNELS": "reference"})
    ]
    assert runs[0].stdout == runs[1].stdout
    assert "C kernels are not in use" in runs[1].stderr
